"""Options of `plan_pruning`, of which the recipe's plan section is made, and of `fit_repair`.

Importing them imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gradpruner.common.options import Section

RepairKind = Literal["none", "linear", "least_squares", "layer_wise"]
"""What a repair refits; the one list of kinds. `places_of` and `fit_repair` carry them out."""
DENSITY = 0.2
"""Fraction of a merged layer's entries that is kept. The paper calls 0.2 "80 % sparsity"."""
BUDGETS = ("num_prune", "layer_fraction", "parameter_fraction", "layers", "max_loss")
"""Options that say how much to prune; at most one is given. max_loss is the recipe's alone."""


class PlanOptions(Section):
    """How many layers are pruned, which are protected, and how merged layers are combined."""

    num_prune: int | None = Field(default=None, ge=0)
    """Layers to prune. Give one budget only; the default is 40 % of the layers."""
    layer_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of the layers to prune."""
    parameter_fraction: float | None = Field(default=None, ge=0, lt=1)
    """Fraction of all parameters to remove."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Prune exactly these layers."""
    num_merge: int = Field(default=3, ge=0)
    """How many of the pruned layers are merged instead of dropped: those with the highest scores."""
    protect_first: int = Field(default=1, ge=0)
    """Layers at the input that are never pruned; 1 by default, so that every merged layer has a layer before
    it."""
    protect_last: int = Field(default=0, ge=0)
    """Layers at the output that are never pruned."""
    protect: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list)
    """Further layers that are never pruned."""
    contiguous: bool = False
    """Prune one block of adjacent layers: the one with the lowest total score, on a tie the latest."""
    target: Literal["preceding", "nearest"] = "preceding"
    """The kept layer that a merged layer goes into: the nearest one before it (as in the paper), or the
    nearest on either side, on a tie the earlier one."""
    rule: str = "sum"
    """Combine rule, a name in `merging.MERGE_RULES`."""
    density: float = Field(default=DENSITY, gt=0, le=1)
    """Fraction of a merged layer's entries kept; 0.2 is the paper's 80 % sparsity."""

    @model_validator(mode="after")
    def _one_budget(self) -> PlanOptions:
        given = [name for name in BUDGETS if getattr(self, name, None) is not None]
        if len(given) > 1:
            kind = "both" if len(given) == 2 else "all"
            raise ValueError(f"{' and '.join(given)} are {kind} budgets; give one")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise ValueError("layers lists a layer more than once")
        return self


class RepairOptions(Section):
    """How a repair is fitted."""

    kind: RepairKind = "least_squares"
    """What is refitted, see `fit_repair`; none only stands for a run without a repair."""
    rows: int | None = Field(default=None, ge=2)
    """Most samples it is fitted on; null: as many as `enough_rows` returns."""
    tokens_per_unknown: int = Field(default=20, ge=1)
    """Tokens for each unknown that determine the fit: `enough_rows` counts on as many, and a fit on fewer
    notes it. A model that is trained afterwards needs less, see docs/quality.md."""
    answers: float = Field(default=0.8, ge=0, lt=1)
    """Share of the weight that tokens get by how much the answer depends on them; see `influences` in
    `pruning.repair.tokens` and docs/quality.md. Often few tokens decide it. 0: all count equally."""
    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.01, 0.1, 1.0, 10.0), min_length=1)
    """Values of rho to try, in units of the mean diagonal of the regressors' second moments."""
    seed: int = 0
    """Seeds the choice of samples."""
