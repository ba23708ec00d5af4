"""From a score per row and column of a layer's linears to the KV heads and channels that stay.

Shape suffixes: K KV heads, C MLP channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradpruner.common.errors import NonFiniteError, PlanError
from gradpruner.methods.base import MethodContext
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan, WidthShape

BY_ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Linears of which heads and channels are rows; of the other two they are columns."""


@dataclass(frozen=True)
class UnitScores:
    """Scores of one layer's KV heads (each with its query heads) and channels, float64 on the CPU."""

    kv_heads_K: Tensor
    channels_C: Tensor


def unit_scores(shape: WidthShape, vectors: Mapping[str, Tensor]) -> UnitScores:
    """Adds up what belongs to one KV head or one channel.

    KV head g has its rows of k_proj and v_proj, and of its query heads g*q to g*q+q-1 the rows of q_proj and
    columns of o_proj: the heads that `repeat_kv` makes share it. Channel j has row j of gate_proj and up_proj
    and column j of down_proj.

    `vectors` has by role of a linear ("q_proj" ...) a score for every row, of o_proj and down_proj for every
    column; a missing linear adds nothing.

    Raises:
        NonFiniteError: If a score is NaN or infinite.
    """
    kv_heads_K = torch.zeros(shape.num_kv_heads, dtype=torch.float64)
    channels_C = torch.zeros(shape.intermediate_size, dtype=torch.float64)
    for name, vector in vectors.items():
        values = vector.cpu().double()
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"The scores of {name} are NaN or infinite.",
                hint="The model's number format is too narrow: try float32.",
            )
        if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            kv_heads_K += values.reshape(shape.num_kv_heads, -1).sum(dim=1)
        else:
            channels_C += values
    return UnitScores(kv_heads_K, channels_C)


def most_important(scores: Sequence[float] | Tensor, num_keep: int) -> tuple[int, ...]:
    """The units with the highest scores, ascending; of equal ones the lower index stays."""
    return tuple(sorted(descending(scores)[:num_keep]))


def descending(scores: Sequence[float] | Tensor) -> list[int]:
    """Units from most to least important; of equal ones the lower index comes first."""
    order = torch.as_tensor(scores, dtype=torch.float64).argsort(descending=True, stable=True)
    return [int(unit) for unit in order]


def budget_facts(view: WidthView, plan: WidthPlan, context: MethodContext) -> dict[str, Any]:
    """What was to be removed and what a plan removes, for its evidence."""
    removed = view.parameters(view.whole(), context.unit) - view.parameters(plan, context.unit)
    return {"unit": context.unit, "num_remove": context.num_remove, "removed": removed}


def share_out(
    shape: WidthShape, units: Mapping[str, int], num_layers: int, num_remove: int
) -> tuple[int, int]:
    """How much to remove from layers that each lose the same share of their KV heads and of their channels.

    The share is p = num_remove / (parameters of all heads and channels of these layers). Of K KV heads
    floor(p * K) go, with all their query heads; channels make up the rest, rounded to the nearest. Where the
    channels cannot, further KV heads go until they can. One KV head and one channel stay in every layer.
    `units` are the `WidthView.unit_parameters`.

    Returns:
        KV heads that go from each layer; channels that go from all of them together. They meet `num_remove`
        to half a channel.

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
        f"{num_remove:,} parameters are to be removed from {num_layers} of {shape.num_layers} layers, whose "
        f"heads and channels have {largest:,} that can go.",
        hint="Let more layers be pruned, or remove less.",
    )
