"""GradPruner's importance applied to hidden dimensions (or heads and channels) instead of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from gradpruner.common.errors import PlanError
from gradpruner.gradients.importance import column_energies, row_energies
from gradpruner.gradients.scores import check_energy
from gradpruner.gradients.trace import GradientTrace, trace_digest
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.width_choice import BY_ROW, UnitScores, budget_facts, most_important, unit_scores
from gradpruner.models.widths import ATTENTION, MLP, WidthView
from gradpruner.plans.width_plan import LayerWidths, WidthPlan

Sizes = tuple[int, int, int]
"""Numbers of KV heads and channels in every layer, and of hidden dimensions."""


class GradPrunerWidthOptions(MethodOptions):
    """Options of GradPruner on widths."""

    axis: Literal["hidden", "inner", "both"] = "hidden"
    """What is pruned: hidden dimensions, as in the paper; KV heads and channels inside layers; or both."""


def plan(context: MethodContext) -> WidthPlan:
    """Removes the units with the smallest `1/t sum_i sum_entries (gB_i gA_i)**2` over the entries they own.

    This sums the IGIA matrix per unit instead of per layer. A hidden dimension owns its column of q, k, v,
    gate and up and its row of o and down, in all layers. A channel owns its rows of gate and up and its
    column of down. A KV head owns its rows of q, k, v and its columns of o (`unit_scores`). All layers keep
    the same numbers of units, so the result is a plain model of smaller widths. The sums need R x R matrices,
    not the IGIA matrix (`row_energies`). With the norm "frobenius", the square roots of the sums of each step
    and linear are added up.

    The budget is met to half a channel in every layer (`widths_of`). The number of hidden dimensions is a
    multiple of the number of query heads that stay, because configs of Llama and others are refused
    otherwise. With `hidden`, channels make up the difference, in Llama-3.1-8B less than 1 % of the
    parameters. `inner` removes shares of KV heads and channels that are as equal as this rule and whole KV
    heads allow; `both` removes such a share of the hidden dimensions too.

    Widths are the same in all layers, so protected layers are pruned too. Linears that were not recorded, and
    embeddings, do not count.

    Raises:
        ConfigError: If no step has any energy.
        PlanError: If the trace is of another model, holds no factors, or the budget cannot be met.
        ModelError: If heads and channels of the model cannot be told apart.

    Source: GradPruner, appendix D, "Replacing Layer Pruning with Kernel Pruning", Fig. 9; Eq. 2-4.
    """
    options: GradPrunerWidthOptions = context.options or GradPrunerWidthOptions()
    num_remove = context.budget()
    view, trace = WidthView(context.model()), context.trace()
    whole = view.whole()
    _check(context, trace, whole, options.axis)
    kv_heads, channels, hidden = widths_of(view, options.axis, num_remove, context.unit)
    layer_scores, hidden_H = _scores(view, trace, context.norm)
    heads = view.shape.heads_of
    result = replace(
        whole,
        layers=tuple(
            LayerWidths(heads(most_important(s.kv_heads_K, kv_heads)), most_important(s.channels_C, channels))
            for s in layer_scores
        ),
        hidden=most_important(hidden_H, hidden),
        method="gradpruner_width",
    )
    evidence = {
        **whole.evidence,
        "axis": options.axis,
        "norm": context.norm,
        "num_steps": trace.num_steps,
        "trace": trace_digest(trace),
        **budget_facts(view, result, context),
        "hidden_scores": hidden_H.tolist() if options.axis != "inner" else [],
    }
    return replace(result, evidence=evidence)


def _check(context: MethodContext, trace: GradientTrace, whole: WidthPlan, axis: str) -> None:
    check_energy(trace, context.norm)
    trace.check_model(whole.num_layers, str(whole.evidence["model"]))
    if not trace.has_factors:
        raise PlanError(
            "This trace holds layer energies only; energies of rows and columns need the factor history.",
            hint="Record again with keep_factors=True.",
        )
    names = {ref.name.rpartition(".")[2] for ref in trace.info.linears}
    unknown = [kind for kind in (ATTENTION, MLP) if not names & {*kind}]
    if unknown and axis != "hidden":
        raise PlanError(
            f"The trace holds no gradients of {', '.join(unknown[0])}, so their units cannot be scored.",
            hint="Record with LoRA on all linears, or set methods.gradpruner_width.axis to hidden.",
        )


def widths_of(view: WidthView, axis: str, num_remove: int, unit: str = "parameters") -> Sizes:
    """Returns the uniform widths that meet a budget to half a channel in every layer.

    `num_remove` counts parameters in `unit`, see `WidthView.parameters`.

    Raises:
        PlanError: If the budget cannot be met.
    """
    shape = view.shape
    whole = (shape.num_kv_heads, shape.intermediate_size, shape.hidden_size)
    dense = _parameters(view, whole, unit)

    def skew(sizes: Sizes) -> tuple[float, int]:
        shares = [size / all_ for size, all_ in zip(sizes, whole, strict=True)]
        if axis == "hidden":
            return 1 - shares[1], 0
        shares = shares if axis == "both" else shares[:2]
        return max(shares) - min(shares), -sizes[0]

    found = _meeting(view, axis, dense - num_remove, unit)
    chosen = min(found, key=skew, default=None)
    if chosen is None:
        raise PlanError(
            f"Cannot remove {num_remove:,} of {dense:,} {unit.replace('_', ' ')} with the same "
            f"{'numbers of heads and channels' if axis == 'inner' else 'widths'} in all layers.",
            hint="Remove fewer parameters.",
        )
    return chosen


def _meeting(view: WidthView, axis: str, target: int, unit: str) -> Iterator[Sizes]:
    """Yields every choice of KV heads and hidden dimensions with the channels that meet the target."""
    shape = view.shape
    for kv_heads in [shape.num_kv_heads] if axis == "hidden" else range(1, shape.num_kv_heads + 1):
        heads = kv_heads * shape.group_size
        # Configs of transformers, and engines, want the hidden size to be a multiple of the number of heads,
        # even if it is not the product of heads and their size.
        step = 1 if shape.hidden_size % shape.num_heads else heads
        for hidden in range(step, shape.hidden_size + 1, step):
            if axis == "inner" and hidden < shape.hidden_size:
                continue
            rest = target - _parameters(view, (kv_heads, 0, hidden), unit)
            channels = round(rest / (shape.num_layers * view.unit_parameters(hidden)["channel"]))
            if 1 <= channels <= shape.intermediate_size:
                yield kv_heads, channels, hidden


def _parameters(view: WidthView, sizes: Sizes, unit: str) -> int:
    kv_heads, channels, hidden = sizes
    one = (kv_heads * view.shape.group_size, kv_heads, channels)
    return view.parameters_of([one] * view.shape.num_layers, hidden, unit)


def _scores(view: WidthView, trace: GradientTrace, norm: str) -> tuple[list[UnitScores], Tensor]:
    """Scores every layer's KV heads and channels, and the hidden dimensions; reads one linear at a time."""
    hidden_H = torch.zeros(view.shape.hidden_size, dtype=torch.float64)
    layers = []
    for layer in range(view.shape.num_layers):
        inner = {}
        for path in trace.linear_names(layer):
            name = path.rpartition(".")[2]
            factors = trace.factors(layer, path)
            linear = getattr(view.parts(layer), name, None)
            shape = " x ".join(map(str, factors.shape))
            if linear is None or factors.shape != tuple(linear.weight.shape):
                raise PlanError(
                    f"The trace has a linear {path} of {shape} in layer {layer}; the model has none like it.",
                    hint="Record the gradients of this model.",
                )
            rows, columns = (
                _over_steps(energies(factors.grad_b_SOR, factors.grad_a_SRI), norm)
                for energies in (row_energies, column_energies)
            )
            by_row = name in BY_ROW
            inner[name] = rows if by_row else columns
            hidden_H += columns if by_row else rows
        layers.append(unit_scores(view.shape, inner))
    return layers, hidden_H


def _over_steps(energy: Tensor, norm: str) -> Tensor:
    """Reduces shape (steps, units) to (units,) as `scores.score_layers` does for layers."""
    return energy.mean(dim=0) if norm == "squared" else energy.sqrt().sum(dim=0)


METHODS.register("gradpruner_width")(
    Method(
        "GradPruner's importance on hidden dimensions instead of layers (Fig. 9)",
        plan=plan,
        options=GradPrunerWidthOptions,
        needs_trace=True,
        label="GradPruner-width-like",
    )
)
