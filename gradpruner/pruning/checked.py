"""Reads a file back while it is being written: hashes it, and refuses NaN and Inf."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gradpruner.common.errors import IntegrityError
from gradpruner.models.headers import TensorRef
from gradpruner.pruning.pieces import Piece

# NaN and Inf have all exponent bits set: shifted left by one, which drops the sign, they are at least this.
_NOT_FINITE: dict[str, tuple[Any, int]] = {
    "BF16": (np.uint16, 0xFF00),
    "F16": (np.uint16, 0xF800),
    "F32": (np.uint32, 0xFF00_0000),
    "C64": (np.uint32, 0xFF00_0000),
    "F64": (np.uint64, 0xFFE0_0000_0000_0000),
    "F8_E5M2": (np.uint8, 0xF8),
    "F8_E4M3": (np.uint8, 0xFE),  # has no Inf, and one NaN
}


CHECK_BYTES = 512 << 10  # read at a time, a multiple of 8: stays in cache between hashing and scanning
_BACKLOG = 8  # ranges that may wait, written but not yet checked


def holds_non_finite(data: np.ndarray[Any, Any], dtype: str, scratch: np.ndarray[Any, Any]) -> bool:
    """Returns whether the numbers of one dtype, given as bytes, include NaN or Inf."""
    if dtype not in _NOT_FINITE or not data.size:
        return False
    word, least = _NOT_FINITE[dtype]
    shifted = scratch[: data.size].view(word)
    np.left_shift(data.view(word), 1, out=shifted)
    return int(shifted.max()) >= least


def non_finite(name: str, ref: TensorRef | None) -> IntegrityError:
    """Returns the error for NaN or Inf in a tensor: read from the source at `ref`, or computed if None."""
    if ref is None:
        return IntegrityError(
            f"The tensor '{name}' became NaN or Inf when it was computed.",
            hint="Merged weights may be too large for their dtype: use rule norm_preserving, or drop layers.",
        )
    return IntegrityError(
        f"The tensor '{ref.name}' in {ref.file} holds NaN or Inf.",
        hint="The source checkpoint is damaged; a model with such weights cannot work.",
    )


@contextmanager
def reading() -> Iterator[Executor]:
    """Yields a thread for reading files back; work it has not begun when the block ends is cancelled."""
    pool = ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class ReadBack:
    """Reads a file in a thread while it is being written; hashes it and refuses NaN and Inf."""

    def __init__(self, path: Path, data_start: int, pieces: Sequence[Piece], reader: Executor) -> None:
        self.path, self._reader = path, reader
        self._spans: deque[tuple[int, int, Piece]] = deque()
        for piece in pieces:
            self._spans.append((data_start, data_start + piece.num_bytes, piece))
            data_start += piece.num_bytes
        self._hash = hashlib.sha256()
        self._done = 0
        self._pending: deque[Future[None]] = deque()

    def follow(self, position: int) -> None:
        """Checks the file up to `position`, where writing has arrived; waits if checking is far behind."""
        self._pending.append(self._reader.submit(self._read_to, position))
        while len(self._pending) > _BACKLOG:
            self._pending.popleft().result()

    def digest(self) -> str:
        """Waits until the whole file is checked, and returns its SHA-256."""
        while self._pending:
            self._pending.popleft().result()
        return self._hash.hexdigest()

    def _read_to(self, position: int) -> None:
        block, scratch = np.empty((2, CHECK_BYTES), np.uint8)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._done)
            while (stop := self._number_boundary(min(self._done + CHECK_BYTES, position))) > self._done:
                data = block[: stop - self._done]
                view = data.data
                filled = 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise IntegrityError(f"{self.path} is shorter than what was written to it.")
                    filled += count
                self._hash.update(view)
                self._scan(data, self._done, scratch)
                self._done += len(view)

    def _number_boundary(self, position: int) -> int:
        """Returns the last position up to `position` that splits no number; headers may end anywhere."""
        for first, last, piece in self._spans:
            if position <= first:
                break
            if position < last and piece.dtype in _NOT_FINITE:
                word: int = np.dtype(_NOT_FINITE[piece.dtype][0]).itemsize
                return position - (position - first) % word
        return position

    def _scan(self, read: np.ndarray[Any, Any], start: int, scratch: np.ndarray[Any, Any]) -> None:
        """Looks for NaN and Inf in bytes that were read from `start` on."""
        stop = start + read.size
        while self._spans and self._spans[0][0] < stop:
            first, last, piece = self._spans[0]
            data = read[max(first, start) - start : min(last, stop) - start]
            if holds_non_finite(data, piece.dtype, scratch):
                raise non_finite(piece.name, piece.ref)
            if last > stop:
                return
            self._spans.popleft()
