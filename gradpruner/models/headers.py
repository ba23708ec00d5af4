"""Reads which tensors a safetensors file holds, and where, from the header that the library has checked.

A pruned checkpoint is made by copying byte ranges of its source, so a wrong offset would silently make a
wrong model. The safetensors library checks a header against the size of the file: every dtype, shape and
offset, no byte used twice and none left over. So the tensors lie one after the other in the order of their
offsets, and their sizes give the offsets. Values are not read.
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
from gradpruner.common.printing import shown

# All dtypes of safetensors 0.8. The small floats share bytes, so only some shapes fill whole bytes.
DTYPE_BYTES: dict[str, int | Fraction] = {
    "F4": Fraction(1, 2),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), Fraction(3, 4)),
    **dict.fromkeys(("BOOL", "U8", "I8"), 1),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
AGAIN = "Download or copy the file again."
PERMISSION = "Check the permissions of the file."


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor on disk.

    Attributes:
        dtype: The name safetensors gives its dtype, a key of `DTYPE_BYTES`.
        start: Offset of its first byte from the start of the file; `stop` is one past its last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes of data; 0 if a dimension is 0."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The header of one safetensors file.

    Attributes:
        tensors: By name, in the order of their data; they cover the file from `data_start` to its end.
        metadata: The strings of `__metadata__`.
    """

    path: Path
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    data_start: int
    file_bytes: int


def check_inside(folder: Path, path: Path) -> Path:
    """Follows all links of a file in a model folder, and refuses links that lead out of the folder.

    A snapshot in the Hugging Face cache consists of links into `blobs` of the same repository, and since
    huggingface_hub 2 from there into the cache's shared `blobs`. Only these two may lead out.

    Raises:
        IntegrityError: If the file is missing, or a link leads elsewhere.
    """
    try:
        base, real = folder.resolve(strict=True), path.resolve(strict=True)
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise IntegrityError(f"The link {path} cannot be followed: {error}.", hint=AGAIN) from error
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
    """Opens a regular file and yields it with its size; turns OSError into our own errors."""

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
            f"{path} is not a regular file.", hint="Weights and index must be regular files."
        ) from None
    except FileNotFoundError:
        raise IntegrityError(f"{path} is missing.", hint="Is the download complete?") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"{path} cannot be read: {reason}.", hint=PERMISSION) from error


def read_header(path: Path, root: Path | None = None) -> ShardHeader:
    """Reads the header of a safetensors file. Its links must not leave `root`, if given.

    Raises:
        IntegrityError: If the file is missing, not safetensors, cut off or inconsistent; the message says
            what was found.
        ModelError: If the operating system does not let us read it.
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
        raise ModelError(f"{path} cannot be read: {error}.", hint=PERMISSION) from error
    tensors, start = {}, data_start
    for name, dtype, shape in kinds:
        stop = start + int(math.prod(shape) * DTYPE_BYTES[dtype])
        tensors[name] = TensorRef(name, path, dtype, shape, start, stop)
        start = stop
    if start != file_bytes:  # the file has changed, or this safetensors accepts what older ones refused
        raise IntegrityError(f"{path} holds {file_bytes} bytes, but its tensors end at {start}.", hint=AGAIN)
    return ShardHeader(path, tensors, metadata, data_start, file_bytes)


def _header_length(path: Path, file: BinaryIO, file_bytes: int) -> int:
    """Returns the bytes of the header; names common damage in plainer words than the library."""
    start = file.read(8)
    if start == b"version ":
        raise IntegrityError(f"{path} is a Git LFS pointer, not the weights.", hint="Run: git lfs pull")
    if len(start) < 8:
        raise IntegrityError(f"{path} has {file_bytes} bytes; a safetensors file has at least 8.", hint=AGAIN)
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise IntegrityError(
            f"{path} claims a header of {length} bytes; at most {HEADER_LIMIT} are allowed.",
            hint="The file is damaged, or not a safetensors file: download or copy it again.",
        )
    if length > file_bytes - 8:
        raise IntegrityError(
            f"{path} is cut off: its header alone needs {8 + length} bytes, the file has {file_bytes}.",
            hint=AGAIN,
        )
    return length
