"""In which dtype a checkpoint is stored, by its tensors; parameters brought to it before they are saved."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from gradpruner.models.raw_config import CONFIG_FILE, fields_of, read_raw_config
from gradpruner.models.shards import open_shards

_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype that most entries of a checkpoint are stored in, from its tensors.

    Where none is a plain float (8 bits, or none at all), what its config says, wherever it says it; else
    float32.
    """
    found = majority_dtype(folder)
    if found is not None:
        return found
    for _, key, value in fields_of(read_raw_config(folder / CONFIG_FILE)):
        named = getattr(torch, str(value), None) if key in ("dtype", "torch_dtype") else None
        if isinstance(named, torch.dtype):
            return named
    return torch.float32


def majority_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most entries of a folder's tensors; None when none is a plain float."""
    entries: Counter[str] = Counter()
    for ref in open_shards(folder).tensors.values():
        if ref.dtype in _FLOATS:
            entries[ref.dtype] += ref.num_bytes // _FLOATS[ref.dtype].itemsize
    return _FLOATS[entries.most_common(1)[0][0]] if entries else None


def _place_of(name: str) -> str:
    """What tensors of the same kind share, on disk and in memory: the name inside a layer, or its end."""
    inside = re.search(r"\.(?:layers|h|blocks|block)\.\d+\.(.*)$", name)
    return re.sub(r"\d+", "#", inside[1]) if inside else ".".join(name.split(".")[-2:])


def cast_like(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Gives every parameter the dtype that tensors of its kind have in a folder; `dtype` where it has none.

    Where they have several, the narrowest: what is saved is never larger than its share of the source.
    """
    kinds: dict[str, torch.dtype] = {}
    for ref in open_shards(folder).tensors.values():
        if ref.dtype in _FLOATS:
            place, found = _place_of(ref.name), _FLOATS[ref.dtype]
            kinds[place] = min(kinds.get(place, found), found, key=lambda kind: kind.itemsize)
    for name, parameter in model.named_parameters():
        wanted = kinds.get(_place_of(name), dtype)
        if parameter.is_floating_point() and parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)
