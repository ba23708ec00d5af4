"""The contents of a file to be written: its tensors, where they come from, and its header."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradpruner.models.headers import TensorRef
from gradpruner.models.shards import SINGLE_FILE

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' name of a dtype -> torch dtype, for the dtypes that torch can compute with."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written.

    Attributes:
        dtype: The name of its dtype in safetensors.
        ref: The tensor whose bytes are copied; None if the tensor is computed.
        make: Computes the tensor right before it is written; None if it is copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    ref: TensorRef | None = None
    make: Callable[[], Tensor] | None = None

    @classmethod
    def copied(cls, name: str, ref: TensorRef) -> Piece:
        """Returns the piece that copies the bytes of a tensor."""
        return cls(name, ref.dtype, ref.shape, ref.num_bytes, ref=ref)


def pack(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Distributes tensors over files of at most `max_bytes` of data; a larger tensor gets its own file.

    The order is kept, so that neighbours in the source stay neighbours and are copied together. Only within a
    file, wider dtypes are put first, so that every tensor is aligned.
    """
    files: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if files[-1] and size + piece.num_bytes > max_bytes:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += piece.num_bytes
    return [sorted(file, key=lambda piece: -_word_bytes(piece)) for file in files]


def _word_bytes(piece: Piece) -> int:
    entries = int(np.prod(piece.shape, dtype=object))
    return piece.num_bytes // entries if entries else 0


def shard_names(count: int) -> list[str]:
    """Returns the file names that transformers gives to `count` shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def header_of(pieces: Sequence[Piece], metadata: dict[str, str]) -> bytes:
    """Returns the first bytes, length and header, of a safetensors file with these tensors in this order."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for piece in pieces:
        entries[piece.name] = {
            "dtype": piece.dtype,
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + piece.num_bytes],
        }
        offset += piece.num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
