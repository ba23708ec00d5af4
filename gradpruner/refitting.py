"""Fitting a repair: one linear before every cut, by least squares on hidden states of the task's own samples.

Dense and pruned model walk side by side through the layers (`walking.Walk`): at a cut the dense one goes on
through the layers that go, and the kept layer before them is refitted so that the pruned one hands on what
the dense one does. Each cut is fitted on what the pruned model itself computes up to there, repairs before
it included. No label is looked at.

Shape suffixes: T tokens, D hidden size, P regressors (in_features of the refitted linear, or D).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.errors import NonFiniteError, PlanError
from gradpruner.layered import LayeredModel, fingerprint
from gradpruner.plan import PruningPlan, runs_of
from gradpruner.repair import Repair, RepairedCut, check_kind, cuts_of, unrepaired
from gradpruner.surgery import check_alike, check_trace, merge_planned, shapes_of
from gradpruner.trace import QUANTISED, GradientTrace
from gradpruner.walking import BATCH_SIZE, Walk, drawn, output_linear, sample_batches

RIDGES = (0.01, 0.1, 1.0, 10.0)
HELD_OUT = 5
"""One sample in so many is not fitted on: the ridge is chosen by it."""
MAX_REGRESSORS = 16_384
"""Largest least-squares system: four matrices of 2 GB in float64. Above it the linear form is fitted."""
TOKENS_PER_REGRESSOR = 10


@dataclass
class Sums:
    """Weighted sums over tokens of everything a ridge regression needs, in float64.

    Attributes:
        gram_PP: sum of w x x^T.
        cross_DP: sum of w r x^T, r what is missing in the residual stream.
        energy: sum of w |r|^2.
        tokens: How many.
    """

    gram_PP: Tensor
    cross_DP: Tensor
    energy: float = 0.0
    tokens: int = 0

    @classmethod
    def empty(cls, regressors: int, outputs: int, device: torch.device) -> Sums:
        """No tokens yet."""
        zeros = {"dtype": torch.float64, "device": device}
        return cls(torch.zeros(regressors, regressors, **zeros), torch.zeros(outputs, regressors, **zeros))  # type: ignore[call-overload]

    def add(self, x_TP: Tensor, missing_TD: Tensor, weight_T: Tensor) -> None:
        """Takes in tokens: regressors, what is missing, and how much each counts."""
        root_T1 = weight_T.sqrt()[:, None]
        x_TP, missing_TD = x_TP * root_T1, missing_TD * root_T1
        self.gram_PP.addmm_(x_TP.T, x_TP)
        self.cross_DP.addmm_(missing_TD.T, x_TP)
        self.energy += float(missing_TD.square().sum())
        self.tokens += len(x_TP)

    def error(self, update_DP: Tensor | None) -> float:
        """Mean weighted |r - U x|^2 over the tokens; |r|^2 without an update."""
        if update_DP is None:
            return self.energy / max(1, self.tokens)
        explained = 2 * float((update_DP * self.cross_DP).sum())
        own = float(((update_DP @ self.gram_PP) * update_DP).sum())
        return max(0.0, self.energy - explained + own) / max(1, self.tokens)


def ridge_update(sums: Sums, ridge: float) -> Tensor:
    """`U = argmin sum w |r - U x|^2 + rho |U|^2`, shape (D, P), float64: U = C (G + rho I)^-1.

    Args:
        sums: Of the tokens that are fitted.
        ridge: rho in units of the mean diagonal of G, > 0. As it grows U goes to 0: the old weights.
    """
    system = sums.gram_PP.clone()
    diagonal = system.diagonal()
    diagonal += ridge * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(system)
    return torch.cholesky_solve(sums.cross_DP.T, factor).T


def choose_update(
    fitted: Sums, held_out: Sums, ridges: Sequence[float] = RIDGES
) -> tuple[float | None, float]:
    """The ridge that is best on tokens that were not fitted on, and the error there.

    Returns:
        (None, the error without an update) when no ridge lowers it.
    """
    found = [(held_out.error(ridge_update(fitted, ridge)), ridge) for ridge in ridges]
    error, ridge = min(found)
    before = held_out.error(None)
    return (ridge, error) if error < before else (None, before)


@torch.no_grad()
def fit_repair(
    model: nn.Module,
    plan: PruningPlan,
    samples: Sequence[dict[str, list[int]]],
    collator: Callable[[Any], dict[str, Tensor]],
    *,
    kind: str = "least_squares",
    rows: int = 512,
    trace: GradientTrace | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Repair:
    """Fits what the kept layers before the cuts must add so that the layers that go are missed least.

    For a run of layers that goes behind a kept layer, with A the input of that layer's last linear W in the
    pruned model, y what the layer hands on, h what the dense model hands on after the run, and w = 1 / |h|^2
    (so that tokens with massive activations do not decide):

        least_squares   W' = W + argmin_U sum w |h - y - U A|^2 + rho |U|^2
        linear          W' = (I + U) W,  U of the regression on W A instead of A (ReplaceMe's map)

    The ridge rho is chosen on samples that are not fitted on, then all are fitted. Where no ridge helps
    there, the linear stays as it is, so that the error on held-out tokens never rises.

    Cost: about two forward passes over the samples, whatever the number of cuts, and one solve per cut.
    Memory beyond the model: the hidden states of all tokens twice, and four P x P matrices of float64, with
    P = in_features (least_squares, at most `MAX_REGRESSORS`, else linear is fitted) or the hidden size.

    Args:
        model: The dense causal LM, without adapters; not changed.
        plan: Which layers go; merged ones are merged first, which needs the trace where the rule does.
        samples: Encoded samples (`input_ids`, `labels`); labels are not looked at.
        collator: Makes padded batches of them.
        kind: "linear" or "least_squares".
        rows: Samples used at most, >= 2.
        trace: The recorded gradients, for a plan that merges by them.
        seed: Of drawing the samples.
        progress: Called with 1 after every layer.

    Raises:
        ConfigError: If the kind is unknown.
        PlanError: If the plan is for another model, or the model is quantised.
        ModelError: If the layers cannot be refitted: a norm follows the last linear, or it is one of experts.
        DataError: If there are no samples.
        NonFiniteError: If hidden states are NaN or infinite.

    Source: ReplaceMe (Shopkhoev et al., 2025), linear transform; its closed form carried over to the linear
    itself.
    """
    check_kind(kind)
    started = time.perf_counter()
    view = LayeredModel(model)
    _check(view, plan, trace)
    device = next(model.parameters()).device
    chosen = drawn(samples, max(2, rows), seed)
    batches = list(sample_batches(chosen, collator, device, BATCH_SIZE))
    was_training = model.training
    model.eval()
    try:
        walk = Walk(view, batches)
        fitting = _Fitting(view, plan, walk, kind, trace)
        fitting.go(progress)
    finally:
        model.train(was_training)
    tokens = sum(int(counted.sum()) for counted in walk.counted)
    return Repair(
        kind=kind,
        pruned=plan.pruned,
        cuts=tuple(fitting.cuts),
        weights=fitting.weights,
        model=fingerprint(model),
        rows=len(chosen),
        tokens=tokens,
        seconds=time.perf_counter() - started,
        notes=tuple(dict.fromkeys(fitting.notes)),
    )


def _check(view: LayeredModel, plan: PruningPlan, trace: GradientTrace | None) -> None:
    identity = fingerprint(view.model)
    if identity.endswith(QUANTISED):
        raise PlanError(
            "The model is quantised; its linears cannot be refitted.",
            hint="Use plan.repair: none, or the unquantised model.",
        )
    plan.check_model(view.num_layers, identity)
    if not plan.merged:
        return
    shapes = shapes_of(view)
    if plan.needs_trace:
        check_trace(plan, trace, shapes, identity)
    else:
        check_alike(plan, shapes)


class _Fitting:
    """One walk from input to output: dense states and pruned states, and what was fitted on the way."""

    def __init__(
        self, view: LayeredModel, plan: PruningPlan, walk: Walk, kind: str, trace: GradientTrace | None
    ) -> None:
        self.view, self.plan, self.walk, self.kind, self.trace = view, plan, walk, kind, trace
        self.cuts: list[RepairedCut] = []
        self.weights: dict[int, Tensor] = {}
        self.notes: list[str] = []
        if unrepaired(plan):
            self.notes.append(
                f"layers {runs_of(unrepaired(plan))} go at the input, where no layer is left to repair"
            )

    def go(self, progress: Callable[[int], None] | None) -> None:
        """Takes both states through all layers up to the last cut."""
        runs = dict(cuts_of(self.plan))
        dense, pruned = self.walk.start, self.walk.start
        last = max((run[-1] for run in runs.values()), default=-1)
        layer = 0
        while layer <= last:
            run = runs.get(layer, ())
            behind = self.walk.layer(layer, dense)
            for gone in run:
                behind = self.walk.layer(gone, behind)
            if layer in self.plan.keep:
                alike = pruned is dense and not run and layer not in self.plan.merged
                pruned = behind if alike else self._kept(layer, run, pruned, behind)
            dense = behind
            layer += 1 + len(run)
            if progress is not None:
                progress(1 + len(run))

    def _kept(
        self, layer: int, run: tuple[int, ...], pruned: list[Tensor], dense: list[Tensor]
    ) -> list[Tensor]:
        """The pruned model's states after a kept layer, which is refitted first if a run goes behind it."""
        with self._merged(layer):
            if not run:
                return self.walk.layer(layer, pruned)
            name, factor = output_linear(self.view, self.walk, layer, pruned[0])
            weight = self.view.weights(layer)[name]
            fitted, held_out = self._sums(layer, name, factor, pruned, dense)
            before = held_out.error(None)
            ridge, after = choose_update(fitted, held_out)
            self.cuts.append(RepairedCut(layer, name, run, ridge, before, after))
            if ridge is None:
                return self.walk.layer(layer, pruned)
            update = ridge_update(_both(fitted, held_out), ridge).to(weight.device)
            old = weight.detach().double()
            new = old + (update @ old if self._is_linear(old) else update)
            if not bool(torch.isfinite(new).all()):
                raise NonFiniteError(
                    f"Refitting '{name}' of layer {layer} gives NaN or Inf.",
                    hint="The model's number format is too narrow: try float32.",
                )
            self.weights[layer] = new.float().cpu()
            with _weight_of(weight, new):
                return self.walk.layer(layer, pruned)

    def _is_linear(self, weight: Tensor) -> bool:
        """Whether the map of the linear form is fitted, also because the other system would be too large."""
        too_large = weight.shape[1] > MAX_REGRESSORS
        if too_large and self.kind == "least_squares":
            self.notes.append(
                f"the linear form was fitted, because {weight.shape[1]} regressors are more than "
                f"{MAX_REGRESSORS}"
            )
        return self.kind == "linear" or too_large

    def _sums(
        self, layer: int, name: str, factor: float, pruned: list[Tensor], dense: list[Tensor]
    ) -> tuple[Sums, Sums]:
        """Sums over the tokens that are fitted and over those held out, from one run of the layer."""
        module = self.view.linears(layer)[name]
        weight = self.view.weights(layer)[name].detach()
        linear = self._is_linear(weight)
        regressors = weight.shape[0] if linear else weight.shape[1]
        sums = [Sums.empty(regressors, weight.shape[0], _sums_device(weight)) for _ in range(2)]
        caught: dict[str, Tensor] = {}
        hook = module.register_forward_pre_hook(lambda _, args: caught.update(given=args[0]))
        number = 0  # of the sample, over all batches
        try:
            for batch, state in enumerate(pruned):
                handed = self.walk.layer_on(layer, batch, state)
                counted = self.walk.counted[batch]
                numbers = torch.arange(number, number + len(counted)).to(counted.device)
                is_held_out = (numbers % HELD_OUT == 0)[:, None].expand_as(counted)
                for part, chosen in zip(sums, (counted & ~is_held_out, counted & is_held_out), strict=True):
                    device = part.gram_PP.device
                    target = dense[batch][chosen].to(device, torch.float64)
                    missing = (target - handed[chosen].to(device, torch.float64)) / factor
                    given = caught["given"].view(*handed.shape[:2], -1)[chosen].to(device, torch.float64)
                    x = given @ weight.to(device, torch.float64).T if linear else given
                    part.add(x, missing, 1 / target.square().sum(dim=1).clamp_min(1e-12))
                number += len(counted)
        finally:
            hook.remove()
        tokens = sums[0].tokens + sums[1].tokens
        if tokens < TOKENS_PER_REGRESSOR * regressors:
            self.notes.append(
                f"{tokens} tokens for {regressors} regressors; at least "
                f"{TOKENS_PER_REGRESSOR * regressors} determine the repair better"
            )
        return sums[0], sums[1]

    @contextmanager
    def _merged(self, layer: int) -> Iterator[None]:
        """While it lasts, a kept layer has taken in those that the plan merges into it."""
        if layer not in self.plan.merged:
            yield
            return
        originals = {name: weight.clone() for name, weight in self.view.weights(layer).items()}
        try:
            for name, weight in self.view.weights(layer).items():
                weight.copy_(self._taken_in(layer, name))
            yield
        finally:
            for name, weight in self.view.weights(layer).items():
                weight.copy_(originals[name])

    def _taken_in(self, target: int, name: str) -> Tensor:
        """One linear of a layer with everything the plan merges into it, chains included."""

        def weight(layer: int) -> Tensor:
            if layer != target and layer in self.plan.merged:
                return self._taken_in(layer, name)
            return self.view.weights(layer)[name]

        return merge_planned(self.plan, self.trace, target, name, weight)


def _both(one: Sums, other: Sums) -> Sums:
    return Sums(
        one.gram_PP + other.gram_PP,
        one.cross_DP + other.cross_DP,
        one.energy + other.energy,
        one.tokens + other.tokens,
    )


def _sums_device(weight: Tensor) -> torch.device:
    return torch.device("cpu") if weight.device.type == "mps" else weight.device  # no double precision there


@contextmanager
def _weight_of(weight: Tensor, new: Tensor) -> Iterator[None]:
    """While it lasts, a weight has other numbers."""
    original = weight.clone()
    weight.copy_(new)
    try:
        yield
    finally:
        weight.copy_(original)
