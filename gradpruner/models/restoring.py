"""Changes to a model for the length of a block: afterwards every module is as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restores afterwards which modules are in training mode: a model may have frozen parts that are not."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def forwards_set(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Sets the `forward` of each module within the block."""
    own = [module.__dict__.get("forward") for module in modules]  # accelerate's hooks, for example, set one
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, before in zip(modules, own, strict=True):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before
