"""Finds the runs and studies below a folder, in their current state; takes no locks and follows no links.

A folder may be half written, or written by somebody else: what cannot be read is reported as a fault, not
raised.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, Field

from gradpruner.common.errors import GradPrunerError
from gradpruner.common.files import LOCK_FILE
from gradpruner.common.json_files import read_object
from gradpruner.common.printing import counted, number, text
from gradpruner.common.run_names import StageName
from gradpruner.reports.fields import Each, JsonPart, Named, Number, count
from gradpruner.reports.record import PENDING, StageRecord
from gradpruner.reports.view import LONGEST_ERROR, View, pairs, read

REPORT = "report.html"
RUNNING, DONE, STOPPED, FAILED, DAMAGED = "running", "done", "stopped", "failed", "damaged"
_RESUME = "run the same command to resume."
# A running process writes progress.json at least every five seconds.
_ALIVE_SECONDS = 20.0
_DEPTH, _MOST_FOLDERS = 6, 5000
_TRAINS = ("finetune", "recover")
Curve = list[tuple[float, float]]


class Manifest(JsonPart):
    """The parts of manifest.json that are shown."""

    title: Any = Field(default=None, validation_alias=AliasPath("config", "title"))
    stages: Annotated[dict[str, StageRecord], Named] = {}


class Now(JsonPart):
    """progress.json: what a run is doing now. `left` is in seconds, `began` a Unix time."""

    stage: Any = None
    doing: Any = None
    step: Number = None
    steps: Number = None
    left: Number = None
    loss: Number = None
    tokens_per_second: Number = None
    began: Number = None
    losses: Annotated[list[Any], Each] = []


@dataclass(frozen=True)
class Found:
    """A run or a study.

    Attributes:
        name: Path relative to the folder that is shown; '.' for the folder itself.
        state: RUNNING, DONE, STOPPED, FAILED or DAMAGED.
        fault: Why it failed, stopped or cannot be read.
        now: What it is doing; None unless it is running.
        curves: While it runs: row -> its losses so far, (step, loss).
        report: Its report.html, if there is one.
        changed: Unix time at which it last wrote a record.
    """

    name: str
    state: str
    fault: str = ""
    view: View | None = None
    now: Now | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    report: Path | None = None
    changed: float = 0.0


def find_runs(root: Path) -> tuple[list[Found], bool]:
    """Returns the runs and studies below a folder, newest first, and whether the search was complete."""
    root = root.resolve()
    folders, whole = _folders(root)
    found = [_examine(root, folder, record) for folder, record in folders]
    return sorted(found, key=lambda entry: (-entry.changed, entry.name)), whole


def report_of(root: Path, name: str) -> Path | None:
    """Returns the report.html of the run or study `name`; None if it is missing or a link leads elsewhere."""
    root = root.resolve()
    known = (folder for folder, _ in _folders(root)[0] if folder.relative_to(root).as_posix() == name)
    return next((_inside(root, folder / REPORT) for folder in known), None)


def _folders(root: Path) -> tuple[list[tuple[Path, str]], bool]:
    """Returns folders with the name of their record; does not look inside runs and studies."""
    found: list[tuple[Path, str]] = []
    level, seen = [root], 0
    for _ in range(_DEPTH):
        below: list[Path] = []
        for folder in level:
            seen += 1
            if seen > _MOST_FOLDERS:
                return found, False
            names, folders = _entries(folder)
            if "study.json" in names or {"study.yaml", LOCK_FILE} <= names:
                found.append((folder, "study.json"))
            elif "run.json" in names or {"manifest.json", LOCK_FILE} <= names:
                found.append((folder, "run.json"))
            else:
                below += folders
        level = below
    return found, not level


def _entries(folder: Path) -> tuple[set[str], list[Path]]:
    names, folders = set(), []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    names.add(entry.name)
                elif not entry.name.startswith("."):
                    folders.append(Path(entry.path))
    except OSError:  # deleted meanwhile, or not readable
        pass
    return names, sorted(folders)


def _inside(root: Path, path: Path) -> Path | None:
    """Returns `path` if it is a file below `root` and no part of it is a link, otherwise None."""
    try:
        real = path.resolve()
        return path if real.is_file() and real == path and real.is_relative_to(root) else None
    except (OSError, RuntimeError, ValueError):
        return None


def _examine(root: Path, folder: Path, record: str) -> Found:
    """Reads one folder; an error becomes its fault and does not affect the others."""
    name = folder.relative_to(root).as_posix()
    report = _inside(root, folder / REPORT)
    try:
        return _found(root, folder, record, report)
    except GradPrunerError as error:
        fault = text(error.message.replace(str(folder), name), 300)
    except Exception as error:  # one folder must not break the page of all others
        fault = f"This folder cannot be shown ({type(error).__name__})."
    return Found(name, DAMAGED, fault, report=report, changed=_written(folder))


def _written(path: Path | None) -> float:
    try:
        return path.stat().st_mtime if path else 0.0
    except OSError:
        return 0.0


def _found(root: Path, folder: Path, name: str, report: Path | None) -> Found:
    record, manifest, pulse = (_inside(root, folder / n) for n in (name, "manifest.json", "progress.json"))
    where, study = folder.relative_to(root).as_posix(), name == "study.json"
    if record is None and ((folder / name).is_symlink() or (manifest is None and not study)):
        return Found(where, DAMAGED, "Its record is missing or a link.", report=report)
    known = _parsed(Manifest.model_validate, manifest) if manifest and not study else Manifest()
    begun = [n for n, stage in known.stages.items() if stage.state in ("running", "interrupted")]
    whole = record is not None and (not begun or _written(record) >= _written(manifest))
    view = _parsed(read, record) if record and (whole or not known.stages) else _so_far(known)
    now = _now(pulse)
    state, fault = (
        (RUNNING, "") if now else _study_ended(view, whole) if study else _ended(known, begun, view, whole)
    )
    curves = _curves(known, now) if now else {}
    changed = max(map(_written, (record, manifest, pulse)))
    return Found(where, state, fault, view, now, curves, report, changed or _written(folder))


def _parsed(shape: Callable[[dict[str, Any]], Any], path: Path) -> Any:
    known = path.stat()
    return _kept(shape, path, known.st_mtime_ns, known.st_size)


@lru_cache(maxsize=512)
def _kept(shape: Callable[[dict[str, Any]], Any], path: Path, when: int, size: int) -> Any:
    """Reads a file; the cache returns the same result until the file changes."""
    return shape(read_object(path, "record", dict[str, Any]))


def _now(pulse: Path | None) -> Now | None:
    """Returns what a run is doing; None if progress.json is missing or too old."""
    if pulse is None or time.time() - _written(pulse) > _ALIVE_SECONDS:
        return None
    try:
        return Now.model_validate(read_object(pulse, "progress", dict[str, Any]))
    except GradPrunerError:  # just deleted, or written by another program
        return None


def _study_ended(view: View, whole: bool) -> tuple[str, str]:
    waiting = any(seed.error in PENDING for row in view.rows for seed in row.seeds)
    if not whole or waiting:
        done, planned = count(view.record.done) or 0, count(view.record.planned)
        return STOPPED, f"Stopped after {done} of {planned or 'its'} runs; {_RESUME}"
    return _outcome(view)


def _outcome(view: View) -> tuple[str, str]:
    errors = [text(row.error, LONGEST_ERROR) for row in view.rows if row.error]
    if errors and len(errors) == len(view.rows):
        return FAILED, errors[0]
    return DONE, f"{len(errors)} of {counted(len(view.rows), 'row')} failed: {errors[0]}" if errors else ""


def _ended(known: Manifest, begun: list[str], view: View, whole: bool) -> tuple[str, str]:
    """Returns state and fault of a run that is no longer running."""
    if whole:
        return _outcome(view)
    if begun:
        return STOPPED, f"Stopped in {text(begun[-1], 80)}; {_RESUME}"
    failed = [(name, stage.error) for name, stage in known.stages.items() if stage.state == "failed"]
    if failed:
        return FAILED, f"{text(failed[-1][0], 80)}: {text(failed[-1][1], LONGEST_ERROR)}"
    return STOPPED, f"Stopped before the end; {_RESUME}"


def _curves(known: Manifest, now: Now) -> dict[str, Curve]:
    """Returns the losses of finished trainings and of the current one, by row."""
    named = {StageName.of(name): stage.result.get("losses") for name, stage in known.stages.items()}
    found = {
        name.row: pairs(losses, "step", "loss")
        for name, losses in named.items()
        if name.verb in _TRAINS and isinstance(losses, list)
    }
    doing = StageName.of(str(now.doing))
    row = doing.row if doing.verb in _TRAINS else str(now.doing)
    dots = [{"step": p[0], "loss": p[1]} for p in now.losses if isinstance(p, list) and len(p) == 2]
    found[row] = pairs(dots, "step", "loss") or found.get(row, [])
    return {row: points for row, points in found.items() if points}


def _so_far(known: Manifest) -> View:
    """Builds a view of a run that has no record yet from the results of its finished stages."""
    rows: dict[str, dict[str, Any]] = {}
    for name, stage in known.stages.items():
        kind, row, rest = StageName.of(name)
        if stage.state != "done" or kind not in ("evaluate", "finetune") or rest:
            continue  # e.g. "evaluate dense before": that model is not fine-tuned yet
        entry = rows.setdefault(row, {"label": row, "plan": row})
        entry["evaluation" if kind == "evaluate" else kind] = stage.result
    plans = [name for name in known.stages if StageName.of(name).verb == "plan"]
    for row, entry in rows.items():
        plan, end = (next(iter(plans), ""), "before") if row == "dense" else (f"plan {row}", "after")
        sizes = known.stages.get(plan, StageRecord()).result.get("parameters")
        entry["num_parameters"] = number(sizes.get(end)) if isinstance(sizes, dict) else None
    return read({"title": known.title, "variants": rows})
