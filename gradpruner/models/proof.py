"""Proves that two models compute the same, by their logits on fixed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROBE_TOKENS = 16


def probe_ids(model: Any) -> Tensor:
    """Returns the fixed tokens, shape (1, PROBE_TOKENS), on the model's device."""
    embedding: Tensor = model.get_input_embeddings().weight
    ids = (torch.arange(PROBE_TOKENS) * 37 + 11).remainder(embedding.shape[0])[None]
    return ids.to(embedding.device)


@torch.no_grad()
def probe_logits(model: Any) -> Tensor:
    """Returns the model's logits on the fixed tokens, computed without a cache."""
    logits: Tensor = model(input_ids=probe_ids(model), use_cache=False).logits
    return logits


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference relative to the largest expected value; NaN if either is not finite."""
    found, expected = found.float(), expected.float()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def tolerance(dtype: torch.dtype, *, reordered: bool = False) -> float:
    """Returns the largest relative error that rounding explains.

    Args:
        dtype: The dtype both models compute in.
        reordered: Whether the same sums are added up in another order, as in narrower matrices. Otherwise
            the same operations run in the same order, and the error is almost always zero.
    """
    if dtype in (torch.float32, torch.float64):
        return 1e-3 if reordered else 1e-5
    return 5e-2 if reordered else 1e-2
