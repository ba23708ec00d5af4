"""The dtype a checkpoint is stored in, casting to it before saving, and whether its numbers are finite."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.common.errors import IntegrityError
from gradpruner.models.raw_config import CONFIG_FILE, fields_of, read_raw_config
from gradpruner.models.shards import Shards, open_shards

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_AT_ONCE = 2**24
"""Numbers looked at together; summing a half-precision tensor on a CPU would copy it whole in float32."""


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype that most entries of a checkpoint are stored in.

    If no tensor is a plain float (8-bit tensors only, or none at all), this is the first dtype found anywhere
    in its config, else float32.
    """
    found = majority_dtype(open_shards(folder))
    if found is not None:
        return found
    for _, key, value in fields_of(read_raw_config(folder / CONFIG_FILE)):
        named = getattr(torch, str(value), None) if key in ("dtype", "torch_dtype") else None
        if isinstance(named, torch.dtype):
            return named
    return torch.float32


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether a tensor of floats (integers always) holds neither NaN nor Inf; needs 64 MiB at most."""
    if not numbers.is_floating_point():
        return True
    for part in numbers.detach().reshape(-1).split(_AT_ONCE):
        wide = part if part.itemsize > 2 else part.float()
        # A sum is faster. It can overflow although every number is finite, hence the second look.
        if not bool(wide.sum().isfinite()) and not bool(wide.isfinite().all()):
            return False
    return True


def refuse_non_finite(model: nn.Module, origin: str | Path) -> None:
    """Raises IntegrityError, which names the tensor, if a weight of a loaded model is NaN or Inf."""
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            raise IntegrityError(
                f"{origin}: the tensor '{name}' holds NaN or Inf as {weight.dtype}.",
                hint="The model is damaged (use another copy), or needs a wider dtype (model.dtype).",
            )


def majority_dtype(shards: Shards) -> torch.dtype | None:
    """Returns the dtype of most entries of a folder's tensors; None if no tensor is a plain float."""
    entries: Counter[str] = Counter()
    for ref in shards.tensors.values():
        if ref.dtype in _FLOATS:
            entries[ref.dtype] += ref.num_bytes // _FLOATS[ref.dtype].itemsize
    return _FLOATS[entries.most_common(1)[0][0]] if entries else None


def _kind_of(name: str) -> str:
    """Returns the part of a tensor's name that says its kind, the same on disk and in memory.

    Inside a layer it is what follows the layer's number; elsewhere, the last two parts.
    """
    inside = re.search(r"\.(?:layers|h|blocks|block)\.\d+\.(.*)$", name)
    return re.sub(r"\d+", "#", inside[1]) if inside else ".".join(name.split(".")[-2:])


def cast_like(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Casts every parameter to the dtype of the tensors of its kind in a folder, or to `dtype` without any.

    If these tensors have several dtypes, the narrowest is taken: a saved tensor is never larger than in the
    source.
    """
    dtypes: dict[str, torch.dtype] = {}
    for ref in open_shards(folder).tensors.values():
        if ref.dtype in _FLOATS:
            kind, found = _kind_of(ref.name), _FLOATS[ref.dtype]
            dtypes[kind] = min(dtypes.get(kind, found), found, key=lambda choice: choice.itemsize)
    for name, parameter in model.named_parameters():
        wanted = dtypes.get(_kind_of(name), dtype)
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
