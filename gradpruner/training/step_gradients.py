"""Reads gradients right before an optimizer step, un-scaled and gathered, for any Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gradpruner.common.errors import ModelError
from gradpruner.gradients.trace import LinearRef


def unscale(optimizer: Any) -> bool:
    """Divides gradients by the fp16 loss scale unless that was done; returns whether they overflowed.

    The Trainer un-scales only if it clips. `GradScaler.unscale_` remembers that it ran, so the following
    optimizer step does not divide again.
    """
    scaler = getattr(optimizer, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return False
    inner = getattr(optimizer, "optimizer", optimizer)
    state = scaler._per_optimizer_states[id(inner)]
    if state["stage"].name == "READY":
        scaler.unscale_(inner)
    return any(float(found) > 0 for found in state["found_inf_per_device"].values())


def loss_scale(optimizer: Any) -> float:
    """Returns the loss scale of this step, from the fp16 scaler or a DeepSpeed optimizer; 1 without one."""
    scaler = getattr(optimizer, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        return float(scaler.get_scale())
    return float(getattr(getattr(optimizer, "optimizer", None), "loss_scale", 1.0))


def full_gradient(weight: nn.Parameter, linear: LinearRef) -> Tensor:
    """Returns the gathered, reduced gradient of one LoRA weight; raises ModelError if there is none."""
    grad = weight.grad
    if grad is None:
        raise ModelError(
            f"LoRA of layer {linear.layer} {linear.name} has no gradient at the optimizer step.",
            hint="If the forward pass does not use this linear, give it no LoRA. DeepSpeed steps before "
            "gradients can be read: record with torchrun, DDP or FSDP2.",
        )
    # FSDP2 shards parameters as DTensors; gathering is collective, so every process must do it.
    full: Tensor = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return full


def learning_rate(optimizer: Any) -> float:
    """Returns the learning rate of the first parameter group; 0 without an optimizer."""
    groups = getattr(optimizer, "param_groups", None)
    return float(groups[0]["lr"]) if groups else 0.0
