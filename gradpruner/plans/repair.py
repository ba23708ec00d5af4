"""Repair: weights refitted so that the layers after a cut get nearly the input they had before the cut.

A repair is made for one plan of one model (`refitting.fit_repair`) and carried out with it:
`prune_(model, plan, repair=...)` in memory and `prune_checkpoint(..., repair=...)` on disk put in the same
numbers.

On disk a repair is a folder: `repair.json` (what was fitted, and how well) and `repair.safetensors`.
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
from gradpruner.common.json_files import read_json, typed, write_json
from gradpruner.common.printing import Printed, print_table
from gradpruner.gradients.trace import same_model
from gradpruner.plans.layer_plan import PruningPlan, runs_of

if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("none", "linear", "least_squares", "layer_wise")
REPAIR_FILE, WEIGHTS_FILE = "repair.json", "repair.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class RepairedCut:
    """The refit in one kept layer, which makes up for the layers removed behind it, or for those before it.

    Attributes:
        layer: The kept layer; its last linear is refitted, or the norm that follows it.
        linear: Path of that linear or norm inside the layer.
        gone: The layers of the run behind it, neighbours, ascending; () where none goes (`layer_wise`).
        ridge: The chosen multiple of the mean diagonal of the regressors' second moments; None when no
            ridge lowered the error on held-out samples and the weight stays as it was.
        error_before: Mean of |h - y|^2 / |h|^2 over held-out tokens, weighted as in fitting: h what the dense
            model hands to the next kept layer, y what the pruned model hands it without this refit.
        error_after: The same with the refit that was fitted on the other samples.
    """

    layer: int
    linear: str
    gone: tuple[int, ...]
    ridge: float | None
    error_before: float
    error_after: float


@dataclass(frozen=True)
class _Record:
    """What stands in the JSON file of a `Repair`: all of it but the weights."""

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
    """The refitted weights of one plan of one model.

    Attributes:
        kind: "linear", "least_squares" or "layer_wise".
        pruned: The layers that go, ascending.
        cuts: One per refitted layer, see `places_of`, from input to output.
        weights: Layer -> the refitted weight, float32: (out_features, in_features) of a linear, (hidden,) of
            a norm; without the cuts whose ridge is None.
        model: Fingerprint of the dense model; "" if it cannot be told.
        rows: Samples it was fitted on.
        tokens: Their tokens that counted.
        seconds: Wall time of fitting.
        notes: Anything unusual, in words.
        answers: Least share of all weight given to positions before answer tokens, in [0, 1).
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
                f"The cuts name refitted linears in layers {sorted(refitted)}; weights are there for "
                f"{sorted(self.weights)}."
            )

    @property
    def linears(self) -> dict[int, str]:
        """Layer -> path of the linear, or norm, in it that gets another weight."""
        return {cut.layer: cut.linear for cut in self.cuts if cut.ridge is not None}

    def check(self, plan: PruningPlan, fingerprint: str = "") -> None:
        """Raises PlanError when the repair was fitted for other layers or on another model."""
        if self.pruned != plan.pruned:
            raise PlanError(
                f"The repair was fitted for a model without layers {runs_of(self.pruned)}; the plan removes "
                f"{runs_of(plan.pruned)}.",
                hint="Fit a repair for this plan.",
            )
        wrong = {(cut.layer, cut.gone) for cut in self.cuts}.symmetric_difference(places_of(plan, self.kind))
        if wrong:
            layer, gone = min(wrong)
            behind = f"layers {runs_of(gone)} behind layer {layer}" if gone else f"layer {layer}"
            raise PlanError(
                f"Repair and plan do not have the same cuts: {behind}.",
                hint="Fit a repair for this plan.",
            )
        if self.model and fingerprint and not same_model(self.model, fingerprint):
            raise PlanError(
                f"The repair was fitted on model {self.model}; this is {fingerprint}.",
                hint="Fit a repair on this model.",
            )

    def check_shapes(self, shapes: Mapping[int, Mapping[str, tuple[int, ...]]]) -> None:
        """Raises PlanError unless the model has every refitted weight, in the fitted shape.

        Args:
            shapes: Layer -> linear or norm -> shape of its weight, (out_features, in_features) or (hidden,).
        """
        for layer, name in self.linears.items():
            found, fitted = shapes.get(layer, {}).get(name), tuple(self.weights[layer].shape)
            if found != fitted:
                raise PlanError(
                    f"The repair holds a weight of shape {fitted} for '{name}' of layer {layer}; the model's "
                    f"is {found or 'missing'}.",
                    hint="Fit a repair on this model.",
                )

    def show(self, console: Console) -> None:
        """Prints the error before and after every refit, on samples it was not fitted on."""
        rows = [
            (
                f"{cut.layer} {cut.linear}",
                runs_of(cut.gone) if cut.gone else "those before",
                f"{cut.error_before:.1%}",
                f"{cut.error_after:.1%}" if cut.ridge is not None else "left as it was",
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
        """Everything but the weights, as JSON values."""
        return asdict(_Record(**{entry.name: getattr(self, entry.name) for entry in fields(_Record)}))

    def save(self, folder: Path) -> Path:
        """Writes the two files; `repair.json` last, so that a folder that has one is whole."""
        tensors = {f"{layer}.{self.linears[layer]}": w.contiguous() for layer, w in self.weights.items()}
        save_tensors(folder / WEIGHTS_FILE, tensors, {})
        write_json(folder / REPAIR_FILE, {"format_version": FORMAT_VERSION, **self.facts()})
        return folder / REPAIR_FILE

    @classmethod
    def load(cls, folder: str | Path) -> Repair:
        """Reads a repair folder.

        Raises:
            IntegrityError: If a file is missing, damaged, or the two do not belong together.
        """
        folder = Path(folder)
        raw = read_json(folder / REPAIR_FILE, "repair")
        try:
            version = raw.pop("format_version")
            if version != FORMAT_VERSION:
                raise ValueError(f"format version {version!r} is not {FORMAT_VERSION}")
            record = typed(raw, _Record, str(folder / REPAIR_FILE))
            named = {f"{cut.layer}.{cut.linear}": cut.layer for cut in record.cuts if cut.ridge is not None}
            with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
                weights = {named[name]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            repair = cls(weights=weights, **vars(record))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{folder} does not hold a usable repair: {error}.", hint="Fit the repair again."
            ) from error
        if not all(bool(torch.isfinite(w).all()) for w in repair.weights.values()):
            raise IntegrityError(f"The repair in {folder} holds NaN or Inf.", hint="Fit the repair again.")
        return repair


def places_of(plan: PruningPlan, kind: str) -> list[tuple[int, tuple[int, ...]]]:
    """The kept layers that a repair refits, from input to output: (layer, the run removed behind it).

    Those before a cut; "layer_wise" also every one behind the first cut, with () for its run.
    """
    gone = set(plan.pruned)
    first = min(gone, default=plan.num_layers) if kind == "layer_wise" else plan.num_layers
    runs = ((layer, tuple(takewhile(gone.__contains__, count(layer + 1)))) for layer in plan.keep)
    return [(layer, run) for layer, run in runs if run or layer > first]


def unrepaired(plan: PruningPlan) -> Sequence[int]:
    """The layers that go at the very input, before which there is nothing to refit."""
    return [layer for layer in plan.pruned if all(before in plan.pruned for before in range(layer))]
