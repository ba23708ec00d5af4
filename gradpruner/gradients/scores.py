"""LayerScores: one number per decoder layer, with a confidence interval.

Shape suffixes: S recorded steps, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradpruner.common.errors import ConfigError, IntegrityError, NonFiniteError
from gradpruner.common.json_files import read_object, write_json
from gradpruner.common.printing import Printed, shown
from gradpruner.common.ranking import ascending, method_and_choice, print_scores
from gradpruner.common.registry import check_known
from gradpruner.gradients.gates import bootstrap
from gradpruner.gradients.trace import GradientTrace, trace_digest

if TYPE_CHECKING:
    from rich.console import Console

NORMS = ("squared", "frobenius")


@dataclass(frozen=True)
class LayerScores(Printed):
    """Importance of every decoder layer. A higher score always means a more important layer.

    Attributes:
        method: Name of the method that computed the scores.
        values: One finite score per layer. Scores of different objects cannot be compared.
        low: Lower ends of the 95 % bootstrap intervals over steps, or () if there are none.
        high: Upper ends of these intervals, or ().
        stability: (step, overlap) pairs: the fraction of the finally kept layers that the scores of the first
            `step` steps would keep too (paper Fig. 2); () if unknown.
        evidence: What the scores are based on (steps, norm, digest of the trace ...), as JSON values.

    Raises:
        NonFiniteError: If there is no score, or one is NaN or Inf.
    """

    method: str
    values: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    stability: tuple[tuple[int, float], ...] = ()
    evidence: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or not all(map(math.isfinite, self.values)):
            raise NonFiniteError(f"The scores of method {shown(self.method)} are not all finite numbers.")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.values)

    def ascending(self) -> list[int]:
        """Returns the layers from least to most important, see `ranking.ascending`."""
        return ascending(self.values)

    def show(self, console: Console) -> None:
        """Prints one line per layer, the least important first."""
        name = method_and_choice(self.method, self.evidence)
        print_scores(console, name, self.values, self.low, self.high)

    def save(self, path: Path) -> Path:
        """Writes the scores as JSON."""
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, path: str | Path) -> LayerScores:
        """Reads a score file.

        Raises:
            IntegrityError: If the file is missing or is not a score file.
        """
        try:
            found = read_object(Path(path), "score file", cls)
        except NonFiniteError as error:
            raise IntegrityError(f"{path} is not a score file: {error}") from error
        if any(len(ends) not in (0, found.num_layers) for ends in (found.low, found.high)):
            raise IntegrityError(
                f"{path} is not a score file: it needs an interval for every layer, or none."
            )
        return found


def default_num_prune(num_layers: int, fraction: float = 0.4) -> int:
    """Returns the number of layers closest to `fraction` of the depth: 13 of 32, 16 of 40, 6 of 16."""
    return round(fraction * num_layers)


def check_energy(trace: GradientTrace, norm: str) -> None:
    """Raises ConfigError for an unknown norm, or if the energy of every recorded step is zero."""
    check_known("norm", norm, NORMS)
    if trace.effective_steps == 0:
        raise ConfigError(
            f"All {trace.num_steps} recorded steps have zero gradient energy, so layers cannot be scored. "
            "LoRA B is zero at the first step, and stays zero while warm-up keeps the learning rate at zero.",
            hint="Record more steps or shorten the warm-up.",
        )


def score_layers(
    trace: GradientTrace,
    *,
    norm: str = "squared",
    num_keep: int | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> LayerScores:
    """Scores every layer by its recorded gradient energy.

    With steps i = 1..t and the linears k of a layer, the score is
    `squared` (the paper): `1/t * sum_i sum_k ||G_ik||_F**2`;
    `frobenius` (the released code): `sum_i sum_k ||G_ik||_F`.

    Args:
        trace: The recorded gradients. At least one step must have non-zero energy; step 1 never has.
        norm: "squared" or "frobenius".
        num_keep: Number of layers that will be kept, for the stability curve; 60 % of the depth by default.
        resamples: Number of bootstrap resamples of the steps, for the 95 % intervals.
        seed: Seed of the bootstrap.

    Returns:
        Scores with intervals, stability curve and evidence.

    Raises:
        ConfigError: If the norm is unknown, `num_keep` or `resamples` is out of range, or all recorded steps
            have zero energy.

    Source: GradPruner, Eq. 3-4, Algorithm 1 step 3, Fig. 2.
    """
    check_energy(trace, norm)
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}; 1 or more is needed.")
    energy_SL = trace.layer_energies(1.0 if norm == "squared" else 0.5)
    divisor = trace.num_steps if norm == "squared" else 1
    values_L = energy_SL.sum(dim=0) / divisor
    low_L, high_L = bootstrap(energy_SL, divisor, resamples, seed, at_once=resamples)
    num_layers = trace.info.num_layers
    keep = num_keep if num_keep is not None else num_layers - default_num_prune(num_layers)
    return LayerScores(
        method="gradpruner",
        values=tuple(values_L.tolist()),
        low=tuple(low_L.tolist()),
        high=tuple(high_L.tolist()),
        stability=rank_stability(energy_SL, keep),
        evidence={
            "norm": norm,
            "num_steps": trace.num_steps,
            "effective_steps": trace.effective_steps,
            "num_keep": keep,
            "resamples": resamples,
            "seed": seed,
            "model": trace.info.model,
            "num_layers": num_layers,
            "trace": trace_digest(trace),
        },
    )


def rank_stability(energy_SL: Tensor, num_keep: int) -> tuple[tuple[int, float], ...]:
    """Returns how closely the set of kept layers after each step matches the final one.

    Args:
        energy_SL: Layer energies of every step, shape (steps, layers).
        num_keep: Number of kept layers, 1 <= num_keep <= layers.

    Returns:
        (step, overlap) for every step from the first with non-zero energy on. `step` counts from 1. The
        overlap is the fraction, 0 to 1, of the finally kept layers that the scores up to this step keep too.

    Raises:
        ConfigError: If `num_keep` is out of range.

    Source: GradPruner, Fig. 2 (which keeps 20 of 32 layers).
    """
    cumulative_SL = energy_SL.cumsum(dim=0)
    if not 1 <= num_keep <= energy_SL.shape[1]:
        raise ConfigError(f"num_keep is {num_keep}; 1 to {energy_SL.shape[1]} layers can be kept.")
    rows: list[list[float]] = cumulative_SL.tolist()
    final = _kept(rows[-1], num_keep)
    return tuple(
        (step, len(_kept(row, num_keep) & final) / num_keep) for step, row in enumerate(rows, 1) if any(row)
    )


def _kept(values: Sequence[float], num_keep: int) -> set[int]:
    return set(ascending(values)[len(values) - num_keep :])
