"""Matrix products on CPUs: oneDNN's kernels where they are as exact as fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

_LEAST_WIDTH = 192
"""Hidden size from which oneDNN is faster for any number of tokens; below, calls cost more than they save."""
_SHAPES = ((128, 576, 1536), (128, 1536, 576), (64, 4096, 512))
_EXACT = 1e-6
"""Relative error of a product whose terms are not rounded, with a wide margin; with bf16 it is above 1e-3."""


def with_fast_products(function: F) -> F:
    """Decorator: runs a function, whose first argument is a model, inside `fast_products(model)`."""

    @wraps(function)
    def faster(*args: Any, **options: Any) -> Any:
        with fast_products(args[0] if args else options.get("model")):
            return function(*args, **options)

    return cast(F, faster)


@contextmanager
def fast_products(model: Any) -> Iterator[None]:
    """Inside the block, fp32 matrix products may use oneDNN's kernels, if these are exact on this CPU.

    PyTorch hands fp32 products to oneDNN only where it may round to bf16 (precision "medium"). On a CPU with
    AVX-512 and without AMX, oneDNN does not round, and on AMD processors it is twice as fast as the other
    kernels. Whether it rounds is measured once in every process. Nothing changes with a GPU, which would
    round, for narrow models, or if the precision was set before.
    """
    width = _width(model)
    if width < _LEAST_WIDTH or torch.cuda.is_available() or _precision() != "highest" or not _exact():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _width(model: Any) -> int:
    """Hidden size of a transformers model, with or without adapters; 0 for anything else."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return 0
    return int(getattr(config.get_text_config(decoder=True), "hidden_size", None) or 0)


def _precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by backend, and differently
        return "set by the user"


@cache
def _exact() -> bool:
    """Measures whether products with precision "medium" are as exact as fp32 here."""
    generator = torch.Generator().manual_seed(0)
    torch.set_float32_matmul_precision("medium")
    try:
        for rows, inner, columns in _SHAPES:
            left = torch.randn(rows, inner, generator=generator)
            right = torch.randn(columns, inner, generator=generator)
            exact = left.double() @ right.double().T
            error = (torch.nn.functional.linear(left, right) - exact).norm() / exact.norm()
            if not error < _EXACT:
                return False
    finally:
        torch.set_float32_matmul_precision("highest")
    return True
