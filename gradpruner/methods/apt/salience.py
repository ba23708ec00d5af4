"""Masks on the heads and MLP channels of a model in training, and the salience of these units (APT)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

EMA = 0.85
"""Weight of the earlier steps in a moving average."""


def outlier_term(weight: Tensor) -> Tensor:
    """Returns the square root of the excess kurtosis of every column of a weight, 0 where it is negative.

    Args:
        weight: Shape (out_features, in_features).

    Returns:
        Shape (in_features,), float32, >= 0; 0 for a column whose entries are all equal.

    Source: APT, section 4.2, the kurtosis over the outputs of an input entry's contribution. The contribution
        is the column times the entry's mean activation, and a factor does not change the kurtosis.
    """
    centred = weight.detach().float()
    centred = centred - centred.mean(dim=0)
    second = centred.square().mean(dim=0)
    fourth = centred.square().square().mean(dim=0)
    kurtosis = fourth / second.square() - 3
    term: Tensor = torch.where(second > 0, kurtosis, 0.0).nan_to_num(0.0).clamp_min(0).sqrt()
    return term


class UnitMasks:
    """Masks and salience of the units at the input of one linear.

    The salience of a unit is `S = sum over its entries of (sum |H|) (sum |dL/dH|)`, with H the masked input
    of the linear and the inner sums over all tokens of an optimizer step; averaged over the steps.

    Args:
        linear: o_proj or down_proj.
        units: Number of KV groups or channels; all have equally many entries, next to each other.

    Attributes:
        masks: Factor of every unit, in [0, 1], shape (units,).
        targets: Values the masks move towards, 0 or 1.
        salience: Moving average of S, shape (units,), float64; zeros before the first step.
        paused: While True, nothing is masked.
    """

    def __init__(self, linear: nn.Linear, units: int) -> None:
        weight = linear.weight
        self.masks = torch.ones(units, device=weight.device)
        self.targets = torch.ones(units, device=weight.device)
        self.salience = torch.zeros(units, dtype=torch.float64)
        self._width = linear.in_features // units
        self._outliers = self._per_unit(outlier_term(weight).cpu().double())
        self._steps, self._masked, self.paused = 0, False, False
        self._inputs, self._gradients = (torch.zeros(linear.in_features, device=weight.device) for _ in "ab")
        self._latest = self._inputs
        self._hook = linear.register_forward_pre_hook(self._apply)

    def scores(self) -> Tensor:
        """Returns salience plus outlier term, shape (units,), float64; 0 for units whose mask is 0."""
        return (self.salience + self._outliers) * (self.masks > 0).cpu()

    def end_step(self) -> None:
        """Adds the sums of an optimizer step to the moving average."""
        found = self._per_unit(self._inputs.cpu().double() * self._gradients.cpu().double())
        self.salience = found if self._steps == 0 else EMA * self.salience + (1 - EMA) * found
        self._steps += 1
        self._inputs, self._gradients = torch.zeros_like(self._inputs), torch.zeros_like(self._inputs)

    def move(self, amount: float) -> None:
        """Moves the masks towards their targets, by at most `amount`."""
        self.masks += (self.targets - self.masks).clamp(-amount, amount)
        self._masked = bool((self.masks < 1).any())

    def close(self) -> None:
        """Removes the masks from the linear."""
        self._hook.remove()

    def _per_unit(self, entries: Tensor) -> Tensor:
        return entries.reshape(-1, self._width).sum(dim=1)

    def _apply(self, linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs: Tensor = args[0]
        if self._masked and not self.paused:
            inputs = inputs * self.masks.repeat_interleave(self._width).to(inputs.dtype)
        if linear.training and inputs.requires_grad:
            self._latest = _sum_of_absolutes(inputs)
            inputs.register_hook(self._add)
        return (inputs, *args[1:])

    def _add(self, gradient: Tensor) -> None:
        # Inputs are added here and not in the forward pass, which gradient checkpointing runs twice.
        self._inputs += self._latest
        self._gradients += _sum_of_absolutes(gradient)


def _sum_of_absolutes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().flatten(0, -2)
    total: Tensor = torch.linalg.vector_norm(flat, ord=1, dim=0, dtype=torch.float32)
    return total
