"""Reading back what is being written: its hash, and the first number that is NaN or infinite."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from gradpruner.errors import IntegrityError
from gradpruner.models.headers import TensorRef
from gradpruner.pruning.pieces import Piece

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


CHECK_BYTES = 512 << 10  # looked at at a time: stays in cache between hashing and scanning


_BACKLOG = 8  # ranges copied but not yet checked


def holds_non_finite(data: np.ndarray[Any, Any], dtype: str, scratch: np.ndarray[Any, Any]) -> bool:
    """Whether bytes that are whole entries of one dtype hold NaN or Inf."""
    if dtype not in _NOT_FINITE or not data.size:
        return False
    word, least = _NOT_FINITE[dtype]
    shifted = scratch[: data.size].view(word)
    np.left_shift(data.view(word), 1, out=shifted)
    return int(shifted.max()) >= least


def _word_size(dtype: str) -> int:
    return np.dtype(_NOT_FINITE[dtype][0]).itemsize if dtype in _NOT_FINITE else 1


def non_finite(name: str, ref: TensorRef | None) -> IntegrityError:
    """The error for a tensor with NaN or Inf, in the source (`ref`) or computed here."""
    if ref is None:
        return IntegrityError(
            f"The tensor '{name}' became NaN or Inf when it was computed.",
            hint="Merged weights may be too large for their dtype: use rule norm_preserving, or drop layers.",
        )
    return IntegrityError(
        f"The tensor '{ref.name}' in {ref.file} holds NaN or Inf.",
        hint="The source checkpoint is damaged; a model with such weights cannot work.",
    )


class ReadBack:
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
        self._buffer = bytearray(CHECK_BYTES)
        self._begun = b""
        self._bytes = np.frombuffer(self._buffer, np.uint8)
        self._scratch = np.empty(CHECK_BYTES, np.uint8)

    def __enter__(self) -> ReadBack:
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
            view = memoryview(self._buffer)[: min(CHECK_BYTES, position - self._done)]
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
        if holds_non_finite(data, piece.dtype, self._scratch):
            raise non_finite(piece.name, piece.ref)
