"""The run directory: one folder, one manifest, stages that are done once.

`manifest.json` holds the configuration, the hashes of the inputs and, per stage, a fingerprint of everything
it depends on, its state, versions, cost, result and the files it left. A stage whose fingerprint and files
are as recorded is skipped when the run is started again; anything else is done anew.
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

from gradpruner._version import __version__
from gradpruner.common.errors import GradPrunerError, IntegrityError, ResourceError
from gradpruner.common.files import (
    is_write_failure,
    path_fault,
    refuse_links,
    shown,
    sweep,
    unusable,
    working_in,
    write_failure,
)
from gradpruner.common.json_files import read_versioned, write_json
from gradpruner.common.provenance import package_versions, sha256_file, sha256_json, utc_now
from gradpruner.models.folder import check_output
from gradpruner.models.memory import PeakMemory
from gradpruner.runs.pulse import Pulse

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# Larger files are recognised by size alone: hashing tens of gigabytes on every start is not worth it.
HASHED_BYTES = 64 * 2**20


class SeenFile(TypedDict):
    """A file as a stage left it."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: NotRequired[str]


class StageEntry(TypedDict):
    """What the manifest says of a stage."""

    state: Literal["running", "done", "failed", "interrupted"]
    inputs: str
    """Fingerprint of everything its result depends on."""
    recipe: NotRequired[str]
    """Key in `recipes`: for which it was last done."""
    versions: NotRequired[dict[str, str]]
    files: dict[str, SeenFile]
    seconds: NotRequired[Annotated[float, Field(ge=0)]]
    resumed: NotRequired[bool]
    """Whether it went on from where an interrupted start was; the seconds of a killed one are missing."""
    peak_memory_bytes: NotRequired[int | None]
    result: NotRequired[dict[str, Any]]
    error: NotRequired[str]


class Manifest(TypedDict):
    """What manifest.json says."""

    created: str
    stages: dict[str, StageEntry]
    gradpruner_version: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    """The recipe of the last start."""
    recipes: NotRequired[dict[str, dict[str, Any]]]
    """Every recipe some stage was done for, by a short hash."""
    inputs: NotRequired[dict[str, str]]


@dataclass(frozen=True)
class Stage:
    """One arrow of a run: what it depends on, what it writes, and the work itself.

    Attributes:
        name: In the manifest.
        inputs: JSON values of everything its result depends on.
        work: Does it and returns the result, JSON values.
        outputs: Files or folders it writes, relative to the run directory. What stands there from other
            inputs is removed first.
        resumes: Whether `work` goes on from what an interrupted attempt with the same inputs left
            (checkpoints); the time of that attempt is then part of the stage's.
        step: How far a run has to go to do it, one of `plan_names.STAGES`.
    """

    name: str
    inputs: Any
    work: Callable[[], dict[str, Any]]
    outputs: Sequence[str] = ()
    resumes: bool = False
    step: str = ""


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
        self.manifest: Manifest
        self._recipe = ""
        self._versions = {"gradpruner": __version__, **package_versions()}
        self.visited: dict[str, str] = {}
        """Stages of this start, in order: "done", "skipped" or "failed"."""

    def __enter__(self) -> RunDirectory:
        with contextlib.ExitStack() as opened:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                opened.enter_context(working_in(self.path))
                refuse_links(self.path)
                self.manifest = {"created": utc_now(), "stages": {}}
                if (self.path / MANIFEST).exists():  # asked only now: another process may have worked here
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
        """Notes what this start works on: the resolved recipe, and the SHA-256 of every input by its name."""
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
        """Stage name -> what is known of it, in the order first done."""
        return self.manifest["stages"]

    def result(self, name: str) -> dict[str, Any] | None:
        """What a stage found, with whatever inputs, if it is done."""
        entry = self.stages.get(name)
        return entry["result"] if entry is not None and entry["state"] == "done" else None

    def recipe_of(self, name: str) -> dict[str, Any]:
        """The recipe a stage was last done for; {} if that is not known."""
        entry = self.stages.get(name)
        return self.manifest.get("recipes", {}).get(entry.get("recipe", ""), {}) if entry else {}

    def is_done(self, name: str, inputs: Any) -> bool:
        """Whether a stage is done, with these inputs; its files may be gone or changed."""
        entry = self.stages.get(name)
        return entry is not None and entry["state"] == "done" and entry["inputs"] == fingerprint(inputs)

    def is_current(self, stage: Stage) -> bool:
        """Whether a stage is done, with these inputs, and its files are still there."""
        return self.is_done(stage.name, stage.inputs) and self.has_files(stage.name)

    def has_files(self, name: str) -> bool:
        """Whether the files of a stage are as it left them."""
        files = self.stages[name]["files"].items()
        return all((self.path / path).is_file() and self._describe(path) == seen for path, seen in files)

    def forget(self, names: Iterable[str]) -> None:
        """Takes stages out: what they were about is there no longer."""
        for name in names:
            self.stages.pop(name, None)

    def ensure(self, stage: Stage) -> dict[str, Any]:
        """The result of a stage, which is done now unless it is current."""
        name = stage.name
        if self.is_current(stage):
            log.info("%s: done before, skipped", name)
            self.visited[name] = "skipped"
            return self.stages[name]["result"]
        asked = fingerprint(stage.inputs)
        earlier = self.stages.get(name)
        before, resumed = 0.0, False
        if stage.resumes and earlier and earlier["inputs"] == asked and earlier["state"] != "done":
            # A killed start could not say how long it took: its seconds are missing, and "resumed" says so.
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
            # Not an Exception: a person or the system stopped the process.
            entry["state"] = "failed" if isinstance(error, Exception) else "interrupted"
            entry["error"] = str(ours)
            self.visited[name] = "failed"
            with contextlib.suppress(ResourceError):  # a full disk; the first error says more
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

    def _describe(self, relative: str) -> SeenFile:
        path = self.path / relative
        size = path.stat().st_size
        return {"bytes": size, "sha256": sha256_file(path)} if size <= HASHED_BYTES else {"bytes": size}


def fingerprint(inputs: Any) -> str:
    """Hash of what a stage depends on; 32 and 32.0 are the same number, whatever a file made of it."""
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
    """What is wrong with a manifest's entry of a stage beyond its types, or None."""
    if entry["state"] == "done" and "result" not in entry:
        return f"stage {shown(name)} is done and has no result"
    for relative in entry["files"]:
        if not stays_inside(relative):
            return f"stage {shown(name)} names the file {shown(relative)}, which is not in the folder"
    return None


def stays_inside(relative: str) -> bool:
    """Whether a path that a file names can be one in the run directory."""
    path = Path(relative)
    return ".." not in path.parts and not path.is_absolute() and path_fault(path) is None


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether the system refused to write into a folder, as far as the error says."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return True
    named = error.filename
    return isinstance(named, str | Path) and Path(named).absolute().is_relative_to(folder.absolute())


def _as_ours(error: BaseException, folder: Path) -> BaseException:
    """Errors of memory, disk and files in words; anything else as it is."""
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
    if isinstance(error, OSError) and not _is_of(error, folder):
        return unusable(error)
    if is_write_failure(error):
        return write_failure(folder, error)
    return error
