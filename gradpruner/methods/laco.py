"""LaCo: merges runs of layers into their first layer where this hardly changes the model's last state."""

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

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.common.printing import runs_of
from gradpruner.common.progress import Progress
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.calibration import calibration_batches, check_finite
from gradpruner.models.config_patch import required_layers
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.merging import Source, merge_linear

BISECTIONS = 12
"""Thresholds to try: the chosen one is within 2 / 2**12 of the highest threshold that meets the budget."""

Merge = tuple[int, tuple[int, ...]]  # the layer that stays, and the layers merged into it
Linears = Mapping[str, Tensor]


class LacoOptions(MethodOptions):
    """Options of LaCo's search."""

    merge_layers: int = Field(default=4, ge=2)
    """Number of layers that a merge turns into one (C)."""
    interval: int = Field(default=2, ge=1)
    """How many layers below an accepted merge the next one is tried (I)."""
    num_samples: int = Field(default=10, ge=1)
    """Training samples candidates are compared with the original model on."""


@torch.no_grad()
def plan_laco(context: MethodContext, name: str) -> PruningPlan:
    """Goes down the layers and merges runs of them, at the highest threshold that meets the budget.

    A merge puts the C - 1 layers after layer l into layer l, `laco` as in the paper and `laco_released` as in
    the authors' code:

        laco:          W_l + sum_k (W_{l+k} - W_l)
        laco_released: W_{l+C-1}

    for every linear; biases and norms of layer l stay. The search begins C layers before the last layer. A
    candidate is accepted if `s > T`, where s is the mean over samples of the cosine between the last hidden
    states of candidate and original (after the final norm, all tokens of a sample as one vector). The next
    candidate is then I layers further down; after a rejected one it is one layer further down. With I below
    C, as by default, a merge mostly takes in the result of an earlier merge: the plan is a chain (see
    `PruningPlan`).

    The number of layers to prune is given, so T is found by bisection, and the last merge takes only as many
    layers as the budget still needs. A layer takes in the layers that follow it, up to the first one that is
    protected or has other shapes. (Protected layers take in others, but are never merged away.) The model is
    not copied: while the states of a candidate are computed, its linears replace those of the model, and the
    layers merged away are switched off.

    Work: at most one pass of `num_samples` samples per layer and threshold (12 thresholds); no candidate is
    measured twice. Memory beyond the model: the linears of the merged layers, and the last states of the
    original model on the CPU.

    Raises:
        PlanError: If merges cannot meet the budget, or no merges found leave layers that fit.
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
            hint="Use a method that drops layers.",
        )
    num_layers = view.num_layers
    budget = context.checked_num_prune()
    protected = {*context.protected, *required_layers(view.config, view.family)}
    runs = _Runs(view, options, budget, protected)
    evidence: dict[str, Any] = {"num_layers": num_layers, "model": fingerprint(view.model)}
    merges: tuple[Merge, ...] = ()
    if budget:
        similarity = _Similarity(view, name, context, options.num_samples)
        merges, threshold = _search(runs, similarity, context, name)
        evidence |= similarity.facts(merges) | {"threshold": threshold}
    actions = [LayerAction("keep")] * num_layers
    for target, layers in merges:
        for layer in layers:
            actions[layer] = LayerAction("merge", target)
    return PruningPlan(tuple(actions), name, 1.0, name, evidence)


def _search(
    runs: _Runs, similarity: _Similarity, context: MethodContext, name: str
) -> tuple[tuple[Merge, ...], float | None]:
    """Returns merges that remove exactly the budget, and their threshold; None if all candidates pass."""
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
                f"LaCo was asked to remove {runs.budget} layers and can remove {runs.budget - missing}.",
                hint="Raise methods.laco.merge_layers, lower methods.laco.interval, or protect fewer layers.",
            )
        best: tuple[tuple[Merge, ...], float | None] | None = (merges, None) if stands(merges) else None
        low, high = -1.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            merges = runs.sweep(partial(similarity.is_above, middle))
            progress.advance()
            if runs.missing(merges):
                high = middle
                continue
            low = middle
            if stands(merges):
                best = (merges, middle)
    if best is None:
        raise PlanError(
            f"The layers LaCo leaves ({runs_of(left_over(merges))}) do not fit at their new positions.",
            hint="Prune another number of layers, or drop the restriction (plan.portable_to).",
        )
    return best


class _Runs:
    """Which runs of layers are candidates, and in which order, to remove `budget` layers."""

    def __init__(self, view: LayeredModel, options: LacoOptions, budget: int, protected: set[int]) -> None:
        self.options, self.budget, self.protected = options, budget, protected
        self.num_layers = view.num_layers
        self.shapes = [
            {name: weight.shape for name, weight in view.weights(layer).items()}
            for layer in range(view.num_layers)
        ]

    def missing(self, merges: Sequence[Merge]) -> int:
        """Returns how many layers must still be removed."""
        return self.budget - sum(len(layers) for _, layers in merges)

    def sweep(self, accepts: Callable[[tuple[Merge, ...]], bool]) -> tuple[Merge, ...]:
        """Returns the merges of one pass down the layers, from the last; each layer is a target at most once.

        Args:
            accepts: Called with the merges so far and one more; returns whether to make the new one.
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
        """Returns the layers to merge into a target; all layers before the target are still present."""
        followers: list[int] = []
        for layer in present[target + 1 : target + min(self.options.merge_layers, 1 + most)]:
            if layer in self.protected or self.shapes[layer] != self.shapes[target]:
                break
            followers.append(layer)
        return tuple(followers)


class _Similarity:
    """Similarity of merged models to the original; remembers all results.

    The original model in `view` is the same to the bit after every measurement.
    """

    def __init__(self, view: LayeredModel, rule: str, context: MethodContext, num_samples: int) -> None:
        self.view, self.rule = view, rule
        self.batches = list(calibration_batches(context, view.model, num_samples))
        self.original = self._states()
        check_finite("The last hidden states of the training samples", *self.original)
        self.measured: dict[tuple[Merge, ...], float] = {}
        self._latest: tuple[tuple[Merge, ...], dict[int, Linears]] = ((), {})

    def of(self, merges: tuple[Merge, ...]) -> float:
        """Returns the mean over samples of the cosine between last states, from -1 to 1."""
        if merges not in self.measured:
            weights = self._merged(self._linears_after(merges[:-1]), merges[-1])
            gone = [layer for _, layers in merges for layer in layers]
            with _replaced(self.view, weights), self.view.passed_through(gone):
                states = self._states()
            cosines = [_cosine(a, b) for a, b in zip(states, self.original, strict=True)]
            mean = math.fsum(cosines) / len(cosines)
            # Merged weights that overflow count as least similar.
            self.measured[merges] = mean if math.isfinite(mean) else -1.0
        return self.measured[merges]

    def is_above(self, threshold: float, merges: tuple[Merge, ...]) -> bool:
        """Whether the similarity is above a threshold."""
        return self.of(merges) > threshold

    def facts(self, merges: tuple[Merge, ...]) -> dict[str, Any]:
        """Returns the measurements, as JSON values."""
        return {
            "samples": len(self.original),
            "merges": [
                {"into": target, "layers": list(layers), "similarity": self.of(merges[: i + 1])}
                for i, (target, layers) in enumerate(merges)
            ],
            "candidates": len(self.measured),
        }

    def _states(self) -> list[Tensor]:
        """Returns the last state of every sample, all its tokens as one vector, on the CPU."""
        found: list[Tensor] = []
        for batch in self.batches:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            out = self.view.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            last = getattr(out, "last_hidden_state", None)
            if last is None:
                kind = type(self.view.model).__name__
                raise ModelError(
                    f"LaCo compares last hidden states, and {kind} returns none.",
                    hint="Use another method, such as shortgpt or gradpruner.",
                )
            found += [state[real].flatten().cpu() for state, real in zip(last, mask.bool(), strict=True)]
        return found

    def _linears_after(self, merges: tuple[Merge, ...]) -> dict[int, Linears]:
        """Returns the linears of the layers that have taken in others and have not been merged away."""
        if not merges:
            return {}
        if self._latest[0] != merges:
            self._latest = merges, self._merged(self._linears_after(merges[:-1]), merges[-1])
        return self._latest[1]

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
def _replaced(view: LayeredModel, weights: Mapping[int, Linears]) -> Iterator[None]:
    """Inside the block, layers compute with other linears; their own weights are not changed."""
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
        "LaCo: merges runs of layers into their first layer, by the paper's rule",
        plan=partial(plan_laco, name="laco"),
        options=LacoOptions,
        label="LaCo",
    )
)
METHODS.register("laco_released")(
    Method(
        "LaCo as released: merges runs of layers, keeping the linears of the last layer",
        plan=partial(plan_laco, name="laco_released"),
        options=LacoOptions,
        label="LaCo, as released",
    )
)
