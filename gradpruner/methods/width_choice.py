"""Turns scores of the rows and columns of a layer's linears into the KV heads and channels to keep.

Shape suffixes: K KV heads, C MLP channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradpruner.common.errors import PlanError
from gradpruner.methods.base import MethodContext
from gradpruner.methods.calibration import check_finite
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan, WidthShape

BY_ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears whose rows belong to heads and channels; in o_proj and down_proj the columns do."""


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer's KV heads (each with its query heads) and channels, float64 on the CPU."""

    kv_heads_K: Tensor
    channels_C: Tensor


def unit_scores(shape: WidthShape, vectors: Mapping[str, Tensor]) -> UnitScores:
    """Adds up the scores that belong to each KV head and each channel.

    To KV head g belong its rows of k_proj and v_proj, and the rows of q_proj and columns of o_proj of its
    query heads g*q to g*q+q-1, which share it through `repeat_kv`. To channel j belong row j of gate_proj and
    up_proj and column j of down_proj.

    Args:
        shape: The dense widths.
        vectors: Role of a linear ("q_proj" ...) -> a score for every row, or for every column of o_proj and
            down_proj. A missing linear adds nothing.

    Raises:
        NonFiniteError: If a score is NaN or infinite.
    """
    kv_heads_K = torch.zeros(shape.num_kv_heads, dtype=torch.float64)
    channels_C = torch.zeros(shape.intermediate_size, dtype=torch.float64)
    for name, vector in vectors.items():
        values = vector.cpu().double()
        check_finite(f"The scores of {name}", values)
        if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            kv_heads_K += values.reshape(shape.num_kv_heads, -1).sum(dim=1)
        else:
            channels_C += values
    return UnitScores(kv_heads_K, channels_C)


def most_important(scores: Sequence[float] | Tensor, num_keep: int) -> tuple[int, ...]:
    """Returns the `num_keep` units with the highest scores, ascending; ties keep the lower index."""
    return tuple(sorted(descending(scores)[:num_keep]))


def descending(scores: Sequence[float] | Tensor) -> list[int]:
    """Returns the units from most to least important; ties in the order of their index."""
    order = torch.as_tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
    return [int(unit) for unit in order]


def budget_facts(view: WidthView, plan: WidthPlan, context: MethodContext) -> dict[str, Any]:
    """Returns the budget and what a plan removes, for its evidence."""
    removed = view.parameters(view.whole(), context.unit) - view.parameters(plan, context.unit)
    return {"unit": context.unit, "num_remove": context.num_remove, "removed": removed}


def share_out(
    shape: WidthShape, units: Mapping[str, int], num_layers: int, num_remove: int
) -> tuple[int, int]:
    """Returns how much to remove if all layers lose the same share of their KV heads and of their channels.

    The share is p = num_remove / (parameters of all heads and channels of these layers). Of K KV heads,
    floor(p * K) are removed, with all their query heads; channels make up the rest, rounded to the nearest.
    If there are not enough channels, further KV heads are removed until there are. Every layer keeps at least
    one KV head and one channel.

    Args:
        shape: The dense widths.
        units: `WidthView.unit_parameters`.
        num_layers: Layers to remove from.
        num_remove: Parameters to remove.

    Returns:
        KV heads to remove from each layer; channels to remove from all layers together. They meet
        `num_remove` to half a channel.

    Raises:
        PlanError: If the layers do not have so many parameters to lose.
    """
    group, channel = units["group"], units["channel"]
    all_units = num_layers * (shape.num_kv_heads * group + shape.intermediate_size * channel)
    most = num_layers * (shape.intermediate_size - 1)
    first = num_remove * shape.num_kv_heads // all_units if all_units else 0
    for kv_heads in range(first, shape.num_kv_heads):
        rest = num_remove - num_layers * kv_heads * group
        channels = round(rest / channel)
        if 0 <= channels <= most:
            return kv_heads, channels
    largest = num_layers * ((shape.num_kv_heads - 1) * group + (shape.intermediate_size - 1) * channel)
    raise PlanError(
        f"Cannot remove {num_remove:,} parameters from {num_layers} of {shape.num_layers} layers: their "
        f"heads and channels can lose at most {largest:,}.",
        hint="Prune more layers, or remove fewer parameters.",
    )
