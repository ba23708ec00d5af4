"""LaCo: runs of layers collapse into their first one, where the model's last state hardly notices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradpruner.common.errors import ModelError, NonFiniteError, PlanError
from gradpruner.common.progress import Progress
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import calibration_batches
from gradpruner.models.config_patch import required_layers
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.plans.layer_plan import LayerAction, PruningPlan, runs_of
from gradpruner.plans.merging import Source, merge_linear

BISECTIONS = 12
"""Thresholds tried: the one that is taken is within 2 / 2**12 of the highest that reaches the budget."""

Merge = tuple[int, tuple[int, ...]]  # the layer that stays, and those that go into it
Linears = Mapping[str, Tensor]


class LacoOptions(MethodOptions):
    """What can be set about LaCo's search."""

    merge_layers: int = Field(default=4, ge=2)
    """Layers that become one in a merge (C)."""
    interval: int = Field(default=2, ge=1)
    """How many layers below an accepted merge the next one is tried (I)."""
    num_samples: int = Field(default=10, ge=1)
    """Training samples on which candidates are compared with the original model."""


@torch.no_grad()
def plan_laco(context: MethodContext, name: str) -> PruningPlan:
    """Goes down the layers and collapses runs of them, at the highest threshold that reaches the budget.

    A merge puts the C - 1 layers after layer l into it, `laco` as the paper says and `laco_released` as the
    authors' code does:

        laco:          W_l + sum_k (W_{l+k} - W_l)
        laco_released: W_{l+C-1}

    for every linear; biases and norms of layer l stay. The search begins C layers before the last one. A
    candidate is accepted if `s > T`, s the mean over samples of the cosine between the last hidden states
    (after the final norm, all tokens of a sample as one vector) of candidate and original; then the next
    candidate is I layers further down, else one. Since I is below C, what one merge made is mostly among the
    layers of the next: the plan is a chain (see `PruningPlan`).

    The number of layers to prune is given, so T is found by bisection, and the merge that reaches the budget
    takes only as many layers as are missing. A layer takes in those that follow it up to the first that is
    protected or of another shape (protected layers take in others, but never go). No copy of the model is
    made: the linears of a candidate replace those of the model while its states are computed, and the
    layers that went are switched off.

    Work: at most one pass of `num_samples` samples per layer and threshold (12 of these); no candidate is
    measured twice. Memory: beside the model the linears of the merged layers, and the original's last states
    on the CPU.

    Raises:
        PlanError: If merges cannot reach the budget, or none found leaves layers that fit.
        ModelError: If the model's layers can only be dropped.
        NonFiniteError: If the model computes NaN or infinite states.

    Source: LaCo: Large Language Model Pruning via Layer Collapse (Yang et al., 2024).
    """
    options = context.options or LacoOptions()
    view = LayeredModel(context.floating_model())
    if view.family.no_merge:
        raise ModelError(
            f"LaCo merges layers, but those of {view.config.model_type} models can only be dropped: "
            f"{view.family.no_merge}.",
            hint="Take a method that drops layers.",
        )
    num_layers = view.num_layers
    budget = num_layers - context.kept()
    protected = {*context.protected, *required_layers(view.config, view.family)}
    runs = _Runs(view, options, budget, protected)
    evidence: dict[str, Any] = {"num_layers": num_layers, "model": fingerprint(view.model)}
    merges: tuple[Merge, ...] = ()
    if budget:
        likeness = _Likeness(view, name, context, options.num_samples)
        merges, threshold = _search(runs, likeness, context, name)
        evidence |= likeness.facts(merges) | {"threshold": threshold}
    actions = [LayerAction("keep")] * num_layers
    for target, layers in merges:
        for layer in layers:
            actions[layer] = LayerAction("merge", target)
    return PruningPlan(tuple(actions), name, 1.0, name, evidence)


def _search(
    runs: _Runs, likeness: _Likeness, context: MethodContext, name: str
) -> tuple[tuple[Merge, ...], float | None]:
    """Merges that remove exactly the budget, and their threshold; None: every candidate is accepted."""
    fits = context.fits

    def left_over(merges: Sequence[Merge]) -> list[int]:
        gone = {layer for _, layers in merges for layer in layers}
        return [layer for layer in range(context.num_layers) if layer not in gone]

    def stands(merges: Sequence[Merge]) -> bool:
        kept = left_over(merges)
        return fits is None or all(fits(old, new, len(kept)) for new, old in enumerate(kept))

    with Progress(1 + BISECTIONS, f"plan {name}") as progress:
        merges = runs.sweep(lambda _: True)
        progress.advance()
        if missing := runs.missing(merges):
            raise PlanError(
                f"LaCo can remove {runs.budget - missing} of the {runs.budget} layers that are to go.",
                hint="Merge more layers at a time (merge_layers), in shorter steps (interval), or protect "
                "fewer.",
            )
        best: tuple[tuple[Merge, ...], float | None] | None = (merges, None) if stands(merges) else None
        low, high = -1.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            merges = runs.sweep(partial(likeness.is_above, middle))
            progress.advance()
            if runs.missing(merges):
                high = middle
                continue
            low = middle
            if stands(merges):
                best = (merges, middle)
    if best is None:
        raise PlanError(
            f"The layers LaCo leaves ({runs_of(left_over(merges))}) would stand where they do not fit.",
            hint="Prune another number of layers, or plan without the restriction (portable_to).",
        )
    return best


class _Runs:
    """Which runs of layers are candidates, in which order, when `budget` layers are to go."""

    def __init__(self, view: LayeredModel, options: LacoOptions, budget: int, protected: set[int]) -> None:
        self.options, self.budget, self.protected = options, budget, protected
        self.num_layers = view.num_layers
        self.shapes = [
            {name: weight.shape for name, weight in view.weights(layer).items()}
            for layer in range(view.num_layers)
        ]

    def missing(self, merges: Sequence[Merge]) -> int:
        """Layers that are still to go."""
        return self.budget - sum(len(layers) for _, layers in merges)

    def sweep(self, accepts: Callable[[tuple[Merge, ...]], bool]) -> tuple[Merge, ...]:
        """The merges of one way down the layers, the last layers' first; no layer takes in others twice.

        Args:
            accepts: Is given the merges so far with one more, and says whether it is made.
        """
        merges: tuple[Merge, ...] = ()
        present = list(range(self.num_layers))
        target: int | None = max(0, self.num_layers - 1 - self.options.merge_layers)
        while target is not None and self.missing(merges):
            followers = self._followers(present, target, self.missing(merges))
            accepted = bool(followers) and accepts((*merges, (target, followers)))
            if accepted:
                merges = (*merges, (target, followers))
                present = [layer for layer in present if layer not in followers]
            below = target - (self.options.interval if accepted else 1)
            target = max(0, below) if target else None
        return merges

    def _followers(self, present: Sequence[int], target: int, most: int) -> tuple[int, ...]:
        """The layers that go into a target, of which nothing before it has changed yet."""
        followers: list[int] = []
        for layer in present[target + 1 : target + min(self.options.merge_layers, 1 + most)]:
            if layer in self.protected or self.shapes[layer] != self.shapes[target]:
                break
            followers.append(layer)
        return tuple(followers)


class _Likeness:
    """How like the original a model is after some merges; remembers what it has measured.

    The original model in `view` is the same to the bit after every measurement.
    """

    def __init__(self, view: LayeredModel, rule: str, context: MethodContext, num_samples: int) -> None:
        self.view, self.rule = view, rule
        self.batches = list(calibration_batches(context, view.model, num_samples))
        self.original = self._states()
        if not all(bool(torch.isfinite(state).all()) for state in self.original):
            raise NonFiniteError(
                "The last hidden states of the training samples are NaN or infinite.",
                hint="The model's number format is too narrow: try float32.",
            )
        self.measured: dict[tuple[Merge, ...], float] = {}
        self._done: tuple[tuple[Merge, ...], dict[int, Linears]] = ((), {})

    def of(self, merges: tuple[Merge, ...]) -> float:
        """Mean over samples of the cosine between last states, from -1 to 1."""
        if merges not in self.measured:
            weights = self._merged(self._carried_out(merges[:-1]), merges[-1])
            gone = [layer for _, layers in merges for layer in layers]
            with _standing_in(self.view, weights), self.view.passed_through(gone):
                states = self._states()
            cosines = [_cosine(a, b) for a, b in zip(states, self.original, strict=True)]
            mean = math.fsum(cosines) / len(cosines)
            # Weights that overflow are as far from the original as can be.
            self.measured[merges] = mean if math.isfinite(mean) else -1.0
        return self.measured[merges]

    def is_above(self, threshold: float, merges: tuple[Merge, ...]) -> bool:
        """Whether the cosine is above a threshold."""
        return self.of(merges) > threshold

    def facts(self, merges: tuple[Merge, ...]) -> dict[str, Any]:
        """What was measured, as JSON values."""
        return {
            "samples": len(self.original),
            "merges": [
                {"into": target, "layers": list(layers), "similarity": self.of(merges[: i + 1])}
                for i, (target, layers) in enumerate(merges)
            ],
            "candidates": len(self.measured),
        }

    def _states(self) -> list[Tensor]:
        """Last state of every sample, its tokens in one vector, on the CPU."""
        found: list[Tensor] = []
        for batch in self.batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            out = self.view.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            last = getattr(out, "last_hidden_state", None)
            if last is None:
                kind = type(self.view.model).__name__
                raise ModelError(f"LaCo compares last hidden states, and {kind} gives none.")
            found += [state[real].flatten().cpu() for state, real in zip(last, mask.bool(), strict=True)]
        return found

    def _carried_out(self, merges: tuple[Merge, ...]) -> dict[int, Linears]:
        """Linears of the layers that have taken in others and are still there."""
        if not merges:
            return {}
        if self._done[0] != merges:
            self._done = merges, self._merged(self._carried_out(merges[:-1]), merges[-1])
        return self._done[1]

    def _merged(self, weights: dict[int, Linears], merge: Merge) -> dict[int, Linears]:
        target, layers = merge
        sources = [weights.get(layer) or self.view.weights(layer) for layer in layers]
        merged = {
            name: merge_linear(weight, [Source(source[name]) for source in sources], rule=self.rule)
            for name, weight in self.view.weights(target).items()
        }
        return {layer: kept for layer, kept in weights.items() if layer not in layers} | {target: merged}


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float(one @ other / (one.norm() * other.norm()))


@contextmanager
def _standing_in(view: LayeredModel, weights: Mapping[int, Linears]) -> Iterator[None]:
    """Inside the block, layers compute with other linears; their own are never touched."""
    own: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for layer, linears in weights.items():
            for name, module in view.linears(layer).items():
                parameter: Any = module.weight
                own.append((parameter, parameter.data))
                parameter.data = linears[name].T if isinstance(module, Conv1D) else linears[name]
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


METHODS.register("laco")(
    Method(
        "LaCo: runs of layers collapse into their first, by the paper's rule",
        plan=partial(plan_laco, name="laco"),
        options=LacoOptions,
        label="LaCo",
    )
)
METHODS.register("laco_released")(
    Method(
        "LaCo as released: of a run of layers the last one's linears stay",
        plan=partial(plan_laco, name="laco_released"),
        options=LacoOptions,
        label="LaCo, as released",
    )
)
