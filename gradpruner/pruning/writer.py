"""Writes safetensors files from tensors of other files: the kernel copies them, and they are never in memory.

A second thread reads back what is written while the next range is copied or other work is done: it hashes
the file, looks for NaN and Inf, and flushes it to disk. All three cost processor time but hardly wall time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.common.files import make_durable
from gradpruner.models.headers import TensorRef
from gradpruner.models.shards import INDEX_FILE
from gradpruner.pruning.checked import CHECK_BYTES, ReadBack, holds_non_finite, non_finite, reading
from gradpruner.pruning.pieces import TORCH_DTYPES, Piece, header_of, shard_names

_COPY_BYTES = 64 << 20  # copied at a time: progress moves, and the second thread can follow
_READ_BYTES = 8 << 20  # read at a time if the kernel cannot copy


@dataclass(frozen=True)
class WrittenShard:
    """A written file, with the hash of its whole content."""

    name: str
    sha256: str
    num_bytes: int


def write_shards(
    folder: Path,
    files: Sequence[Sequence[Piece]],
    metadata: dict[str, str],
    reader: Executor,
    progress: Callable[[int], None] | None = None,
) -> list[Future[WrittenShard]]:
    """Writes the files and, if there is more than one, the index that transformers looks for.

    Memory: two blocks of half a megabyte, and that of computing one tensor. `reader` is the thread of
    `reading()`; `progress` is called with the number of bytes written since the last call.

    Returns:
        Futures of the files, which complete or raise once a file is read back and flushed to disk.

    Raises:
        IntegrityError: If a tensor holds NaN or Inf, or the source ends before its header says.
        OSError: If the disk is full.
    """
    names = shard_names(len(files))
    checks = [
        _write(folder / name, pieces, metadata, reader, progress)
        for name, pieces in zip(names, files, strict=True)
    ]

    def finish(name: str, check: ReadBack) -> WrittenShard:
        digest, path = check.digest(), folder / name
        make_durable(path)
        return WrittenShard(name, digest, path.stat().st_size)

    if len(files) > 1:
        weight_map = {piece.name: name for name, pieces in zip(names, files, strict=True) for piece in pieces}
        total = sum(piece.num_bytes for pieces in files for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [reader.submit(finish, name, check) for name, check in zip(names, checks, strict=True)]


def write_file(
    path: Path,
    pieces: Sequence[Piece],
    metadata: dict[str, str],
    progress: Callable[[int], None] | None = None,
    header: bytes | None = None,
) -> str:
    """Writes one safetensors file; returns the SHA-256 of the file as read back from disk.

    `header`, its length included, is written instead of one made from the pieces and `metadata`; the pieces
    are then plain bytes (U8).
    """
    with reading() as reader:
        return _write(path, pieces, metadata, reader, progress, header).digest()


def _write(
    path: Path,
    pieces: Sequence[Piece],
    metadata: dict[str, str],
    reader: Executor,
    progress: Callable[[int], None] | None,
    header: bytes | None = None,
) -> ReadBack:
    """Writes one file; returns its check, which may still be reading."""
    header = header_of(pieces, metadata) if header is None else header
    with ExitStack() as stack:
        out = stack.enter_context(path.open("wb", buffering=0)).fileno()
        check = ReadBack(path, len(header), pieces, reader)
        _write_all(out, header)
        check.follow(len(header))
        position = len(header)
        sources: dict[Path, BinaryIO] = {}
        for run in _runs(pieces):
            first = run[0].ref
            if first is None:
                assert run[0].make is not None
                steps: Iterator[int] = _write_tensor(out, run[0].make())
            else:
                if first.file not in sources:
                    sources[first.file] = stack.enter_context(open_source(first.file))
                length = sum(piece.num_bytes for piece in run)
                steps = _copy(sources[first.file], first.start, length, out, first.file)
            for step in steps:
                position += step
                check.follow(position)
                if progress is not None:
                    progress(step)
        return check


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yields groups of neighbours in the output that are also neighbours in one source file."""
    run: list[Piece] = []
    for piece in pieces:
        last = run[-1].ref if run else None
        joined = last and piece.ref and last.file == piece.ref.file and last.stop == piece.ref.start
        if run and not joined:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


def _copy(source: BinaryIO, start: int, length: int, out: int, path: Path) -> Iterator[int]:
    """Copies a range, in the kernel if possible; yields the number of bytes after every step.

    If the kernel cannot copy (another file system, an old kernel, a full disk, the end of the file), reading
    and writing either works or raises an error that says which of the two failed.
    """
    by_kernel = hasattr(os, "copy_file_range")
    done = 0
    while done < length:
        want = min(_COPY_BYTES, length - done)
        count = 0
        if by_kernel:
            try:
                count = os.copy_file_range(source.fileno(), out, want, start + done)
            except OSError:
                by_kernel = False
        if count == 0:  # also what file systems answer that cannot copy
            data = bytearray(min(want, _READ_BYTES))
            fill(data, source, start + done, path)
            _write_all(out, data)
            count = len(data)
        done += count
        yield count


def open_source(path: Path) -> BinaryIO:
    """Opens a weight file for `fill`."""
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def fill(data: bytearray | memoryview, source: BinaryIO, start: int, path: Path) -> None:
    """Fills `data` with the bytes from `start` of an open file.

    Raises:
        IntegrityError: If the file has become shorter.
        ModelError: If it cannot be read.
    """
    view = memoryview(data)
    try:
        while view:
            count = os.preadv(source.fileno(), [view], start)
            if not count:
                raise IntegrityError(
                    f"{path} became shorter while it was read.",
                    hint="Is another program writing to it?",
                )
            view, start = view[count:], start + count
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path} cannot be read: {error.strerror or error}.", hint="Was it moved or deleted?")


def _write_tensor(out: int, tensor: Tensor) -> Iterator[int]:
    data = _bytes_of(tensor.contiguous()).data
    for start in range(0, len(data), _COPY_BYTES):
        block = data[start : start + _COPY_BYTES]
        _write_all(out, block)
        yield len(block)


def _bytes_of(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(-1).view(torch.uint8).numpy()


def sha256_tensor(tensor: Tensor) -> str:
    """Returns the SHA-256 of a tensor's bytes, as they are in a file."""
    return hashlib.sha256(_bytes_of(tensor.contiguous()).data).hexdigest()


def _write_all(out: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def read_tensor(ref: TensorRef, *, finite: bool = False) -> Tensor:
    """Reads one tensor into memory of its own; `finite` refuses NaN and Inf.

    Raises:
        IntegrityError: If the file has become shorter, or holds NaN or Inf that are refused.
        ModelError: If it cannot be read.
    """
    tensor = torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype])
    data = _bytes_of(tensor)
    with open_source(ref.file) as file:
        fill(data.data, file, ref.start, ref.file)
    if finite:
        scratch = np.empty(CHECK_BYTES, np.uint8)
        blocks = (data[start : start + CHECK_BYTES] for start in range(0, data.size, CHECK_BYTES))
        if any(holds_non_finite(block, ref.dtype, scratch) for block in blocks):
            raise non_finite(ref.name, ref)
    return tensor


def same_bytes(one: TensorRef, other: TensorRef, digest: Any = None) -> bool:
    """Returns whether two tensors on disk hold the same bytes; adds the bytes to the hash `digest`, if any.

    Raises:
        IntegrityError: If a file has become shorter.
        ModelError: If a file cannot be read.
    """
    if one.num_bytes != other.num_bytes:
        return False
    here, there = (bytearray(min(CHECK_BYTES, one.num_bytes)) for _ in range(2))
    with open_source(one.file) as first, open_source(other.file) as second:
        for done in range(0, one.num_bytes, CHECK_BYTES):
            size = min(
                CHECK_BYTES, one.num_bytes - done
            )  # the rest of the buffers is from the last block, and equal
            fill(memoryview(here)[:size], first, one.start + done, one.file)
            fill(memoryview(there)[:size], second, other.start + done, other.file)
            if here != there:
                return False
            if digest is not None:
                digest.update(memoryview(here)[:size])
    return True
