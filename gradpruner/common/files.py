"""Writing files so that a reader sees the old content or the new one, never half of it.

What is not finished yet has a random name (`.NAME.RANDOM.part`) and a lock that its writer holds. A process
number would not do: two containers that share a disk may have the same one. What nobody holds is an orphan.
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
from typing import IO, TYPE_CHECKING, Any

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

# No file of ours comes near; a larger one is not ours and would only fill the memory.
JSON_LIMIT = 512 * 2**20
# What the process that works in a run directory, or in the folder of a study, holds.
LOCK_FILE = ".lock"
_STAGED = re.compile(r"\..+\.[0-9a-f]+\.part", re.DOTALL)
# Bytes of a name that are kept in that of its staged file; a file system allows 255 for the whole.
_NAME_BYTES = 200


def make_durable(path: Path) -> None:
    """Gives a file ordinary permissions and makes its content survive a power cut."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # safetensors creates its files readable by the owner only
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _commit(staged: Path, path: Path) -> None:
    """Moves `staged` over `path`, durably."""
    make_durable(staged)
    os.replace(staged, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _short(name: str) -> str:
    """A file name, or its hash where a staged name made of it would be too long."""
    raw = os.fsencode(name)
    return name if len(raw) <= _NAME_BYTES else hashlib.sha256(raw).hexdigest()[:32]


def staging_name(name: str, kind: str = "") -> str:
    """A new name, never used before, for something that is to become `name`."""
    return f".{_short(name)}{kind}.{secrets.token_hex(8)}.part"


def _hold(descriptor: int) -> bool:
    """Locks an open file or folder; False if somebody else holds it, or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_held(descriptor: int) -> bool:
    """Whether somebody else holds an open file; if not, it is held from now on, until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks cannot say
        return False
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds an existing file or folder, so that no sweep takes it for an orphan.

    Raises:
        OSError: If it cannot be opened, or is a link.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        _hold(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def staging(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A new, empty file or folder beside `path`, held until the block ends and removed if it is still there.

    Raises:
        OSError: If it cannot be made.
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
        os.close(descriptor)  # swept between the making and the holding
    try:
        yield staged
    finally:
        remove(staged)
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a file, a link (not what it points at) or a folder; nothing happens if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sweep(folder: Path, name: str | None = None) -> list[Path]:
    """Removes staged files and folders that nobody holds: what killed processes left behind.

    Looks in the folder, not below; with a name, only for what was to become it. Returns what was removed.
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
        except OSError:  # a link, or not ours to read
            continue
        try:
            if _hold(descriptor) and _is_at(descriptor, entry):
                remove(entry)
                removed.append(entry)
        finally:
            os.close(descriptor)
    return removed


def open_private(path: Path) -> IO[str]:
    """Opens a text file for reading and writing at its end, if it is a plain file with this one name.

    A folder may come from somebody else. A link in it, or a second name of another file, would make us write
    where nobody asked us to.

    Raises:
        IntegrityError: If it is a link, a device, a pipe, or has a second name.
        OSError: If it cannot be opened.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise _not_plain(path, "a link or no plain file") from None
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise _not_plain(path, "no plain file" if found.st_nlink <= 1 else "a second name of another file")
    return os.fdopen(descriptor, "a+", encoding="utf-8")


@contextmanager
def working_in(folder: Path, name: str = LOCK_FILE, *, shared: bool = False) -> Iterator[None]:
    """Holds an existing folder by its lock file, so that no second process works in it.

    With `shared`, others may hold it too, if they also say so.

    Raises:
        ConfigError: If another process holds it.
        IntegrityError: If the lock is a link or no plain file.
        ResourceError: If it cannot be written.
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


def _not_plain(path: Path, what: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is {what}; nothing is written through it.",
        hint="Delete it, if you know the folder it is in; else choose another --out.",
    )


def refuse_links(folder: Path) -> None:
    """Raises IntegrityError if something below a folder is a link that leads out of it.

    Whoever writes into the folder would write there.
    """
    root = os.path.realpath(folder)
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(where, name)
            if not os.path.islink(path):
                continue
            target = os.path.realpath(path)
            if target != root and os.path.commonpath((root, target)) != root:
                raise IntegrityError(
                    f"{path} is a link out of the folder, to {target}; nothing is written through it.",
                    hint="Delete the link, or put what it points at in its place.",
                )


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step (UTF-8).

    Raises:
        ResourceError: If it cannot be written; what stood there before is untouched.
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
    """The content of a plain file, links to one included.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is a folder, a pipe or a device, or has more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe that nobody feeds would be waited for
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a plain file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(descriptor)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data


def path_fault(path: Path) -> str | None:
    """Why a path cannot be used, in a few words (too long, NUL, a circle of links); None if it can."""
    try:
        str(path).encode("utf-8")
        path.lstat()
        path.exists()
    except UnicodeEncodeError:
        return "its name is not UTF-8 text"
    except ValueError:
        return "its name holds a NUL character"
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return str(error.strerror)
    return None


def shown(value: Any, length: int = 60) -> str:
    """A value somebody gave, in a message: one line, not endless, nothing a terminal would act on."""
    text = ascii(value) if not isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def readable_bytes(count: float) -> str:
    """A number of bytes for people, in binary units: 17179869184 is '16.0 GiB'."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        scaled = count / 1024**power
        if abs(scaled) >= 0.9995:
            digits = 0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f} {unit}"
    return f"{count:.0f} B"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step.

    Raises:
        ResourceError: If it cannot be written; what stood there before is untouched.
    """
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own: safetensors itself writes to a file of another name first.
        with staging(path, folder=True) as staged:
            save_file(dict(tensors), staged / "tensors", metadata=metadata)
            _commit(staged / "tensors", path)
    except BaseException as error:
        if is_write_failure(error):
            raise write_failure(path, error) from error
        raise


def is_write_failure(error: BaseException) -> bool:
    """Whether an error is the operating system refusing to write.

    safetensors wraps it in a type of its own, torch's zip writer in a bare RuntimeError.
    """
    if isinstance(error, OSError):
        return True
    kind, text = type(error).__name__, str(error)
    return (kind == "SafetensorError" and "os error" in text) or "PytorchStreamWriter failed" in text


def write_failure(path: Path, error: BaseException) -> ResourceError:
    """Such an error as ours: what could not be written, why, and what to do."""
    reason = str(getattr(error, "strerror", None) or error).rstrip(".")
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in reason
    hint = "The disk is full: free some space and start again." if full else "Is the folder writable?"
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        hint = "Choose a shorter name: most disks allow 255 bytes."
    return ResourceError(f"Cannot write {path}: {reason}.", hint=hint)


def unusable(error: OSError) -> GradPrunerError:
    """An error of the operating system as ours; names the file or folder where it is known."""
    if error.filename is None:
        return ResourceError(f"{type(error).__name__}: {str(error).rstrip('.')}.")
    message = f"{shown(str(error.filename), 200)} cannot be used: {error.strerror}."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return ConfigError(message, hint="Give another path; every part of it may have 255 bytes.")
    return ResourceError(message, hint="Is the path right, and may it be read and written?")


def check_free_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ResourceError unless the disk under `folder` has `needed_bytes` to spare."""
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise ResourceError(
            f"{what} needs {readable_bytes(needed_bytes)} in {folder}; {readable_bytes(free)} are free.",
            hint="Free some space or choose another --out.",
        )
