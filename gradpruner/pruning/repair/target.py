"""Finds, by trial, the linear or norm of a layer whose weight a repair refits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import ModelError
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import Walk


@dataclass(frozen=True)
class RefitTarget:
    """The module whose output a layer adds to the residual stream last.

    Attributes:
        name: Its path inside the layer.
        module: A linear, or a norm that follows the last linear (Gemma 2 and 3, OLMo 2).
        weight: (out_features, in_features) for a linear, (hidden,) for a norm.
        factor: What the output is multiplied by before it is added (not 1 in Granite).
        offset: None for a linear. The output of a norm is x (weight + offset), where x is the normalised
            input; the offset is 0, or 1 if the weight is stored around 0 (Gemma).
    """

    name: str
    module: nn.Module
    weight: Tensor
    factor: float
    offset: float | None = None


@torch.no_grad()
def target_of(view: LayeredModel, walk: Walk, layer: int, state: Tensor) -> RefitTarget:
    """Returns the module whose output a layer adds to the residual stream last.

    It is found by trial on the first batch, whose hidden states before the layer are `state`. A change of the
    module's output must appear in the layer's output, times one factor. The last linear is tried first, then
    the last norm.

    Raises:
        ModelError: If there is no such module, or the layers are mixtures of experts.
    """
    linears, norms = _candidates(view, walk, layer, state)
    if not view.family.no_merge:
        plain = walk.layer_on(layer, 0, state)
        for name in (*linears[-1:], *norms[-1:]):
            module = view.layers[layer].get_submodule(name)
            weight = view.weight(layer, name)
            factor = _factor(walk, layer, state, plain, module)
            offset = _offset(walk, layer, state, module) if name in norms else None
            if weight is not None and factor is not None and (name in linears or offset is not None):
                return RefitTarget(name, module, weight, factor, offset)
    raise ModelError(
        f"Layer {layer} of a {view.config.model_type} model cannot be repaired: "
        + (
            "it is a mixture of experts."
            if view.family.no_merge
            else "what it adds to the residual stream is not the output of a single linear or norm."
        ),
        hint="Repair nothing: plan.repair=none.",
    )


def _candidates(
    view: LayeredModel, walk: Walk, layer: int, state: Tensor
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the linears and norms that run once and output vectors of the hidden size, in running order."""
    order: list[str] = []
    width, linears = state.shape[-1], view.linears(layer)
    names = {name: view.weight(layer, name) for name, _ in view.layers[layer].named_modules()}
    found = {name: weight for name, weight in names.items() if weight is not None}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, args, output: order.append(name)

    with ExitStack() as hooks:
        for name, weight in found.items():
            if weight.shape[0] == width:
                module = view.layers[layer].get_submodule(name)
                hooks.enter_context(module.register_forward_hook(watch(name)))
        walk.layer_on(layer, 0, state)
    once = [name for name in order if order.count(name) == 1]
    return tuple(n for n in once if n in linears), tuple(n for n in once if n not in linears)


def _factor(walk: Walk, layer: int, state: Tensor, plain: Tensor, module: nn.Module) -> float | None:
    """Returns the factor by which a change of a module's output appears in the layer's; None if it does not.

    Only nine tenths of the entries must fit: in 16 bits, rounding in the few channels with massive
    activations is larger than the change.
    """
    generator = torch.Generator().manual_seed(0)
    counted = walk.counted[0]
    scale = float(plain[counted].float().abs().mean())
    noise = (torch.randn(plain.shape, generator=generator) * scale).to(plain)
    fits: list[bool] = []

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fits.append(output.numel() == noise.numel())
        return output + noise.view_as(output) if fits[-1] else output

    with module.register_forward_hook(move):
        moved = walk.layer_on(layer, 0, state)
    if fits != [True]:
        return None
    given, shown = noise[counted].float().cpu(), (moved.float() - plain.float())[counted].cpu()
    factor = float((given.double() * shown.double()).sum() / given.double().square().sum())
    rest = (shown - factor * given).abs().flatten()
    typical = float(rest.kthvalue(math.ceil(0.9 * rest.numel())).values) / scale
    allowed = 1e-3 if plain.dtype in (torch.float32, torch.float64) else 5e-2
    if abs(factor - 1) < 1e-3:
        factor = 1.0  # in 16 bits, the estimate is only exact to about four digits
    return factor if abs(factor) > 1e-6 and typical <= allowed * abs(factor) else None


def _offset(walk: Walk, layer: int, state: Tensor, module: nn.Module) -> float | None:
    """Returns what a norm adds to its weight before it multiplies: 0 or 1; None if it does neither."""
    caught: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, args: caught.append(args[0])):
        walk.layer_on(layer, 0, state)
    weight = module.weight
    assert isinstance(weight, Tensor)
    with weight_set(weight, torch.zeros_like(weight)):
        at_zero = module(caught[0])[walk.counted[0]].float()
    with weight_set(weight, torch.ones_like(weight)):
        at_one = module(caught[0])[walk.counted[0]].float()
    size = float(at_one.norm())
    for offset in (0.0, 1.0):
        if size > 0 and float((at_zero * (1 + offset) - at_one * offset).norm()) <= 1e-2 * size:
            return offset
    return None


@contextmanager
def weight_set(weight: Tensor, new: Tensor) -> Iterator[None]:
    """Inside the block, a weight has the values of `new`."""
    original = weight.detach().clone()
    weight.copy_(new)
    try:
        yield
    finally:
        weight.copy_(original)
