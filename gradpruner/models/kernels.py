"""Matrix products on CPUs: oneDNN's kernels where they are as exact as fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_SHAPES = ((128, 576, 1536), (128, 1536, 576), (64, 4096, 512))
_EXACT = 1e-6
"""Relative error of a product whose terms are not rounded, with a wide margin; with bf16 it is above 1e-3."""


@contextmanager
def fast_products() -> Iterator[None]:
    """Inside the block, fp32 matrix products may use oneDNN's kernels, if these are exact on this CPU.

    PyTorch hands fp32 products to oneDNN only where it may round to bf16 (precision "medium"). On a CPU with
    AVX-512 and without AMX, oneDNN does not round, and on AMD processors it is twice as fast as the other
    kernels. Whether it rounds is measured once in every process. Nothing changes with a GPU, which would
    round, or if the precision was set before. Also a decorator.
    """
    if torch.cuda.is_available() or _precision() != "highest" or not _exact():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


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
