"""Weights spread over processes (FSDP2), and whole again after training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gradpruner.errors import ConfigError
from gradpruner.world import this_world


def check_sharding(fsdp: Any, deepspeed: str | None, device: str) -> None:
    """Raises ConfigError where weights cannot be spread over processes, before anything is loaded."""
    if not fsdp and not deepspeed:
        return
    key = "finetune.deepspeed" if deepspeed else "finetune.fsdp"
    if fsdp and deepspeed:
        raise ConfigError("finetune.fsdp and finetune.deepspeed are both given.", hint="Choose one.")
    if this_world().size == 1:
        raise ConfigError(
            f"{key} needs several processes; this is one.",
            hint="Start with: torchrun --nproc-per-node 2 -m gradpruner ...",
        )
    if fsdp and (device == "cpu" or not torch.accelerator.is_available()):
        raise ConfigError(
            "finetune.fsdp needs GPUs: on CPUs the Trainer would keep whole copies.",
            hint="Leave it out: several CPU processes work as plain data parallelism.",
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only parts of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def make_whole_(model: nn.Module) -> None:
    """Gathers a sharded model in place: whole on the CPU of the first process, without weights on the others.

    Parameters are gathered one at a time and their shards let go, so that no process ever holds two copies.
    Every process must call it. A model that is not sharded stays as it is.
    """
    if not is_sharded(model):
        return
    first = this_world().is_first
    gathered: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:  # tied weights stay tied
                full = parameter.detach().full_tensor()
                data = full.cpu() if first else torch.empty_like(full, device="meta")
                gathered[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            module._parameters[name] = gathered[id(parameter)]
        kind = type(module)
        if kind.__name__.startswith("FSDP") and len(kind.__bases__) > 1:  # torch makes one class per class
            module.__class__ = kind.__bases__[1]
