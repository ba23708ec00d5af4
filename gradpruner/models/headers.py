"""What a safetensors file holds and where, from its header alone, as the safetensors library reads it.

A pruned checkpoint is made by copying byte ranges of its source, so a wrong offset would become a wrong model
without anybody noticing. safetensors itself proves a header against the size of its file: every dtype, shape
and offset, no byte twice and none left over. So its tensors lie one behind the other in the order it names,
and their sizes give the offsets. Values are not looked at.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError, safe_open

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.common.files import shown

# All of safetensors 0.8; the small floats share bytes, so only some shapes fill whole ones.
DTYPE_BYTES: dict[str, int | Fraction] = {
    "F4": Fraction(1, 2),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), Fraction(3, 4)),
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
HEADER_LIMIT = 100_000_000  # bytes; the format's own
AGAIN = "Download or copy the file again."


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor on disk.

    Attributes:
        dtype: safetensors' name of its dtype, a key of `DTYPE_BYTES`.
        start: Absolute offset in the file of its first byte; `stop` is that behind its last.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data; 0 if an extent is 0."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What one safetensors file says about itself.

    Attributes:
        tensors: By name, in the order of their data; they cover the file from `data_start` to its end.
        metadata: The free strings of `__metadata__`.
    """

    path: Path
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def check_inside(folder: Path, path: Path) -> Path:
    """A file of a model folder with all links followed, none of which may leave the folder.

    A snapshot in the Hugging Face cache is made of links into `blobs` of the same repository, and since
    huggingface_hub 2 from there into the cache's shared `blobs`; these two are the only way out.

    Raises:
        IntegrityError: If the file is missing, or is or passes a link to elsewhere.
    """
    try:
        base, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise IntegrityError(f"{path} cannot be followed: {error}.", hint=AGAIN) from error
    if base in real.parents or _in_same_cache(base, real):
        return real
    raise IntegrityError(
        f"{path} leads to {real}, which is outside the model folder {folder}.",
        hint="Copy the file into the folder; only links within it, or into the blobs of its own Hugging Face "
        "cache, are followed.",
    )


def _in_same_cache(base: Path, real: Path) -> bool:
    """Whether `real` is a blob of the cached repository that `base` is a snapshot of."""
    for place in (base, *base.parents):
        repository = place.parent.parent
        if place.parent.name != "snapshots" or not repository.name.startswith("models--"):
            continue
        if real.parent == repository / "blobs":
            return True
        shared = repository.parent / "blobs" / real.name[:2] / real.name
        return real == shared and re.fullmatch("[0-9a-f]{64}", real.name) is not None
    return False


@contextmanager
def _open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a regular file and yields it with its size; our own errors instead of OSError."""

    def without_waiting(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # opening a pipe would wait for a writer

    try:
        with open(path, "rb", opener=without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError
            yield file, status.st_size
    except IsADirectoryError:
        raise IntegrityError(
            f"{path} is not a regular file.", hint="Weights and index must be ordinary files."
        ) from None
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}.", hint="Who may read it?") from error


def read_header(path: Path, root: Path | None = None) -> ShardHeader:
    """Reads the header of a safetensors file; its links must not leave `root`, where one is given.

    Raises:
        IntegrityError: If it is missing, is not safetensors, is cut off, or says anything that does not add
            up; the message says what was found.
        ModelError: If the operating system will not let us read it.
    """
    real = path if root is None else check_inside(root, path)
    with _open_regular(real) as (file, file_bytes):
        data_start = 8 + _header_length(path, file, file_bytes)
    try:
        with safe_open(real, framework="np") as opened:
            metadata = opened.metadata() or {}
            parts = [(name, opened.get_slice(name)) for name in opened.offset_keys()]
            kinds = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
    except SafetensorError as error:
        raise IntegrityError(
            f"{path} is damaged or cut off: {shown(str(error), 200)}.", hint=AGAIN
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", hint="Who may read it?") from error
    tensors, start = {}, data_start
    for name, dtype, shape in kinds:
        stop = start + int(math.prod(shape) * DTYPE_BYTES[dtype])
        tensors[name] = TensorRef(name, path, dtype, shape, start, stop)
        start = stop
    if start != file_bytes:  # it changed since, or this safetensors accepts what we do not know
        raise IntegrityError(f"{path} holds {file_bytes} bytes, its tensors end at {start}.", hint=AGAIN)
    return ShardHeader(path, tensors, metadata, data_start, file_bytes)


def _header_length(path: Path, file: BinaryIO, file_bytes: int) -> int:
    """Bytes of the header; the commonest damages are named here, in plainer words than the library has."""
    start = file.read(8)
    if start == b"version ":
        raise IntegrityError(f"{path} is a Git LFS pointer, not the weights.", hint="Run: git lfs pull")
    if len(start) < 8:
        raise IntegrityError(f"{path} has {file_bytes} bytes; a safetensors file has 8 at least.", hint=AGAIN)
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise IntegrityError(
            f"{path} claims a header of {length} bytes; {HEADER_LIMIT} are allowed.",
            hint="It is not a safetensors file, or damaged: download or copy it again.",
        )
    if length > file_bytes - 8:
        raise IntegrityError(
            f"{path} is cut off: its header alone needs {8 + length} bytes, the file has {file_bytes}.",
            hint=AGAIN,
        )
    return length
