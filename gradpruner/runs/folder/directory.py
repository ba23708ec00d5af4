"""The run directory: one folder, one manifest, and stages that are done once.

`manifest.json` holds the recipe, the hashes of the inputs and, for each stage, a fingerprint of everything it
depends on, its state, versions, cost, result and files. When a run starts again, a stage is skipped if its
fingerprint and its files are unchanged; all others are done again.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal, NotRequired

import torch
from pydantic import Field
from typing_extensions import TypedDict

from gradpruner.common.errors import GradPrunerError, IntegrityError, ResourceError
from gradpruner.common.files import (
    is_write_failure,
    os_failure,
    path_fault,
    refuse_links,
    sweep,
    working_in,
    write_failure,
)
from gradpruner.common.json_files import read_versioned, write_json
from gradpruner.common.memory import PeakMemory
from gradpruner.common.printing import shown
from gradpruner.common.provenance import package_versions, sha256_file, sha256_json, utc_now
from gradpruner.common.version import __version__
from gradpruner.models.folder import check_output
from gradpruner.runs.folder.pulse import Pulse

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# Larger files are compared by size alone: hashing tens of gigabytes at every start takes too long.
HASHED_BYTES = 64 * 2**20


class SeenFile(TypedDict):
    """A file that a stage wrote."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: NotRequired[str]


class StageEntry(TypedDict):
    """What the manifest says about a stage."""

    state: Literal["running", "done", "failed", "interrupted"]
    inputs: str
    """Fingerprint of everything the result depends on."""
    recipe: NotRequired[str]
    """The recipe the stage was last done for, as a key of `recipes`."""
    versions: NotRequired[dict[str, str]]
    files: dict[str, SeenFile]
    seconds: NotRequired[Annotated[float, Field(ge=0)]]
    resumed: NotRequired[bool]
    """Whether it resumed an interrupted start. If that start was killed, its seconds are missing."""
    peak_memory_bytes: NotRequired[int | None]
    result: NotRequired[dict[str, Any]]
    conditions: NotRequired[str]
    """See `Stage.conditions`."""
    error: NotRequired[str]


class Manifest(TypedDict):
    """What manifest.json says."""

    created: str
    stages: dict[str, StageEntry]
    gradpruner_version: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    """The recipe of the last start."""
    recipes: NotRequired[dict[str, dict[str, Any]]]
    """The recipes the stages were done for, by a short hash."""
    inputs: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Stage:
    """One stage of a run: what it depends on, what it writes, and the work itself.

    Attributes:
        name: Name in the manifest.
        inputs: JSON values of everything the result depends on.
        work: Does the work and returns the result as JSON values.
        outputs: Files or folders it writes, relative to the run directory. Old ones are removed first.
        resumes: Whether `work` can resume an interrupted attempt with the same inputs from what it left, such
            as checkpoints. The old outputs then stay, and the time of that attempt is added.
        step: The step of a run it belongs to, one of `plan_names.STAGES`.
        conditions: Hash of what results of different rows must have in common to be compared; "" for nothing.
    """

    name: str
    inputs: Any
    work: Callable[[], dict[str, Any]]
    outputs: Sequence[str] = ()
    resumes: bool = False
    step: str = ""
    conditions: str = ""


class RunDirectory:
    """A locked run directory; use as a context manager.

    Args:
        path: The folder; created if it is missing.
        inputs: Folders the run reads; the run directory must not be one of them or lie inside one.
        device: Device the stages run on, whose peak memory is measured.

    Raises:
        ConfigError: If the folder holds something else, is an input or, on entering, is used by another
            process.
        IntegrityError: On entering, if the manifest is damaged, or a link leads out of the folder.
    """

    def __init__(self, path: str | Path, *, inputs: tuple[Path, ...] = (), device: str | None = None) -> None:
        self.path = Path(path)
        self.device = device
        check_output(self.path, inputs=inputs, marker=MANIFEST)
        self.manifest: Manifest
        self._recipe = ""
        self._versions = {"gradpruner": __version__, **package_versions()}
        self.visited: dict[str, str] = {}
        """Stage of this start -> "done", "skipped" or "failed"; in order."""

    def __enter__(self) -> RunDirectory:
        with contextlib.ExitStack() as opened:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                opened.enter_context(working_in(self.path))
                refuse_links(self.path)
                self.manifest = {"created": utc_now(), "stages": {}}
                # Read under the lock: another process may have worked here until now.
                if (self.path / MANIFEST).exists():
                    self.manifest = read_manifest(self.path / MANIFEST)
                for folder, _, _ in os.walk(self.path):
                    sweep(Path(folder))
                self.save()
                self._pulse = opened.enter_context(Pulse(self.path, MANIFEST))
            except OSError as error:
                raise write_failure(self.path, error) from error
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._opened.close()

    def describe(self, config: dict[str, Any], inputs: dict[str, str]) -> None:
        """Writes the resolved recipe and the SHA-256 of each input, by name, into the manifest."""
        self._recipe = sha256_json(config)[:16]
        self.manifest["gradpruner_version"] = __version__
        self.manifest["config"], self.manifest["inputs"] = config, inputs
        self.manifest.setdefault("recipes", {})[self._recipe] = config
        used = {self._recipe, *(entry.get("recipe") for entry in self.stages.values())}
        recipes = self.manifest["recipes"]
        self.manifest["recipes"] = {name: recipe for name, recipe in recipes.items() if name in used}
        self.save()

    def save(self) -> None:
        """Writes the manifest."""
        write_manifest(self.path, self.manifest)

    @property
    def stages(self) -> dict[str, StageEntry]:
        """Stage name -> its entry in the manifest, in the order in which stages were first begun."""
        return self.manifest["stages"]

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a stage if it is done, with any inputs; else None."""
        entry = self.stages.get(name)
        return entry["result"] if entry is not None and entry["state"] == "done" else None

    def recipe_of(self, name: str) -> dict[str, Any]:
        """The recipe a stage was last done for; {} if it is not known."""
        entry = self.stages.get(name)
        return self.manifest.get("recipes", {}).get(entry.get("recipe", ""), {}) if entry else {}

    def conditions_of(self, name: str) -> str:
        """What a stage's result must have in common with another to be compared; "" if that is not known."""
        entry = self.stages.get(name)
        return entry.get("conditions", "") if entry else ""

    def is_done(self, name: str, inputs: Any) -> bool:
        """Whether a stage is done with these inputs; its files may be missing or changed."""
        entry = self.stages.get(name)
        return entry is not None and entry["state"] == "done" and entry["inputs"] == inputs_hash(inputs)

    def is_current(self, stage: Stage) -> bool:
        """Whether a stage is done with its inputs and its files are unchanged."""
        return self.is_done(stage.name, stage.inputs) and self.has_files(stage.name)

    def has_files(self, name: str) -> bool:
        """Whether the files of a stage are there and unchanged."""
        files = self.stages[name]["files"].items()
        return all((self.path / path).is_file() and self._describe(path) == seen for path, seen in files)

    def discard(self, names: Iterable[str]) -> None:
        """Deletes stages from the manifest, and the files they wrote."""
        gone = [self.stages.pop(name) for name in names]
        if not gone:
            return
        self.save()  # first: a file that the manifest does not know does no harm
        for relative in (relative for entry in gone for relative in entry["files"]):
            path = self.path / relative
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # once a folder is not empty, those above are not either
                for folder in path.parents:
                    folder.rmdir()

    def ensure(self, stage: Stage) -> dict[str, Any]:
        """Does a stage unless it is current; returns its result."""
        name = stage.name
        if self.is_current(stage):
            if name not in self.visited:  # else it was done in this start
                log.info("%s: done before, skipped", name)
                self.visited[name] = "skipped"
                if self.conditions_of(name) != stage.conditions:
                    self.stages[name]["conditions"] = stage.conditions
                    self.save()
            return self.stages[name]["result"]
        asked = inputs_hash(stage.inputs)
        earlier = self.stages.get(name)
        before, resumed = 0.0, False
        if stage.resumes and earlier and earlier["inputs"] == asked and earlier["state"] != "done":
            # A killed start could not write its seconds; they are missing, and "resumed" tells the reader.
            before, resumed = float(earlier.get("seconds", 0.0)), True
        else:
            self.remove(stage.outputs)
        entry = self.stages[name] = {
            "state": "running",
            "inputs": asked,
            "recipe": self._recipe,
            "versions": self._versions,
            "files": {},
            "seconds": before,
            "resumed": resumed,
            "conditions": stage.conditions,
        }
        self.save()
        started = time.perf_counter()
        self._pulse.begin(name)
        log.info("%s", name)
        try:
            with PeakMemory(self.device) as memory:
                result = stage.work()
        except BaseException as error:
            ours = _as_ours(error, self.path)
            entry["seconds"] = before + time.perf_counter() - started
            # Anything but an Exception means that a user or the system stopped the process.
            entry["state"] = "failed" if isinstance(error, Exception) else "interrupted"
            entry["error"] = str(ours)
            self.visited[name] = "failed"
            with contextlib.suppress(ResourceError):  # on a full disk, the first error matters more
                self.save()
            if ours is error:
                raise
            raise ours from error
        entry["seconds"] = before + time.perf_counter() - started
        entry["peak_memory_bytes"], entry["result"] = memory.peak_bytes, result
        entry["files"] = {relative: self._describe(relative) for relative in self._files(stage.outputs)}
        entry["state"] = "done"
        self.visited[name] = "done"
        self.save()
        return result

    def remove(self, outputs: Sequence[str]) -> None:
        """Deletes files and folders, given relative to the run directory."""
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

    def _describe(self, relative: str) -> SeenFile:
        path = self.path / relative
        size = path.stat().st_size
        return {"bytes": size, "sha256": sha256_file(path)} if size <= HASHED_BYTES else {"bytes": size}


def unfinished_stages(folder: Path) -> dict[str, str]:
    """Returns the stages of a run directory that were begun and are not done -> their state."""
    stages = read_manifest(folder / MANIFEST)["stages"] if (folder / MANIFEST).is_file() else {}
    return {name: entry["state"] for name, entry in stages.items() if entry["state"] != "done"}


def inputs_hash(inputs: Any) -> str:
    """Returns a hash of what a stage depends on; 32 and 32.0 count as the same number."""
    return sha256_json(_plain_numbers(inputs))


def _plain_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_numbers(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes the manifest of a run directory."""
    write_json(folder / MANIFEST, {"format_version": FORMAT_VERSION, **manifest})


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        IntegrityError: If it is missing, of another version, or holds values a manifest cannot have.
    """
    manifest = read_versioned(path, "run manifest", Manifest, FORMAT_VERSION, "Choose another --out.")
    for name, entry in manifest["stages"].items():
        fault = _stage_fault(name, entry)
        if fault:
            raise IntegrityError(f"{path} is not a manifest: {fault}.", hint="Choose another --out.")
    return manifest


def _stage_fault(name: str, entry: StageEntry) -> str | None:
    """What is wrong with a stage's entry besides types; None if nothing is."""
    if entry["state"] == "done" and "result" not in entry:
        return f"stage {shown(name)} is done and has no result"
    for relative in entry["files"]:
        if not stays_inside(relative):
            return f"stage {shown(name)} names the file {shown(relative)}, which is not in the folder"
    return None


def stays_inside(relative: str) -> bool:
    """Whether a relative path stays inside the folder it is relative to."""
    path = Path(relative)
    return ".." not in path.parts and not path.is_absolute() and path_fault(path) is None


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether an error is about writing into the folder, as far as it says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    named = error.filename
    return isinstance(named, str | Path) and Path(named).absolute().is_relative_to(folder.absolute())


def _as_ours(error: BaseException, folder: Path) -> BaseException:
    """Turns errors of memory, disk and files into errors of this package; returns others unchanged."""
    if isinstance(error, GradPrunerError):
        return error
    # torch says "out of memory" on accelerators and "can't allocate memory" on the CPU.
    allocation = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if allocation or isinstance(error, torch.OutOfMemoryError | MemoryError):
        said = str(error).splitlines()[0].rstrip(".") if str(error) else "allocation failed"
        return ResourceError(
            f"Out of memory: {said}.",
            hint="Lower the batch size (and raise accumulation), shorten max_length, or use "
            "gradient_checkpointing.",
        )
    if isinstance(error, OSError) and not _is_of(error, folder):
        return os_failure(error)
    if is_write_failure(error):
        return write_failure(folder, error)
    return error
