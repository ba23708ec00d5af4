"""Writing safetensors files from pieces of others: copied by the kernel, read back, never held in memory.

What is written is read back by a second thread while the next range is copied: it hashes the file and looks
for NaN and Inf, so both cost a core and hardly any time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gradpruner.errors import IntegrityError, ModelError
from gradpruner.models.shards import INDEX_FILE, SINGLE_FILE, TensorRef

TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""safetensors' name of a dtype -> torch's, for those that can be computed with."""

# NaN and Inf have all exponent bits set. Shifted left by one (the sign leaves), such a word is at least this.
_NOT_FINITE: dict[str, tuple[Any, int]] = {
    "BF16": (np.uint16, 0xFF00),
    "F16": (np.uint16, 0xF800),
    "F32": (np.uint32, 0xFF00_0000),
    "C64": (np.uint32, 0xFF00_0000),
    "F64": (np.uint64, 0xFFE0_0000_0000_0000),
    "F8_E5M2": (np.uint8, 0xF8),
    "F8_E4M3": (np.uint8, 0xFE),  # has no Inf, and one NaN
}
_COPY_BYTES = 64 << 20  # copied at a time, so that progress moves and the check can follow
_CHECK_BYTES = 512 << 10  # looked at at a time: stays in cache between hashing and scanning
_BACKLOG = 8  # ranges copied but not yet checked
_READ_BYTES = 8 << 20  # read at a time where the kernel cannot copy


@dataclass(frozen=True)
class Piece:
    """One tensor of a file to be written.

    Attributes:
        name: Its name there.
        dtype: safetensors' name of its dtype.
        shape: Its extents.
        num_bytes: Its size.
        ref: Where its bytes are copied from; None when it is computed.
        make: Computes it when its turn comes; None when it is copied.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    ref: TensorRef | None = None
    make: Callable[[], Tensor] | None = None

    @classmethod
    def copied(cls, name: str, ref: TensorRef) -> Piece:
        """A tensor whose bytes stay as they are."""
        return cls(name, ref.dtype, ref.shape, ref.num_bytes, ref=ref)


@dataclass(frozen=True)
class WrittenShard:
    """A file that was written.

    Attributes:
        name: File name.
        sha256: Hash of the whole file.
        num_bytes: Its size.
        tensors: The names of its tensors.
    """

    name: str
    sha256: str
    num_bytes: int
    tensors: tuple[str, ...]


def pack(pieces: Sequence[Piece], max_bytes: int) -> list[list[Piece]]:
    """Distributes tensors over files of at most `max_bytes` of data; a larger tensor gets one of its own.

    Order is kept, so that neighbours in the source stay neighbours and are copied in one go; only within a
    file are wider dtypes put first, so that every tensor is aligned.
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
    """The file names transformers uses for so many shards."""
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def header_of(pieces: Sequence[Piece], metadata: dict[str, str]) -> bytes:
    """The length and the header of a safetensors file that holds these tensors in this order."""
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


def write_shards(
    folder: Path,
    files: Sequence[Sequence[Piece]],
    metadata: dict[str, str],
    progress: Callable[[int], None] | None = None,
) -> list[WrittenShard]:
    """Writes the files and, if there is more than one, the index that transformers looks for.

    Memory: two blocks of half a megabyte, and what one computed tensor takes.

    Args:
        folder: Where to.
        files: The tensors of each file, in order.
        metadata: The free strings of every header ("format": "pt").
        progress: Called with the number of bytes written since the last call.

    Raises:
        IntegrityError: If a tensor holds NaN or Inf, or the source ends before its header says.
        OSError: If the disk is full.
    """
    written = []
    for name, pieces in zip(shard_names(len(files)), files, strict=True):
        digest = write_file(folder / name, pieces, metadata, progress)
        size = (folder / name).stat().st_size
        written.append(WrittenShard(name, digest, size, tuple(piece.name for piece in pieces)))
    if len(files) > 1:
        weight_map = {tensor: shard.name for shard in written for tensor in shard.tensors}
        total = sum(piece.num_bytes for pieces in files for piece in pieces)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def write_file(
    path: Path,
    pieces: Sequence[Piece],
    metadata: dict[str, str],
    progress: Callable[[int], None] | None = None,
    header: bytes | None = None,
) -> str:
    """Writes one safetensors file; returns the SHA-256 of what stands on disk.

    `header` is written instead of one made from the pieces and `metadata`, length included.
    """
    header = header_of(pieces, metadata) if header is None else header
    with ExitStack() as stack:
        out = stack.enter_context(path.open("wb", buffering=0)).fileno()
        check = stack.enter_context(_Check(path, len(header), pieces))
        _write_all(out, header)
        check.follow(len(header))
        position = len(header)
        sources: dict[Path, int] = {}
        for run in _runs(pieces):
            first = run[0].ref
            if first is None:
                assert run[0].make is not None
                steps: Iterator[int] = _write_tensor(out, run[0].make())
            else:
                if first.file not in sources:
                    sources[first.file] = stack.enter_context(_open_source(first.file)).fileno()
                length = sum(piece.num_bytes for piece in run)
                steps = _copy(sources[first.file], first.start, length, out, first.file)
            for step in steps:
                position += step
                check.follow(position)
                if progress is not None:
                    progress(step)
        return check.result()


def _runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Neighbours in the output that are neighbours in the same source file, together."""
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


def _copy(source: int, start: int, length: int, out: int, path: Path) -> Iterator[int]:
    """Copies a range, by the kernel where it can; yields the bytes of every step.

    Whatever keeps the kernel from it (another file system, an old kernel, a full disk, the end of the file),
    reading and writing either works or says which of the two failed.
    """
    by_kernel = hasattr(os, "copy_file_range")
    done = 0
    while done < length:
        want = min(_COPY_BYTES, length - done)
        count = 0
        if by_kernel:
            try:
                count = os.copy_file_range(source, out, want, start + done)
            except OSError:
                by_kernel = False
        if count == 0:  # also what some file systems answer that cannot
            data = _read(source, min(want, _READ_BYTES), start + done, path)
            _write_all(out, data)
            count = len(data)
        done += count
        yield count


def _open_source(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def _read(source: int, count: int, start: int, path: Path) -> bytes:
    """At least one byte and at most `count`."""
    try:
        data = os.pread(source, count, start)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not data:
        raise IntegrityError(
            f"{path} ended while it was read; it became shorter.", hint="Is something still writing to it?"
        )
    return data


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
    """SHA-256 of a tensor's bytes, as they stand in a file."""
    return hashlib.sha256(_bytes_of(tensor.contiguous()).data).hexdigest()


def _write_all(out: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


def read_tensor(ref: TensorRef, *, finite: bool = False) -> Tensor:
    """Reads one tensor into memory of its own.

    Args:
        ref: The tensor.
        finite: Refuse NaN and Inf.

    Raises:
        IntegrityError: If the file became shorter, or for NaN and Inf.
        ModelError: If it cannot be read.
    """
    tensor = torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype])
    data, done = _bytes_of(tensor), 0
    with _open_source(ref.file) as file:
        while done < data.size:
            part = _read(file.fileno(), min(_CHECK_BYTES, data.size - done), ref.start + done, ref.file)
            data[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
    if finite:
        scratch = np.empty(_CHECK_BYTES, np.uint8)
        blocks = (data[start : start + _CHECK_BYTES] for start in range(0, data.size, _CHECK_BYTES))
        if any(_holds_non_finite(block, ref.dtype, scratch) for block in blocks):
            raise _non_finite(ref.name, ref)
    return tensor


def _holds_non_finite(data: np.ndarray[Any, Any], dtype: str, scratch: np.ndarray[Any, Any]) -> bool:
    """Whether bytes that are whole entries of one dtype hold NaN or Inf."""
    if dtype not in _NOT_FINITE or not data.size:
        return False
    word, least = _NOT_FINITE[dtype]
    shifted = scratch[: data.size].view(word)
    np.left_shift(data.view(word), 1, out=shifted)
    return int(shifted.max()) >= least


def _word_size(dtype: str) -> int:
    return np.dtype(_NOT_FINITE[dtype][0]).itemsize if dtype in _NOT_FINITE else 1


def _non_finite(name: str, ref: TensorRef | None) -> IntegrityError:
    if ref is None:
        return IntegrityError(
            f"The tensor '{name}' became NaN or Inf when it was computed.",
            hint="Merged weights may be too large for their dtype: use rule norm_preserving, or drop layers.",
        )
    return IntegrityError(
        f"The tensor '{ref.name}' in {ref.file} holds NaN or Inf.",
        hint="The source checkpoint is damaged; a model with such weights cannot work.",
    )


class _Check:
    """Follows a file that is being written: hashes it and refuses NaN and Inf."""

    def __init__(self, path: Path, data_start: int, pieces: Sequence[Piece]) -> None:
        self.path = path
        self._spans: deque[tuple[int, int, Piece]] = deque()
        for piece in pieces:
            self._spans.append((data_start, data_start + piece.num_bytes, piece))
            data_start += piece.num_bytes
        self._hash = hashlib.sha256()
        self._done = 0
        self._pending: deque[Future[None]] = deque()
        self._buffer = bytearray(_CHECK_BYTES)
        self._begun = b""
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._scratch = np.empty(_CHECK_BYTES, np.uint8)

    def __enter__(self) -> _Check:
        self._file = self.path.open("rb", buffering=0)
        self._pool = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._file.close()

    def follow(self, position: int) -> None:
        """The file is written up to here; waits if the check is far behind."""
        self._pending.append(self._pool.submit(self._read_to, position))
        while len(self._pending) > _BACKLOG:
            self._pending.popleft().result()

    def result(self) -> str:
        """Waits for the end; the SHA-256 of the file."""
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()

    def _read_to(self, position: int) -> None:
        while self._done < position:
            view = memoryview(self._buffer)[: min(_CHECK_BYTES, position - self._done)]
            filled = 0
            while filled < len(view):
                count = self._file.readinto(view[filled:])
                if not count:
                    raise IntegrityError(f"{self.path} is shorter than what was written to it.")
                filled += count
            self._hash.update(view)
            self._scan(self._done, self._done + len(view))
            self._done += len(view)

    def _scan(self, start: int, stop: int) -> None:
        """Looks at the bytes from `start` to `stop` of the file, which are in the buffer."""
        while self._spans and self._spans[0][0] < stop:
            first, last, piece = self._spans[0]
            word = _word_size(piece.dtype)
            data = self._bytes[max(first, start) - start : min(last, stop) - start]
            if self._begun:  # a word that the block before ended in; only in headers we did not make
                rest = data[: word - len(self._begun)]
                data = data[rest.size :]
                self._begun += rest.tobytes()
                if len(self._begun) == word:
                    self._refuse_non_finite(np.frombuffer(self._begun, np.uint8), piece)
                    self._begun = b""
            whole = data.size - data.size % word
            self._refuse_non_finite(data[:whole], piece)
            self._begun += data[whole:].tobytes()
            if last > stop:
                return
            self._spans.popleft()

    def _refuse_non_finite(self, data: np.ndarray[Any, Any], piece: Piece) -> None:
        if _holds_non_finite(data, piece.dtype, self._scratch):
            raise _non_finite(piece.name, piece.ref)
