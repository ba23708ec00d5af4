"""Where a result comes from (code, packages, machine, seed), and hashes of files and settings.

No names of users, hosts or folders are recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from gradpruner.common.errors import DataError

# Packages whose version can change a result.
RECORDED_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "bitsandbytes",
    "trl",
)
_GIT_TIMEOUT_SECONDS = 10.0
_BLOCK = 2**18  # bytes hashed at a time
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def provenance(seed: int) -> dict[str, Any]:
    """Returns the conditions under which a run was made.

    Returns:
        `{"commit", "dirty", "python", "packages", "machine", "seed"}` as in run.json. `commit` and
        `dirty` are None unless the package runs from its own git checkout.
    """
    commit, dirty = source_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": package_versions(),
        "machine": machine(),
        "seed": seed,
    }


def source_state(folder: Path = _PACKAGE_FOLDER) -> tuple[str | None, bool | None]:
    """Returns the git commit of the sources in `folder`, and whether any file there is changed or untracked.

    Returns (None, None) without git, a checkout or a commit. The checkout must track the package itself: a
    copy installed inside another repository (a virtual environment in a project) must not report that
    project's commit.
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "--", "__init__.py")
    commit = _git(folder, "rev-parse", "--verify", "HEAD") if tracked is not None else None
    status = _git(folder, "status", "--porcelain", "--", ".") if commit is not None else None
    if commit is None or status is None:
        return None, None
    return commit.strip(), bool(status.strip())


def package_versions(names: Iterable[str] = RECORDED_PACKAGES) -> dict[str, str]:
    """Returns the version of every installed package in `names`; packages not installed are left out."""
    return {name: version for name in names if (version := _version_of(name)) is not None}


@cache
def _version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Returns the hardware: `{"cpu", "cores", "memory_bytes", "devices", "platform"}`.

    `cores` is the number of logical cores this process may use; `devices` lists the devices torch can use.
    """
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "devices": _torch_devices(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def utc_now() -> str:
    """Returns the current time in UTC, in ISO 8601 to the second: "2026-01-31T09:30:00Z"."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def sha256_file(path: str | Path, progress: Callable[[int], None] | None = None) -> str:
    """Returns the SHA-256 of a file's bytes, 64 hex digits. Reads in blocks, so files may be of any size.

    `progress` is called with the number of bytes hashed since the last call.

    Raises:
        DataError: If the file cannot be read.
    """
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                digest.update(block[:size])
                if progress is not None:
                    progress(size)
            return digest.hexdigest()
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror}.") from error


def sha256_json(value: Any) -> str:
    """Returns the SHA-256 of a JSON value in canonical form, 64 hex digits.

    The canonical form has sorted keys and no white space, and is UTF-8, so the order of keys does not
    matter. Tuples count as lists.

    Raises:
        ValueError: If the value holds NaN or Inf, which JSON does not have.
        TypeError: If the value holds types that JSON does not have.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_folder(files: str | Path | Iterable[str | Path]) -> str:
    """Returns one SHA-256 over the names and contents of several files, whatever their dates and order.

    Args:
        files: A folder, for all files below it, or a list of files. Names are taken relative to that folder,
            or to the deepest folder that holds all the files, so a moved copy has the same hash.

    Raises:
        DataError: If there are no files, or one cannot be read.
    """
    if isinstance(files, str | Path):
        root = Path(files)
        paths = [path for path in root.rglob("*") if path.is_file()]
    else:
        # Absolute but not resolved: a linked shard keeps its name in the folder.
        paths = [Path(os.path.abspath(path)) for path in files]
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
    if not paths:
        raise DataError(f"There are no files to hash in '{files}'.")
    return sha256_json({path.relative_to(root).as_posix(): sha256_file(path) for path in paths})


def _git(folder: Path, *arguments: str) -> str | None:
    """Returns the output of a git command, or None if it fails."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _cpu_name() -> str:
    """Returns the processor's marketing name if the system provides it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _torch_devices() -> list[str]:
    """Returns the accelerators with their names, or ["cpu"] if there are none."""
    import torch  # here, because run records can be read and hashed without torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]
