"""Writing files so that a reader sees the old content or the new one, never half of it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpruner.errors import IntegrityError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _commit(staged: Path, path: Path) -> None:
    """Gives `staged` ordinary permissions and moves it over `path`, durably."""
    os.chmod(staged, 0o666 & ~_umask())  # safetensors creates its files readable by the owner only
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step (UTF-8)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        staged.write_text(text, encoding="utf-8")
        _commit(staged, path)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise ResourceError(f"Cannot write {path}: {error.strerror or error}.") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in one step; NaN and Inf are refused because JSON has neither."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, kind: str) -> Any:
    """Reads a JSON file this package wrote.

    Args:
        path: The file.
        kind: What it is, for the message ("pruning plan").

    Raises:
        IntegrityError: If it is missing or not JSON; the message gives line and column.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IntegrityError(f"There is no {kind} at {path}.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path} is not a readable {kind}: {error}.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), staged, metadata=metadata)
        _commit(staged, path)
    except Exception as error:  # safetensors wraps the operating system's errors in its own type
        staged.unlink(missing_ok=True)
        raise ResourceError(f"Cannot write {path}: {error}.") from error


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ResourceError unless the disk under `folder` has `needed_bytes` to spare."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"{what} needs {needed_bytes / 1e9:.2f} GB in {folder}; {free / 1e9:.2f} GB are free.",
            hint="Free some space or choose another --out.",
        )
