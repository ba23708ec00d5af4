"""LoRA adapters whose ranks grow during training, the most salient ones first (APT)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.methods.apt.salience import EMA
from gradpruner.models.layers import LayeredModel

MAX_GROWTH = 8
"""Largest rank of an adapter, as a multiple of its first rank."""


class GrowingRanks:
    """Ranks of the LoRA adapters of a PEFT model with one active adapter.

    The salience of an adapter is the mean over its ranks of `sum |B dL/dB|`, averaged over the steps like the
    salience of heads. `grow` raises the ranks of the more salient half of the adapters.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        view = LayeredModel(model)
        found: dict[str, Any] = {
            f"{layer}.{name}": module
            for layer in range(view.num_layers)
            for name, module in view.linears(layer).items()
            if hasattr(module, "lora_A")
        }
        self._modules = found
        self._adapter = next(iter(found.values())).active_adapters[0]
        self._salience = dict.fromkeys(found, 0.0)
        self._steps = 0
        self._limits = {name: MAX_GROWTH * rank for name, rank in self.ranks().items()}
        self._first = self.parameters()
        self._generator = torch.Generator().manual_seed(seed)

    def ranks(self) -> dict[str, int]:
        """Returns the rank of every adapter, by layer and linear."""
        return {name: len(self._parts(name)[0].weight) for name in self._modules}

    def parameters(self) -> int:
        """Returns the number of parameters of all adapters."""
        return sum(map(self._size, self._modules))

    def end_step(self) -> None:
        """Updates the saliences with the gradients of a step, which must not have been cleared yet."""
        weight = EMA if self._steps else 0.0
        for name in self._modules:
            _, lora_b = self._parts(name)
            if lora_b.weight.grad is not None:
                found = float((lora_b.weight.detach() * lora_b.weight.grad).abs().sum(dim=0).mean())
                self._salience[name] = weight * self._salience[name] + (1 - weight) * found
        self._steps += 1

    def grow(self, times: float, optimizer: Any) -> None:
        """Grows the more salient half until all adapters together have `times` their first parameters.

        Every rank r of that half becomes `floor(r ((wanted - present) / parameters of the half + 1))`, at
        most 8 times its first rank. The output of the model does not change. The optimizer's moments of new
        entries are zero.
        """
        by_salience = sorted(self._modules, key=lambda name: -self._salience[name])
        half = by_salience[: max(1, len(self._modules) // 2)]
        missing = times * self._first - self.parameters()
        factor = missing / sum(map(self._size, half)) + 1
        for name, rank in self.ranks().items():
            wanted = min(self._limits[name], math.floor(round(rank * factor, 9)))
            if name in half and wanted > rank:
                self._widen(name, wanted - rank, optimizer)

    def _parts(self, name: str) -> tuple[Any, Any]:
        module = self._modules[name]
        return module.lora_A[self._adapter], module.lora_B[self._adapter]

    def _size(self, name: str) -> int:
        return sum(part.weight.numel() for part in self._parts(name))

    def _widen(self, name: str, extra: int, optimizer: Any) -> None:
        """Adds ranks: random rows to A, drawn as PEFT does, and zero columns to B."""
        lora_a, lora_b = self._parts(name)
        bound = 1 / math.sqrt(lora_a.in_features)
        rows = (2 * torch.rand(extra, lora_a.in_features, generator=self._generator) - 1) * bound
        columns = lora_b.weight.new_zeros(lora_b.out_features, extra)
        _replace(lora_a, torch.cat([lora_a.weight.detach(), rows.to(lora_a.weight)]), optimizer)
        _replace(lora_b, torch.cat([lora_b.weight.detach(), columns], dim=1), optimizer)
        lora_a.out_features = lora_b.in_features = self._modules[name].r[self._adapter] = len(lora_a.weight)


def _replace(linear: Any, values: Tensor, optimizer: Any) -> None:
    """Replaces the weight of a linear by a larger one, in the optimizer too."""
    old, new = linear.weight, nn.Parameter(values)
    linear.weight = new
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for group in inner.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = inner.state.pop(old, {})
    inner.state[new] = {key: _padded(value, old, new) for key, value in state.items()}


def _padded(value: Any, old: Tensor, new: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    larger = value.new_zeros(new.shape)
    larger[: old.shape[0], : old.shape[1]] = value
    return larger
