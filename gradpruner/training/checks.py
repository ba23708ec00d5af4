"""Checks, before a model is loaded, that this machine and its packages can do what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import suggest
from gradpruner.models.loading import check_bitsandbytes
from gradpruner.training.sharding import accelerate_shards


def check_trackers(report_to: str | Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is unknown or not installed."""
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    asked = [report_to] if isinstance(report_to, str) else list(report_to)
    for name in asked:
        if name in ("none", "all"):
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to: unknown tracker '{name}'.{suggest(name, INTEGRATION_TO_CALLBACK)}",
                hint=f"Known: {', '.join(sorted(INTEGRATION_TO_CALLBACK))}, all or none.",
            )
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"report_to: tracker '{name}' is not installed.", hint=f"pip install {name}, or use none."
            )


def check_liger(device: str = "auto") -> None:
    """Raises ConfigError if Liger's kernels cannot run here."""
    if device == "cpu" or not torch.cuda.is_available():
        raise ConfigError("finetune.liger needs a GPU.", hint="Leave it out; nothing else changes.")
    if find_spec("liger_kernel") is None:
        raise ConfigError(
            "finetune.liger is asked for, but liger-kernel is not installed.",
            hint="pip install 'gradpruner[gpu]', or leave it out.",
        )


def check_optimizer(name: str) -> None:
    """Raises ConfigError for an optimizer the Trainer does not know, or whose package is not installed."""
    from transformers.training_args import OptimizerNames

    known = [one.value for one in OptimizerNames]
    if name not in known:
        raise ConfigError(
            f"finetune.optim: the Trainer knows no '{name}'.{suggest(name, known)}",
            hint=f"Known: {', '.join(known)}.",
        )
    if any(part in name for part in ("8bit", "paged", "bnb")):
        check_bitsandbytes(f"finetune.optim: {name}")


def check_4bit(key: str, fsdp: Any, deepspeed: str | None) -> None:
    """Raises ConfigError if 4-bit weights cannot be used; `key` is the recipe key that is set to qlora."""
    check_bitsandbytes(f"{key}: qlora")
    for name, asked in {"DeepSpeed": deepspeed, "FSDP": fsdp or accelerate_shards()}.items():
        if asked:
            raise ConfigError(
                f"{key} is qlora, but {name} is on: 4-bit weights cannot be sharded over processes.",
                hint=f"Leave {name} out (every process then holds the 4-bit weights), or use lora.",
            )
