"""Minitron, width: prunes the channels, heads and hidden dimensions with the smallest activations."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.common.progress import track
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.methods.calibration import calibration_batches, check_finite, run
from gradpruner.methods.minitron_depth import MinitronOptions, recover
from gradpruner.methods.width_choice import budget_facts, most_important
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import LayerWidths, WidthPlan
from gradpruner.training.answer_loss import mean_nll

Axis = Literal["ffn", "heads", "hidden"]
# The first of these axes that may be pruned is set to meet the budget exactly.
AXES: tuple[Axis, ...] = ("ffn", "hidden", "heads")
# Largest step of each axis' grid. Smaller widths get smaller steps, such that an axis has 16 steps or more.
_DIVISORS: dict[Axis, int] = {"hidden": 256, "ffn": 512, "heads": 1}
_STEPS = 16
_RANKED_SAMPLES = 128

# Width of every axis: channels, query heads per KV head, hidden dimensions.
Size = dict[Axis, int]


class MinitronWidthOptions(MinitronOptions):
    """What may be pruned, and how the widths are searched."""

    axes: list[Axis] = Field(default=["ffn", "heads", "hidden"], min_length=1)
    """What is pruned: MLP channels, query heads (inside their KV group), hidden dimensions."""
    max_prune: float = Field(default=0.4, gt=0, lt=1)
    """Largest share of an axis that is pruned."""
    top_k: int = Field(default=5, ge=1)
    """Combinations of widths to try on the training samples; the one with the likeliest answers wins."""


@dataclass(frozen=True)
class ChannelStatistics:
    """Sizes of activations, fp32 on the CPU; higher is more important.

    Attributes:
        channels_LF: Shape (layers, MLP channels).
        heads_LQ: Shape (layers, query heads).
        hidden_H: Shape (hidden dimensions,); zeros if they were not measured.
        samples: Number of samples measured.
    """

    channels_LF: Tensor
    heads_LQ: Tensor
    hidden_H: Tensor
    samples: int


def plan(context: MethodContext) -> WidthPlan:
    """Keeps the units with the largest activations, in the widths that make the training answers likeliest.

    For entry j of an activation a, `s_j = sqrt(sum over samples of (mean over tokens of |a_j|)^2)`, without
    padding, in fp32. The score of

    - an MLP channel is s of the input of down_proj;
    - a query head is the L2 norm, over the head's entries, of s of the input of o_proj. Heads are ranked
      inside their KV group. KV heads are never pruned, so models with one query head per group keep all;
    - a hidden dimension is the sum of s over the outputs of all norms in the layers (not the final norm).

    All layers keep the same widths and the same hidden dimensions, so the result is a plain Hugging Face
    model. Widths come from a grid over hidden, ffn and heads in multiples of 256, 512 and 1 (or, for smaller
    models, the largest power of two that is at most a sixteenth of the width). At most `max_prune` of an axis
    is pruned, and widths that a config of the family does not allow are skipped (the hidden size of a Llama
    must be a multiple of its heads). The `top_k` combinations nearest to `num_remove` are taken. The channels
    of each are then set to meet `num_remove` to half a unit, where a unit is one channel in every layer.
    (Without the axis ffn, hidden dimensions are set instead, to the nearest number allowed; without both,
    heads.) Each combination is built from the loaded weights, and the one whose training answers are
    likeliest becomes the plan. Memory beyond the model: one pruned model.

    Protected layers become as narrow as all others.

    Raises:
        PlanError: If `num_remove` parameters cannot be removed.
        DataError: If there are several combinations and no sample has an answer.
        ModelError: If heads and channels cannot be told apart.
        NonFiniteError: If activations or losses are NaN or infinite.

    Source: Minitron (Muralidharan et al., 2024), section 2; released code (NVIDIA ModelOpt).
    """
    num_remove = context.budget()
    options: MinitronWidthOptions = context.options or MinitronWidthOptions()
    view = WidthView(context.floating_model())
    sizes = candidates(view, options, num_remove, context.unit)
    batches = calibration_batches(context, view.model, options.calibration_samples)
    found = channel_statistics(view, batches, "hidden" in options.axes)
    plans = [_plan_of(view, found, size) for size in sizes]
    losses: list[float | None] = [None]
    if len(plans) > 1:
        ranked_on = list(calibration_batches(context, view.model, _RANKED_SAMPLES))
        losses = [_loss(view, one, ranked_on) for one in track(plans, "plan minitron_width")]
    best = min(range(len(plans)), key=lambda i: (losses[i] or 0.0, i))
    evidence = plans[best].evidence | {
        "samples": found.samples,
        **budget_facts(view, plans[best], context),
        "candidates": [{**size, "nll": loss} for size, loss in zip(sizes, losses, strict=True)],
    }
    return replace(plans[best], method="minitron_width", evidence=evidence)


# --- statistics ---------------------------------------------------------------------------------------------


@torch.no_grad()
def channel_statistics(
    view: WidthView, batches: Iterable[dict[str, Tensor]], hidden: bool = True
) -> ChannelStatistics:
    """Measures activations on padded batches, those of norms only if `hidden`; see `plan` for the formulas.

    Raises:
        ModelError: If `hidden` is set and the layers have no norms with weights.
        NonFiniteError: If an activation is NaN or infinite.
    """
    shape, layers = view.shape, view.layered.layers
    inputs = [m for i in range(shape.num_layers) for m in (view.parts(i).down_proj, view.parts(i).o_proj)]
    norms = [m for layer in layers for m in view.hidden_vectors(layer)] if hidden else []
    if hidden and not norms:
        raise ModelError(
            f"The norms of a '{view.layered.config.model_type}' model have no weights, so its hidden "
            "dimensions cannot be measured and cut.",
            hint="Set methods.minitron_width.axes to [ffn, heads].",
        )
    samples = 0
    with _squared_means(inputs, norms) as (squares, weight_BT):
        for batch in batches:
            real = batch["attention_mask"].float()
            weight_BT[:] = [real / real.sum(dim=1, keepdim=True)]
            samples += len(real)
            run(view.model, batch)
    sizes = {module: total.sqrt().cpu() for module, total in squares.items()}
    channels = torch.stack([sizes[m] for m in inputs[::2]])
    heads = torch.stack([sizes[m].view(-1, shape.head_dim).norm(dim=1) for m in inputs[1::2]])
    dimensions = (
        torch.stack([sizes[m] for m in norms]).sum(dim=0) if norms else torch.zeros(shape.hidden_size)
    )
    check_finite("Activations on the training samples", channels, heads, dimensions)
    return ChannelStatistics(channels, heads, dimensions, samples)


@contextmanager
def _squared_means(
    inputs: Sequence[nn.Module], outputs: Sequence[nn.Module]
) -> Iterator[tuple[dict[nn.Module, Tensor], list[Tensor]]]:
    """Inside the block, sums up the squared means of some modules' inputs and other modules' outputs.

    Yields:
        Module -> sum over samples of the squared mean over tokens of |activation|; and a list that must hold,
        as its one entry, the weights of the tokens of the current batch, shape (samples, tokens).
    """
    totals: dict[nn.Module, Tensor] = {}
    weight_BT: list[Tensor] = []

    def add(module: nn.Module, x_BTC: Tensor) -> None:
        means = (x_BTC.detach().abs().float() * weight_BT[0][..., None]).sum(dim=1)
        total = means.square().sum(dim=0)
        totals[module] = totals[module] + total if module in totals else total

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        add(module, args[0])

    def after(module: nn.Module, _: Any, output: Tensor) -> None:
        add(module, output)

    with ExitStack() as hooks:
        for module in inputs:
            hooks.enter_context(module.register_forward_pre_hook(before))
        for module in outputs:
            hooks.enter_context(module.register_forward_hook(after))
        yield totals, weight_BT


# --- budget -------------------------------------------------------------------------------------------------


def candidates(view: WidthView, options: MinitronWidthOptions, num_remove: int, unit: str) -> list[Size]:
    """Returns at most `top_k` widths to choose from, those nearest to the budget on the grid first.

    All meet the budget (in `unit`, see `WidthView.parameters`) to half a unit of the fine axis.

    Raises:
        PlanError: If `num_remove` parameters cannot be removed; the message says how many can.
    """
    search = _Search(view, options.axes, options.max_prune, unit)
    target = search.counted(search.whole) - num_remove
    found = []
    for size in search.on_grid():
        fitted = search.fitted(size, target)
        if fitted is not None:
            gap = min(abs(search.counted({**size, search.fine: n}) - target) for n in search.fine_grid)
            found.append((gap, fitted))
    if not found:
        shares = (n / 100 for n in range(5, 100, 5))
        reach = ((share, _Search(view, options.axes, share, unit).most()) for share in shares)
        enough = next((share for share, most in reach if share > options.max_prune and most >= num_remove), 0)
        raised = f"Set methods.minitron_width.max_prune to {enough:g}, or remove fewer parameters."
        raise PlanError(
            f"Cannot remove {num_remove:,} {unit.replace('_', ' ')}: pruning at most {options.max_prune:.0%} "
            f"of {', '.join(options.axes)} removes 0 to {search.most():,}.",
            hint=raised if enough else "Prune more axes, or remove fewer parameters.",
        )
    return [size for _, size in sorted(found, key=lambda entry: entry[0])[: options.top_k]]


class _Search:
    """The widths there are to choose from.

    Attributes:
        whole: Widths of the dense model.
        fine: The axis that is set to meet the budget; all others stay on their grids.
        fine_grid: Grid of the fine axis, used to sort combinations.
    """

    def __init__(self, view: WidthView, axes: Sequence[Axis], max_prune: float, unit: str) -> None:
        self.view, self.max_prune, self.unit, shape = view, max_prune, unit, view.shape
        self.whole: Size = {
            "ffn": shape.intermediate_size, "hidden": shape.hidden_size, "heads": shape.group_size
        }  # fmt: skip
        self.fine = next(axis for axis in AXES if axis in axes)
        self.fine_grid = _grid(self.fine, self.whole[self.fine], max_prune)
        self._grids: dict[Axis, list[int]] = {
            axis: _grid(axis, n, max_prune) if axis in axes else [n]
            for axis, n in self.whole.items()
            if axis != self.fine
        }

    def counted(self, size: Size) -> int:
        """Returns the parameters of a model of some widths; they are linear along each axis."""
        shape = self.view.shape
        layer = (size["heads"] * shape.num_kv_heads, shape.num_kv_heads, size["ffn"])
        return self.view.parameters_of([layer] * shape.num_layers, size["hidden"], self.unit)

    def on_grid(self) -> Iterator[Size]:
        """Yields the combinations of all axes but the fine one, the widest first."""
        for widths in product(*map(reversed, self._grids.values())):
            yield {**self.whole, **dict(zip(self._grids, widths, strict=True))}

    def allowed(self, size: Size) -> list[int]:
        """Returns the widths of the fine axis that the model's config allows, ascending."""
        widths = range(_lowest(self.whole[self.fine], self.max_prune), self.whole[self.fine] + 1)
        if self.fine == "ffn":
            return list(widths) if self._is_allowed(size) else []
        return [n for n in widths if self._is_allowed({**size, self.fine: n})]

    def _is_allowed(self, size: Size) -> bool:
        kv_heads = self.view.shape.num_kv_heads
        return self.view.config_takes(size["hidden"], size["heads"] * kv_heads, kv_heads)

    def fitted(self, size: Size, target: int) -> Size | None:
        """Returns the widths with the fine axis set to meet the target best; None if it is out of reach."""
        step = self.counted(size) - self.counted({**size, self.fine: self.whole[self.fine] - 1})
        counts = {n: self.counted(size) - step * (self.whole[self.fine] - n) for n in self.allowed(size)}
        if not counts or not 2 * min(counts.values()) - step <= 2 * target <= 2 * max(counts.values()) + step:
            return None
        return {**size, self.fine: min(counts, key=lambda n: abs(counts[n] - target))}

    def most(self) -> int:
        """Returns the largest number of parameters that can be removed."""
        least = [{**size, self.fine: n} for size in self.on_grid() for n in self.allowed(size)[:1]]
        return self.counted(self.whole) - min(map(self.counted, least))


def _lowest(total: int, max_prune: float) -> int:
    """Returns the smallest width of an axis."""
    return max(1, math.ceil(total * (1 - max_prune) - 1e-9))


def _grid(axis: Axis, total: int, max_prune: float) -> list[int]:
    """Returns the widths of an axis, ascending: multiples of its divisor, and the full width."""
    divisor = 1
    while divisor < _DIVISORS[axis] and 2 * divisor * _STEPS <= total:
        divisor *= 2
    lowest = _lowest(total, max_prune)
    return [*range(math.ceil(lowest / divisor) * divisor, total, divisor), total]


# --- choice -------------------------------------------------------------------------------------------------


def _plan_of(view: WidthView, found: ChannelStatistics, size: Size) -> WidthPlan:
    """Returns the plan that keeps the most important units of every axis."""
    shape, whole = view.shape, view.whole()
    layers = []
    for channels, heads in zip(found.channels_LF, found.heads_LQ, strict=True):
        groups = heads.view(shape.num_kv_heads, shape.group_size)
        kept = [
            shape.group(kv_head)[place]
            for kv_head, group in enumerate(groups)
            for place in most_important(group, size["heads"])
        ]
        layers.append(LayerWidths(tuple(kept), most_important(channels, size["ffn"])))
    return replace(whole, layers=tuple(layers), hidden=most_important(found.hidden_H, size["hidden"]))


def _loss(view: WidthView, plan: WidthPlan, batches: Sequence[dict[str, Tensor]]) -> float:
    """Returns the mean negative log-likelihood of the answers under the pruned model."""
    # Copies the modules only: pruning gives the copy new weights and does not change the shared ones.
    model = view.model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    pruned: Any = prune_width_(copy.deepcopy(model, shared), plan)
    return mean_nll(pruned, batches, f"with {len(plan.hidden)} hidden dimensions and narrower layers")


METHODS.register("minitron_width")(
    Method(
        "Minitron: prunes channels, heads and hidden dimensions with small activations; distils",
        plan=plan,
        recover=recover,
        options=MinitronWidthOptions,
        label="Minitron (width)",
    )
)
