"""Sharding: weights spread over processes (FSDP2, DeepSpeed ZeRO), and gathered after training."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gradpruner.common.errors import ConfigError
from gradpruner.common.json_files import read_json
from gradpruner.common.world import this_world


def check_sharding(fsdp: Any, deepspeed: str | None, device: str) -> None:
    """Raises ConfigError if weights cannot be sharded over processes, before anything is loaded."""
    if "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ or "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        raise ConfigError(
            "accelerate was told to use DeepSpeed, which would include recording; there, DeepSpeed steps "
            "before gradients can be read.",
            hint="Start without it, and give a DeepSpeed file: --set finetune.deepspeed=FILE.",
        )
    key = "finetune.deepspeed" if deepspeed else "finetune.fsdp" if fsdp else "accelerate's FSDP"
    fsdp = fsdp or accelerate_shards()
    if not fsdp and not deepspeed:
        return
    if fsdp and deepspeed:
        raise ConfigError("FSDP and finetune.deepspeed are both given.", hint="Choose one.")
    if this_world().size == 1:
        raise ConfigError(
            f"{key} needs several processes; there is only one.",
            hint="Start with: torchrun --nproc-per-node 2 -m gradpruner ...",
        )
    if fsdp and (device == "cpu" or not torch.accelerator.is_available()):
        raise ConfigError(
            f"{key} needs GPUs: on CPUs, the Trainer would keep a whole copy in every process.",
            hint="Leave it out: several CPU processes work with plain data parallelism.",
        )
    if deepspeed:
        _check_deepspeed(Path(deepspeed))


def accelerate_shards() -> bool:
    """Returns whether accelerate was told to use FSDP, by its config or `--use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def check_world_size(rows: int, batch_sizes: Mapping[str, int]) -> None:
    """Raises ConfigError if a step of all processes would read more rows than there are.

    `batch_sizes` gives, by recipe key, the rows that one process reads in a step.
    """
    size = this_world().size
    for key, batch_size in batch_sizes.items():
        if size > 1 and size * batch_size > rows:
            fewer = f", or set {key} to {rows // size} or less" if rows >= size else ""
            raise ConfigError(
                f"{size} processes with {key} {batch_size} read {size * batch_size} rows in a step; there "
                f"are only {rows}, so some would count twice.",
                hint=f"Start fewer processes{fewer}.",
            )


def _check_deepspeed(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(
            f"finetune.deepspeed: there is no file {path}.",
            hint="For examples, see examples/deepspeed_zero2.json and examples/deepspeed_zero3.json.",
        )
    if not isinstance(read_json(path, "DeepSpeed configuration"), dict):
        raise ConfigError(f"finetune.deepspeed: {path} does not hold a JSON object.")
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "finetune.deepspeed is given, but DeepSpeed is not installed.",
            hint="pip install deepspeed, or use finetune.fsdp.",
        )


def num_trainable(model: nn.Module) -> int:
    """Returns the number of trained parameters over all processes (ZeRO 3 leaves tensors empty)."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def make_whole_(model: nn.Module, engine: Any = None) -> None:
    """Gathers a sharded model in place: whole on the CPU of the first process, without weights on the others.

    Parameters are gathered one at a time and their shards freed, so no process ever holds two copies. Every
    process must call this. A model that is not sharded stays as it is. DeepSpeed's engine is destroyed.
    """
    if any(isinstance(p, DTensor) or hasattr(p, "ds_tensor") for p in model.parameters()):
        gathered: dict[int, nn.Parameter] = {}
        for module in model.modules():
            # A plain dict, because DeepSpeed's own mapping gathers every parameter that is looked up.
            own = dict(module._parameters.items())
            module.__dict__.pop("_original_parameters", None)
            module.__dict__["_parameters"] = own
            for name, parameter in own.items():
                if parameter is not None and id(parameter) not in gathered:  # tied weights stay tied
                    gathered[id(parameter)] = _whole(parameter)
                own[name] = None if parameter is None else gathered[id(parameter)]
            bases = type(module).__bases__
            if type(module).__name__.startswith("FSDP") and len(bases) > 1:  # torch replaced its class
                module.__class__ = bases[1]
    if engine is not None:
        _leave_deepspeed(engine)


def _whole(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the whole parameter on the first process, and one without numbers on the others."""
    full: Any
    if isinstance(parameter, DTensor):
        full = parameter.data.full_tensor()  # type: ignore[attr-defined]
    elif hasattr(parameter, "ds_tensor"):
        with import_module("deepspeed").zero.GatheredParameters([parameter]):
            full = parameter.detach().clone()
    else:
        return parameter
    data = full.cpu() if this_world().is_first else torch.empty_like(full, device="meta")
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _leave_deepspeed(engine: Any) -> None:
    """Removes DeepSpeed's global state; with it, models loaded later would be sharded too."""
    engine.destroy()
    import_module("transformers.integrations.deepspeed").unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
