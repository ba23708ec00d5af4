"""Atomic file writes: a reader sees the old content or the new content, never a half-written file.

While a file or folder is being written, it has a random name (`.NAME.RANDOM.part`) and its writer holds a
lock on it. An unlocked one was left behind by a killed process, and `sweep` removes it. A process id in the
name could not replace the lock, because two containers that share a disk may use the same id.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, ResourceError
from gradpruner.common.printing import readable_bytes, shown

if TYPE_CHECKING:
    from torch import Tensor

# Our own JSON files stay far below this limit. Reading a larger file would only fill the memory.
JSON_LIMIT = 512 * 2**20
# The process that works in a run directory or study folder locks this file in it.
LOCK_FILE = ".lock"
_STAGED = re.compile(r"\..+\.[0-9a-f]+\.part", re.DOTALL)
# Longer names are hashed in the name of a staged file, because a file system allows 255 bytes for a name.
_NAME_BYTES = 200


def make_durable(path: Path) -> None:
    """Gives a file the default permissions and flushes its content to disk."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # safetensors creates files that only the owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _commit(staged: Path, path: Path) -> None:
    """Moves `staged` to `path`, replacing any file there, and flushes both to disk."""
    make_durable(staged)
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flushes the entries of `folder` to disk, so that renames in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(name: str) -> str:
    """Returns a file name, or its hash if a staged name made from it would be too long."""
    raw = os.fsencode(name)
    return name if len(raw) <= _NAME_BYTES else hashlib.sha256(raw).hexdigest()[:32]


def staging_name(name: str, kind: str = "") -> str:
    """Returns a random name for a file or folder that will be renamed to `name`."""
    return f".{_short(name)}{kind}.{secrets.token_hex(8)}.part"


def _hold(descriptor: int) -> bool:
    """Locks an open file or folder. Returns False if it is locked already or cannot be locked at all."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_held(descriptor: int) -> bool:
    """Returns whether someone else has locked an open file. If not, locks the file until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks, so there is no way to know
        return False
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Locks an existing file or folder during the block, so that `sweep` does not remove it.

    Raises:
        OSError: If the path cannot be opened, or is a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _hold(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Creates an empty file or folder next to `path` and locks it during the block.

    Afterwards, it is removed if it still has its temporary name.

    Raises:
        OSError: If it cannot be created.
    """
    while True:
        staged = path.with_name(staging_name(path.name))
        if folder:
            staged.mkdir()
            descriptor = os.open(staged, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        else:
            descriptor = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        _hold(descriptor)
        if _is_at(descriptor, staged):
            break
        os.close(descriptor)  # another process swept it before the lock was taken
    try:
        yield staged
    finally:
        remove(staged)
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file, a folder, or a link (not its target). Does nothing if the path does not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Removes unlocked staged files and folders, which killed processes left behind.

    Looks at direct children of `folder` only. With `name`, removes only those that were to become `name`.

    Returns:
        The removed paths.
    """
    pattern = _STAGED
    if name is not None:
        pattern = re.compile(rf"\.{re.escape(_short(name))}(\.old)?\.[0-9a-f]+\.part")
    removed = []
    for entry in sorted(folder.iterdir()):
        if not pattern.fullmatch(entry.name):
            continue
        try:
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # a link, or not readable
            continue
        try:
            if _hold(descriptor) and _is_at(descriptor, entry):
                remove(entry)
                removed.append(entry)
        finally:
            os.close(descriptor)
    return removed


def open_private(path: Path) -> IO[str]:
    """Opens a text file for reading and appending, if it is a regular file without other hard links.

    The folder may come from someone else. A symbolic or hard link in it could make us write to any other
    file.

    Raises:
        IntegrityError: If the path is a link, a device or a pipe, or the file has other hard links.
        OSError: If the file cannot be opened.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise _not_private(path, "a link or not a regular file") from None
        raise
    found = os.fstat(descriptor)
    regular = stat.S_ISREG(found.st_mode)
    if not regular or found.st_nlink > 1:
        os.close(descriptor)
        raise _not_private(path, "a hard link to another file" if regular else "not a regular file")
    return os.fdopen(descriptor, "a+", encoding="utf-8")


@contextmanager
def working_in(folder: Path, name: str = LOCK_FILE, *, shared: bool = False) -> Iterator[None]:
    """Locks an existing folder during the block, so that no other process works in it.

    Args:
        folder: The folder.
        name: Name of the lock file in it.
        shared: Whether other processes may hold the lock too, if they also ask for a shared lock.

    Raises:
        ConfigError: If another process holds the lock.
        IntegrityError: If the lock file is a link or not a regular file.
        ResourceError: If the lock file cannot be written.
    """
    try:
        lock = open_private(folder / name)
    except OSError as error:
        raise ResourceError(
            f"Cannot write to {folder}: {error.strerror}.", hint="Choose another --out."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read(20).strip()
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise ConfigError(
                f"{folder} is in use by {who}.", hint="Wait for it, or choose another --out."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _not_private(path: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is {what}, so nothing is written to it.",
        hint="Delete it if the folder is your own; otherwise choose another --out.",
    )


def refuse_links(folder: Path) -> None:
    """Raises IntegrityError if any link below `folder` leads out of it: writes could follow the link."""
    root = os.path.realpath(folder)
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(where, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if target != root and os.path.commonpath((root, target)) != root:
                raise IntegrityError(
                    f"{path} is a link out of the folder, to {target}, so nothing is written to it.",
                    hint="Delete the link, or replace it by the file or folder it points to.",
                )


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically (UTF-8).

    Raises:
        ResourceError: If the file cannot be written; an existing file stays unchanged.
    """
    data = text.encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging(path) as staged:
            staged.write_bytes(data)
            _commit(staged, path)
    except OSError as error:
        raise write_failure(path, error) from error


def read_plain(path: Path, limit: int = JSON_LIMIT) -> bytes:
    """Returns the content of a regular file. Follows links.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the path is a folder, a pipe or a device, or the file has more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe without a writer would block
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def folder_bytes(folder: Path, without: Path | None = None) -> int:
    """Returns the total size in bytes of all files below `folder`, except those below `without`.

    Another process may be writing there: what vanishes meanwhile is not counted.
    """
    total = 0
    for where, folders, names in os.walk(folder):
        if Path(where) == without:
            folders.clear()
            continue
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(where, name)).st_size
    return total


def path_fault(path: Path) -> str | None:
    """Returns why a path cannot be used (too long, a NUL character, circular links), or None if it can."""
    try:
        str(path).encode("utf-8")
        path.lstat()
        path.exists()
    except UnicodeEncodeError:
        return "its name is not UTF-8 text"
    except ValueError:
        return "its name contains a NUL character"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return str(error.strerror)
    return None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file atomically.

    Raises:
        ResourceError: If the file cannot be written; an existing file stays unchanged.
    """
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file gets a folder of its own, because safetensors first writes to another name next to it.
        with staging(path, folder=True) as staged:
            save_file(dict(tensors), staged / "tensors", metadata=metadata)
            _commit(staged / "tensors", path)
    except BaseException as error:
        if is_write_failure(error):
            raise write_failure(path, error) from error
        raise


def is_write_failure(error: BaseException) -> bool:
    """Returns whether an error means that the operating system refused to write.

    safetensors wraps such an OSError in its own type, and torch's zip writer in a bare RuntimeError.
    """
    if isinstance(error, OSError):
        return True
    kind, text = type(error).__name__, str(error)
    return (kind == "SafetensorError" and "os error" in text) or "PytorchStreamWriter failed" in text


def write_failure(path: Path, error: BaseException) -> ResourceError:
    """Returns a ResourceError that says which path could not be written, why, and what to do."""
    reason = str(getattr(error, "strerror", None) or error).rstrip(".")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason
    hint = "The disk is full: free some space and start again." if full else "Is the folder writable?"
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        hint = "Choose a shorter name: most file systems allow 255 bytes."
    return ResourceError(f"Cannot write {path}: {reason}.", hint=hint)


def os_failure(error: OSError) -> GradPrunerError:
    """Converts an OSError to an error of this package that names the file or folder, if known."""
    if error.filename is None:
        return ResourceError(f"{type(error).__name__}: {str(error).rstrip('.')}.")
    message = f"{shown(str(error.filename), 200)} cannot be used: {error.strerror}."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return ConfigError(message, hint="Give another path; each part may have at most 255 bytes.")
    return ResourceError(message, hint="Is the path right? Do you have permission to read and write it?")


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ResourceError unless the disk that holds `folder` has `needed_bytes` free.

    `what` names the thing to be written, for the message.
    """
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"{what} needs {readable_bytes(needed_bytes)} in {folder}; {readable_bytes(free)} are free.",
            hint="Free some space or choose another --out.",
        )
