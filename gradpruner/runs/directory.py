"""The run directory: one folder, one manifest, stages that are done once.

`manifest.json` holds the configuration, the hashes of the inputs and, per stage, a fingerprint of everything
it depends on, its state, versions, cost, result and the files it left. A stage whose fingerprint and files
are as recorded is skipped when the run is started again; anything else is done anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gradpruner._version import __version__
from gradpruner.errors import ConfigError, GradPrunerError, IntegrityError, ResourceError
from gradpruner.files import (
    is_write_failure,
    open_private,
    path_fault,
    read_json,
    refuse_links,
    shown,
    sweep,
    write_failure,
    write_json,
)
from gradpruner.models.folder import LOCK_FILE, check_output
from gradpruner.models.sizes import PeakMemory
from gradpruner.provenance import package_versions, sha256_file, sha256_json, utc_now

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
STATES = ("running", "done", "failed", "interrupted")
# Larger files are recognised by size alone: hashing tens of gigabytes on every start is not worth it.
HASHED_BYTES = 64 * 2**20


class RunDirectory:
    """A locked run directory; use as a context manager.

    Args:
        path: The folder; created when missing, refused when it holds something else.
        inputs: Folders the run reads, which it must not write into.
        device: Where stages run, for the memory they report.

    Raises:
        ConfigError: If the folder is not ours, is an input, or (on entering) another process works in it.
        IntegrityError: If (on entering) the manifest is damaged, or the folder holds a link that leads out.
    """

    def __init__(self, path: str | Path, *, inputs: tuple[Path, ...] = (), device: str | None = None) -> None:
        self.path = Path(path)
        self.device = device
        check_output(self.path, inputs=inputs, marker=MANIFEST)
        self.manifest: dict[str, Any] = {}
        self._versions = {"gradpruner": __version__, **package_versions()}
        self.visited: dict[str, str] = {}
        """Stages of this start, in order: "done", "skipped" or "failed"."""

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open_private(self.path / LOCK_FILE)
        except OSError as error:
            raise ResourceError(
                f"Cannot write to {self.path}: {error.strerror}.", hint="Choose another --out."
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise ConfigError(
                f"{self.path} is in use by process {holder}.", hint="Wait for it, or choose another --out."
            ) from None
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            refuse_links(self.path)
            self.manifest = self._read_manifest()
            for folder, _, _ in os.walk(self.path):
                sweep(Path(folder))
            self.save()
        except BaseException as error:
            self._lock.close()
            if isinstance(error, OSError):
                raise write_failure(self.path, error) from error
            raise
        return self

    def _read_manifest(self) -> dict[str, Any]:
        """What earlier starts left; only now, because the lock may have been waited for."""
        path = self.path / MANIFEST
        if not path.exists():
            return {"format_version": FORMAT_VERSION, "created": utc_now(), "stages": {}}
        manifest = read_json(path, "run manifest")
        found = manifest.get("format_version") if isinstance(manifest, dict) else None
        if type(found) is not int or found != FORMAT_VERSION:
            raise IntegrityError(
                f"{path} is not a manifest of format version {FORMAT_VERSION} (found: {shown(found)}).",
                hint="Choose another --out.",
            )
        stages = manifest.get("stages")
        fault = None if isinstance(stages, dict) else f"stages is {shown(stages)}; an object is needed"
        for name, entry in stages.items() if isinstance(stages, dict) else ():
            fault = fault or _stage_fault(name, entry)
        if fault:
            raise IntegrityError(f"{path} is not a manifest: {fault}.", hint="Choose another --out.")
        return dict(manifest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._lock.close()

    def describe(self, config: dict[str, Any], inputs: dict[str, str]) -> None:
        """Notes what this start works on.

        Args:
            config: The resolved recipe.
            inputs: Name of every input -> SHA-256 of its content.
        """
        self.manifest |= {"gradpruner_version": __version__, "config": config, "inputs": inputs}
        self.save()

    def save(self) -> None:
        """Writes the manifest."""
        write_json(self.path / MANIFEST, self.manifest)

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage name -> what is known of it, in the order first done."""
        stages: dict[str, dict[str, Any]] = self.manifest["stages"]
        return stages

    def is_current(self, name: str, inputs: Any) -> bool:
        """Whether a stage is done, with these inputs, and its files are still there."""
        entry = self.stages.get(name)
        if entry is None or entry["state"] != "done" or entry["inputs"] != sha256_json(inputs):
            return False
        return all(self._as_recorded(relative, seen) for relative, seen in entry["files"].items())

    def _as_recorded(self, relative: str, seen: dict[str, Any]) -> bool:
        path = self.path / relative
        if not path.is_file() or path.stat().st_size != seen["bytes"]:
            return False
        return "sha256" not in seen or sha256_file(path) == seen["sha256"]

    def stage(
        self,
        name: str,
        inputs: Any,
        work: Callable[[], dict[str, Any]],
        outputs: Sequence[str] = (),
        *,
        keep_partial: bool = False,
    ) -> dict[str, Any]:
        """Does a stage, or recalls its result when it is current.

        Args:
            name: The stage.
            inputs: JSON values of everything its result depends on.
            work: Does it and returns the result, JSON values.
            outputs: Files or folders it writes, relative to the run directory. What stands there from
                other inputs is removed first.
            keep_partial: Leave such files to `work` (checkpoints it can go on from) when the inputs
                are those of an interrupted attempt; its time is then part of the stage's.

        Returns:
            The result.
        """
        if self.is_current(name, inputs):
            log.info("%s: done before, skipped", name)
            self.visited[name] = "skipped"
            result: dict[str, Any] = self.stages[name]["result"]
            return result
        fingerprint = sha256_json(inputs)
        earlier = self.stages.get(name, {})
        resumable = keep_partial and earlier.get("inputs") == fingerprint
        if not resumable or earlier.get("state") == "done":
            self.remove(outputs)
            resumable = False
        # A killed start could not say how long it took: its seconds are missing, and "resumed" says so.
        before = float(earlier.get("seconds", 0.0)) if resumable else 0.0
        self.stages[name] = {
            "state": "running",
            "inputs": fingerprint,
            "versions": self._versions,
            "files": {},
            "seconds": before,
            "resumed": resumable,
        }
        self.save()
        started = time.perf_counter()
        log.info("%s", name)
        try:
            with PeakMemory(self.device) as memory:
                result = work()
        except BaseException as error:
            ours = _as_ours(error, self.path)
            self.stages[name]["seconds"] = before + time.perf_counter() - started
            self._note_failure(name, ours, interrupted=_is_interrupt(error))
            if ours is error:
                raise
            raise ours from error
        self.stages[name].update(
            state="done",
            seconds=before + time.perf_counter() - started,
            peak_memory_bytes=memory.peak_bytes,
            result=result,
            files={relative: self._describe(relative) for relative in self._files(outputs)},
        )
        self.visited[name] = "done"
        self.save()
        return result

    def _note_failure(self, name: str, error: BaseException, *, interrupted: bool) -> None:
        self.stages[name].update(state="interrupted" if interrupted else "failed", error=str(error))
        self.visited[name] = "failed"
        with contextlib.suppress(ResourceError):  # a full disk; the first error says more
            self.save()

    def remove(self, outputs: Sequence[str]) -> None:
        """Deletes outputs of a stage."""
        for relative in outputs:
            path = self.path / relative
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _files(self, outputs: Sequence[str]) -> list[str]:
        files: list[Path] = []
        for relative in outputs:
            path = self.path / relative
            files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        return [str(path.relative_to(self.path)) for path in files if path.is_file()]

    def _describe(self, relative: str) -> dict[str, Any]:
        path = self.path / relative
        size = path.stat().st_size
        return {"bytes": size} | ({"sha256": sha256_file(path)} if size <= HASHED_BYTES else {})


def _stage_fault(name: str, entry: Any) -> str | None:
    """What is wrong with a manifest's entry of a stage, or None."""
    if not isinstance(entry, dict) or not isinstance(entry.get("inputs"), str):
        return f"stage {shown(name)} is {shown(entry)}; an object with state, inputs and files is needed"
    state, files = entry.get("state"), entry.get("files")
    if state not in STATES:
        return f"stage {shown(name)}: state is {shown(state)}; one of {', '.join(STATES)} is needed"
    if state == "done" and not isinstance(entry.get("result"), dict):
        return f"stage {shown(name)}: result is {shown(entry.get('result'))}; an object is needed"
    seconds = entry.get("seconds", 0.0)
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or seconds < 0:
        return f"stage {shown(name)}: seconds is {shown(seconds)}; a number of at least 0 is needed"
    if not isinstance(files, dict):
        return f"stage {shown(name)}: files is {shown(files)}; an object is needed"
    for relative, seen in files.items():
        path = Path(relative)
        if ".." in path.parts or path.is_absolute() or path_fault(path) is not None:
            return f"stage {shown(name)} names the file {shown(relative)}, which is not in the folder"
        if not isinstance(seen, dict) or type(seen.get("bytes")) is not int:
            return f"stage {shown(name)}: the file {shown(relative)} has no size"
        if not isinstance(seen.get("sha256", ""), str):
            return f"stage {shown(name)}: the file {shown(relative)} has a hash that is none"
    return None


def _is_interrupt(error: BaseException) -> bool:
    """Whether a person or the system stopped the process, rather than the work failing."""
    return not isinstance(error, Exception)


def _as_ours(error: BaseException, folder: Path) -> BaseException:
    """Out-of-memory and full-disk errors in words; anything else as it is."""
    if isinstance(error, GradPrunerError):
        return error
    # torch says "out of memory" on accelerators and "can't allocate memory" on the CPU.
    allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if allocation or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ResourceError(
            f"Out of memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}",
            hint="Lower the batch size (and raise accumulation), shorten max_length, or use "
            "gradient_checkpointing.",
        )
    if is_write_failure(error) and not isinstance(error, FileNotFoundError):
        return write_failure(folder, error)
    return error
