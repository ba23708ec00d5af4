"""Repair: refitted weights that give the layers after a cut nearly the input they had before pruning.

A repair belongs to one plan for one model. `fit_repair` makes it. `prune_(model, plan, repair=...)`
in memory and `prune_checkpoint(..., repair=...)` on disk apply it, with identical results.

On disk, a repair is a folder with `repair.json` (what was fitted, and how well) and `repair.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gradpruner.common.errors import IntegrityError, PlanError, ShapeError
from gradpruner.common.files import save_tensors
from gradpruner.common.json_files import read_versioned, write_json
from gradpruner.common.printing import Printed, print_table, runs_of
from gradpruner.gradients.trace import same_model
from gradpruner.plans.layer_plan import PruningPlan

if TYPE_CHECKING:
    from rich.console import Console

REPAIR_FILE, WEIGHTS_FILE = "repair.json", "repair.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RepairedCut:
    """The refit of one kept layer, which makes up for layers removed right after it or anywhere before it.

    Attributes:
        layer: The kept layer. Its last linear is refitted, or the norm that follows this linear.
        linear: Path of the linear or norm inside the layer.
        gone: The removed layers right after it, ascending; () if there are none (`layer_wise`).
        ridge: The chosen ridge, as a multiple of the mean diagonal of the regressors' second moments. None if
            no ridge lowered the error on held-out samples; the weight then stays unchanged.
        error_before: Mean of |h - y|^2 / |h|^2 over held-out tokens, weighted as in fitting. h is the input
            of the next kept layer in the dense model, y its input in the pruned model without this refit.
        error_after: The same error with a refit that was fitted on the other samples.
    """

    layer: int
    linear: str
    gone: tuple[int, ...]
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Record:
    """The JSON file of a `Repair`: everything but the weights."""

    kind: str
    pruned: tuple[int, ...]
    cuts: tuple[RepairedCut, ...]
    model: str
    rows: int
    tokens: int
    seconds: float
    notes: tuple[str, ...]
    answers: float = 0.0


@dataclass(frozen=True)
class Repair(Printed):
    """The refitted weights for one plan of one model.

    Attributes:
        kind: "linear", "least_squares" or "layer_wise".
        pruned: The removed layers, ascending.
        cuts: One per layer in `places_of`, from input to output.
        weights: Layer -> refitted weight, float32, (out_features, in_features) for a linear and (hidden,) for
            a norm. Cuts whose ridge is None have none.
        model: Fingerprint of the dense model, or "" if unknown.
        rows: Number of samples used for fitting.
        tokens: Number of their tokens that were used.
        seconds: Wall time of fitting.
        notes: Anything unusual, in words.
        answers: Share of the weight that tokens got by their influence on answers, in [0, 1).
    """

    kind: str
    pruned: tuple[int, ...]
    cuts: tuple[RepairedCut, ...]
    weights: Mapping[int, Tensor]
    model: str = ""
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    answers: float = 0.0

    def __post_init__(self) -> None:
        refitted = {cut.layer for cut in self.cuts if cut.ridge is not None}
        if refitted != set(self.weights):
            raise ShapeError(
                f"The cuts refit layers {sorted(refitted)}, but the weights are for layers "
                f"{sorted(self.weights)}."
            )

    @property
    def linears(self) -> dict[int, str]:
        """Layer -> path of the linear or norm in it whose weight changes."""
        return {cut.layer: cut.linear for cut in self.cuts if cut.ridge is not None}

    def check(self, plan: PruningPlan, fingerprint: str = "") -> None:
        """Raises PlanError if the repair was fitted for another plan or on another model."""
        if self.pruned != plan.pruned:
            raise PlanError(
                f"The repair was fitted for a model without layers {runs_of(self.pruned)}; the plan removes "
                f"{runs_of(plan.pruned)}.",
                hint="Fit a repair for this plan.",
            )
        wrong = {(cut.layer, cut.gone) for cut in self.cuts}.symmetric_difference(places_of(plan, self.kind))
        if wrong:
            layer, gone = min(wrong)
            behind = f"layers {runs_of(gone)} after layer {layer}" if gone else f"layer {layer}"
            raise PlanError(
                f"The repair and the plan do not have the same cuts; they differ in {behind}.",
                hint="Fit a repair for this plan.",
            )
        if self.model and fingerprint and not same_model(self.model, fingerprint):
            raise PlanError(
                f"The repair was fitted on model {self.model}; this is {fingerprint}.",
                hint="Fit a repair on this model.",
            )

    def check_shapes(self, shapes: Mapping[int, Mapping[str, tuple[int, ...]]]) -> None:
        """Raises PlanError unless the model has every refitted weight, with the same shape.

        Args:
            shapes: Layer -> path of a linear or norm -> shape of its weight in the model.
        """
        for layer, name in self.linears.items():
            found, fitted = shapes.get(layer, {}).get(name), tuple(self.weights[layer].shape)
            if found != fitted:
                raise PlanError(
                    f"The repair holds a weight of shape {fitted} for '{name}' of layer {layer}; in the "
                    f"model it is {found or 'missing'}.",
                    hint="Fit a repair on this model.",
                )

    def show(self, console: Console) -> None:
        """Prints the error before and after every refit, on held-out samples."""
        rows = [
            (
                f"{cut.layer} {cut.linear}",
                runs_of(cut.gone) if cut.gone else "those before",
                f"{cut.error_before:.1%}",
                f"{cut.error_after:.1%}" if cut.ridge is not None else "unchanged",
            )
            for cut in self.cuts
        ]
        print_table(
            console,
            f"Repair ({self.kind.replace('_', ' ')}), fitted on {self.rows} samples, {self.tokens} tokens",
            ("refitted", "makes up for layers", "error before", "error after"),
            rows,
            self.notes,
        )

    def facts(self) -> dict[str, Any]:
        """Returns everything but the weights, as JSON values."""
        return asdict(_Record(**{entry.name: getattr(self, entry.name) for entry in fields(_Record)}))

    def save(self, folder: Path) -> Path:
        """Writes the two files, `repair.json` last, so that a folder with this file is complete."""
        tensors = {f"{layer}.{self.linears[layer]}": w.contiguous() for layer, w in self.weights.items()}
        save_tensors(folder / WEIGHTS_FILE, tensors, {})
        write_json(folder / REPAIR_FILE, {"format_version": FORMAT_VERSION, **self.facts()})
        return folder / REPAIR_FILE

    @classmethod
    def load(cls, folder: str | Path) -> Repair:
        """Reads a repair folder.

        Raises:
            IntegrityError: If a file is missing or damaged, or the two files do not match.
        """
        folder, hint = Path(folder), "Fit the repair again."
        record = read_versioned(folder / REPAIR_FILE, "repair", _Record, FORMAT_VERSION, hint)
        try:
            named = {f"{cut.layer}.{cut.linear}": cut.layer for cut in record.cuts if cut.ridge is not None}
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                weights = {named[name]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            repair = cls(weights=weights, **vars(record))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{folder} does not hold a usable repair: {str(error).rstrip('.')}.", hint=hint
            ) from error
        if not all(bool(torch.isfinite(w).all()) for w in repair.weights.values()):
            raise IntegrityError(f"The repair in {folder} holds NaN or Inf.", hint=hint)
        return repair


def places_of(plan: PruningPlan, kind: str) -> list[tuple[int, tuple[int, ...]]]:
    """Returns the kept layers that a repair refits, from input to output: (layer, layers removed after it).

    These are the layers right before a cut. "layer_wise" adds all kept layers after the first cut, with ()
    if no layer is removed right after.
    """
    gone = set(plan.pruned)
    first = min(gone, default=plan.num_layers) if kind == "layer_wise" else plan.num_layers
    runs = ((layer, tuple(takewhile(gone.__contains__, count(layer + 1)))) for layer in plan.keep)
    return [(layer, run) for layer, run in runs if run or layer > first]


def unrepaired(plan: PruningPlan) -> Sequence[int]:
    """Returns the removed layers that no repair makes up for, because no kept layer precedes them."""
    return [layer for layer in plan.pruned if all(before in plan.pruned for before in range(layer))]
