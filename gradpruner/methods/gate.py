"""Gate: prunes the layers that cost least to leave out, by derivatives of the task's loss."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Literal

import torch
from torch import Tensor

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import check_known
from gradpruner.gradients.gates import (
    bootstrap,
    first_order,
    predicted_rise,
    second_order,
)
from gradpruner.gradients.scores import LayerScores, default_num_prune, rank_stability
from gradpruner.gradients.trace import GradientTrace, trace_digest
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions

ORDERS = ("second", "first")
# Relative tolerance. A swap must lower the predicted rise by more than rounding can, or the search would swap
# between two equally good sets forever.
_ROUNDING = 1e-12


class GateOptions(MethodOptions):
    """Options of the gate scores."""

    order: Literal["second", "first"] = "second"
    """The score of a single layer: the mean square of its gate's gradient, or minus the mean."""
    pairwise: bool = False
    """Choose the layers as a set, by both derivatives and all pairs; `order` is then ignored."""


def score(context: MethodContext) -> LayerScores:
    """Scores layers by the gates in the recorded trace, see `score_gates`."""
    options = context.options or GateOptions()
    return score_gates(
        context.trace(),
        order=options.order,
        pairwise=options.pairwise,
        num_keep=context.num_keep,
        protected=context.protected,
        seed=context.seed,
    )


def score_gates(
    trace: GradientTrace,
    *,
    order: str = "second",
    pairwise: bool = False,
    num_keep: int | None = None,
    protected: Collection[int] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> LayerScores:
    """Scores layers by how much the loss is expected to rise when they are left out.

    With g_el the gradient of example e's loss with respect to a gate on what layer l adds:

        second:   mean_e g_el**2      (empirical Fisher)
        first:    -mean_e g_el
        pairwise: the set S of n layers that minimises -sum_l mean(g_l) + 1/2 sum_{l,m} mean(g_l g_m)

    The pairwise score of a layer outside S is the rise it would add to S; the score of a layer in S is the
    rise it contributes to S. If this does not put all layers of S first, the same amount is added to the
    scores of all others, so that the n lowest scores are S. A plan that prunes another number of layers than
    n, or must keep a layer of S, takes the next lowest scores. Pairwise scores have no interval; the others
    have one, over examples.

    Unlike energies (`score_layers`), gates are useful from the first step on, before LoRA has moved.

    Args:
        trace: A trace with gates.
        order: "second" or "first".
        pairwise: Choose the layers as a set.
        num_keep: Layers that will be kept; default 60 % of the depth.
        protected: Layers that must not be in the set.
        resamples: Bootstrap resamples of examples for the 95 % interval, >= 1.
        seed: Seed of the bootstrap.

    Returns:
        Scores with interval, stability curve and evidence (`examples`; pairwise also `chosen` and
        `predicted_rise`, in units of the loss).

    Raises:
        PlanError: If the trace holds no gates.
        ConfigError: If the order is unknown, or `num_keep` or `resamples` is out of range.
    """
    gates_EL = trace.gate_rows()
    num_layers = gates_EL.shape[1]
    keep = num_keep if num_keep is not None else num_layers - default_num_prune(num_layers)
    check_known("order", order, ORDERS)
    if resamples < 1 or not 1 <= keep <= num_layers:
        raise ConfigError(
            f"resamples is {resamples} and num_keep is {keep}; resamples must be at least 1, and num_keep "
            f"from 1 to {num_layers}."
        )
    evidence = {
        "num_layers": num_layers,
        "num_steps": trace.num_steps,
        "num_keep": keep,
        "examples": gates_EL.shape[0],
        "pairwise": pairwise,
        "model": trace.info.model,
        "trace": trace_digest(trace),
    }
    if pairwise:
        free = set(range(num_layers)) - set(protected)
        chosen = choose_pairwise(gates_EL, min(num_layers - keep, len(free)), free)
        evidence |= {"chosen": chosen, "predicted_rise": predicted_rise(gates_EL, chosen)}
        return LayerScores("gate", tuple(set_values(gates_EL, chosen)), evidence=evidence)
    evidence |= {"order": order, "resamples": resamples, "seed": seed}
    terms_EL = gates_EL.square() if order == "second" else -gates_EL
    values_L = second_order(gates_EL) if order == "second" else first_order(gates_EL)
    low_L, high_L = bootstrap(terms_EL, len(terms_EL), resamples, seed)
    return LayerScores(
        method="gate",
        values=tuple(values_L.tolist()),
        low=tuple(low_L.tolist()),
        high=tuple(high_L.tolist()),
        stability=rank_stability(_sums_of_steps(trace, terms_EL), keep),
        evidence=evidence,
    )


def choose_pairwise(gates_EL: Tensor, num_prune: int, candidates: Collection[int] | None = None) -> list[int]:
    """Chooses the layers whose joint removal is predicted to raise the loss least.

    The search runs once from every candidate. It adds the layer that raises the predicted loss least until
    `num_prune` layers are chosen. Then it swaps a chosen layer for another one, always making the swap that
    lowers the prediction most, until no swap helps. The best result of all runs is returned. No single swap
    improves it. It is usually the best set of all, but that is not guaranteed. On ties, the later layer is
    chosen.

    Args:
        gates_EL: Shape (examples, layers).
        num_prune: Number of layers to choose, from 0 to the number of candidates.
        candidates: Layers that may be chosen; None for all layers.

    Returns:
        The chosen layers, ascending.

    Raises:
        ConfigError: If there are fewer candidates than layers to choose.
    """
    gates_EL = gates_EL.double()
    free = sorted(range(gates_EL.shape[1]) if candidates is None else set(candidates), reverse=True)
    if not 0 <= num_prune <= len(free):
        raise ConfigError(f"{num_prune} layers cannot be chosen from {len(free)} candidates.")
    mean_L = -first_order(gates_EL)
    fisher_LL = gates_EL.T @ gates_EL / gates_EL.shape[0]
    best: list[int] = []
    lowest = math.inf
    tolerance = _ROUNDING * float(mean_L.abs().max() + fisher_LL.abs().max())
    for first in free if num_prune else ():
        chosen = _search(mean_L, fisher_LL, free, first, num_prune)
        rise = float(-mean_L[chosen].sum() + fisher_LL[chosen][:, chosen].sum() / 2)
        if rise < lowest - tolerance:
            best, lowest = chosen, rise
    return sorted(best)


def _search(mean_L: Tensor, fisher_LL: Tensor, free: list[int], first: int, num_prune: int) -> list[int]:
    """Grows a set from `first`, then swaps layers until no swap helps. `free` is in descending order."""
    chosen = [first]
    while len(chosen) < num_prune:
        added_L = -mean_L + fisher_LL.diagonal() / 2 + fisher_LL[:, chosen].sum(dim=1)
        left = [layer for layer in free if layer not in chosen]
        chosen.append(left[int(added_L[left].argmin())])  # on a tie the first, which is the latest layer
    while (swap := _best_swap(mean_L, fisher_LL, chosen, free)) is not None:
        chosen[chosen.index(swap[0])] = swap[1]
    return chosen


def _best_swap(
    mean_L: Tensor, fisher_LL: Tensor, chosen: list[int], free: list[int]
) -> tuple[int, int] | None:
    """Returns the swap (layer to remove, layer to add) that lowers the predicted rise most, or None."""
    inside, outside = sorted(chosen), [layer for layer in free if layer not in chosen]
    if not inside or not outside:
        return None
    slope_L = -mean_L + fisher_LL[:, inside].sum(dim=1)  # derivative of the rise by leaving each layer out
    half_L = fisher_LL.diagonal() / 2
    change = (slope_L + half_L)[outside] - (slope_L - half_L)[inside][:, None]
    change = change - fisher_LL[inside][:, outside]
    best = int(change.argmin())  # on a tie the first: the earliest layer is removed, the latest added
    scale = float(mean_L.abs().max() + fisher_LL.abs().max())
    if float(change.flatten()[best]) >= -_ROUNDING * scale:
        return None
    return inside[best // len(outside)], outside[best % len(outside)]


def set_values(gates_EL: Tensor, chosen: Collection[int]) -> list[float]:
    """Returns one value per layer; values of the chosen set are below all others, see `score_gates`."""
    inside = set(chosen)
    rise = predicted_rise(gates_EL, inside)
    layers = range(gates_EL.shape[1])
    values = [
        rise - predicted_rise(gates_EL, inside - {layer})
        if layer in inside
        else predicted_rise(gates_EL, inside | {layer}) - rise
        for layer in layers
    ]
    outside = [layer for layer in layers if layer not in inside]
    if not inside or not outside:
        return values
    highest = max(values[layer] for layer in inside)
    overlap = highest - min(values[layer] for layer in outside)
    if overlap >= 0:
        # Raises the others by more than the overlap, by enough not to be lost in rounding.
        raised = overlap + (max(map(abs, values)) or 1.0)
        for layer in outside:
            values[layer] += raised
    return values


def _sums_of_steps(trace: GradientTrace, terms_EL: Tensor) -> Tensor:
    """Returns the sums over the examples of every step, shape (steps, layers)."""
    assert trace.gates is not None
    per_step = torch.tensor(trace.gates.per_step)
    steps_E = torch.repeat_interleave(torch.arange(len(per_step)), per_step)
    sums_SL = torch.zeros(len(per_step), terms_EL.shape[1], dtype=torch.float64)
    return sums_SL.index_add_(0, steps_E, terms_EL)


METHODS.register("gate")(
    Method(
        "gate: prunes what raises the loss least, by its derivatives with respect to what layers add",
        score,
        options=GateOptions,
        needs_trace=True,
        label="Gate",
    )
)
