"""Carries out a study run by run; after each run, study.json, report.html and table.md are written anew."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from gradpruner.common.errors import GradPrunerError, IntegrityError
from gradpruner.common.files import LOCK_FILE, working_in, write_text
from gradpruner.common.json_files import read_json, typed, write_json
from gradpruner.common.printing import Printed
from gradpruner.common.provenance import utc_now
from gradpruner.models.folder import check_output, locate_model, staged_folder
from gradpruner.runs import pipeline
from gradpruner.runs.before.disk import bytes_to_write
from gradpruner.runs.folder.directory import MANIFEST, read_manifest, write_manifest
from gradpruner.runs.folder.pulse import Pulse
from gradpruner.runs.folder.run_record import read_run_record
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.effects import SETTLED, effect_of
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.study.design import Study, StudyRun
from gradpruner.runs.study.summary import Found, is_measured, summarise

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)

STUDY = "study.json"
# Marks the folder of a study from the start, before a first run is finished.
MARKER = "study.yaml"


class Begun(TypedDict):
    """What is read from an earlier study.json; all else is computed from the runs again."""

    created: str


@dataclass(frozen=True, repr=False)
class Outcome(Printed):
    """The result of a study or of its dry run (`preview.Preview`); prints what the command prints.

    Attributes:
        study: The content of study.json; after a dry run, of `preview.preview_study`.
        error: The first error of a row; None if there was none.
        measured: Whether anything was run.
        folder: Folder of the study; None after a dry run.
    """

    study: dict[str, Any]
    error: GradPrunerError | None = None
    measured: bool = True
    folder: Path | None = None

    def show(self, console: Console) -> None:
        """Prints the table and the verdict."""
        from gradpruner.reports.terminal import print_summary

        print_summary(self.study, console, self.folder)


def run_study(study: Study, *, command: str = "") -> Outcome:
    """Does every run of a study that is not done yet, and summarises all runs.

    A run that fails becomes rows with its error, and the other runs go on. A study that is started again
    resumes. Several processes may share the folder if each has seeds of its own; afterwards, a start with all
    seeds summarises them.

    Raises:
        GradPrunerError: An error in recipe, data, model or folder that is found before the first run.
        ConfigError: Also if another process works on one of these seeds.
    """
    models = {locate_model(run.recipe.model.path) for run in study.runs()}
    check_output(study.out, inputs=tuple(models), marker=MARKER)
    checks = check_study(study)
    with ExitStack() as held:
        study.out.mkdir(parents=True, exist_ok=True)
        held.enter_context(working_in(study.out, shared=True))
        for seed in study.seeds:
            held.enter_context(working_in(study.out, f"{LOCK_FILE}-seed-{seed}"))
        write_text(study.out / MARKER, study.to_yaml())
        pulse = held.enter_context(Pulse(study.out, MARKER))
        return _Progress(study, checks, command, pulse).to_the_end()


def check_study(
    study: Study, look: Callable[[Job], dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Checks the inputs of every run of the first seed; loads no weights.

    Args:
        study: The study.
        look: What else to find out about each run.

    Returns:
        Folder of a run -> its "budget", "savings", numbers of rows and steps, bytes to write, warnings, and
        what `look` returns.

    Raises:
        GradPrunerError: The first error, with the point it belongs to.
    """
    found = {}
    for run in study.runs():
        if run.seed == study.seeds[0]:
            try:
                job = Job(run.recipe)
                found[run.folder] = _facts(job) | (look(job) if look else {})
            except GradPrunerError as error:
                if len(study.points) > 1 or run.recipe.model.path != study.recipe.model.path:
                    raise named(error, run.title) from error
                raise
    return found


def _facts(job: Job) -> dict[str, Any]:
    plan = job.expected_plan
    saved = job.sizes.savings(plan.keep)
    unit = job.recipe.plan.unit
    before, after = saved[unit]["before"], saved[unit]["after"]
    return {
        "budget": {
            "unit": unit,
            "removed": before - after,
            "share": (before - after) / before,
            "layers": len(plan.pruned),
        },
        "savings": saved,
        "num_layers": job.num_layers,
        "train_rows": len(job.train),
        "eval_rows": len(job.eval),
        "record_steps": job.recorded_steps,
        "finetune_steps": job.finetune_steps,
        "bytes": bytes_to_write(job),
        "warnings": job.warnings,
    }


class _Progress:
    """One start of a study."""

    def __init__(self, study: Study, checks: dict[str, dict[str, Any]], command: str, pulse: Pulse) -> None:
        self.study, self.command, self.pulse = study, command, pulse
        self.first_error: GradPrunerError | None = None
        self.found = Found(created=_created(study.out / STUDY))
        for point, folder in study.pruning_runs():
            self.found.budgets[point.folder] = checks[folder]["budget"]
        if len(study.seeds) == 1:
            self.found.warnings.append("One seed: how much a row changes from seed to seed is not known.")

    def to_the_end(self) -> Outcome:
        runs = self.study.runs()
        for run in runs:  # results of an earlier start are shown until the run is checked
            record = stored_record(self.study.out / run.folder)
            if record is not None and is_of(record, run.recipe):
                self.found.records[run.folder] = record
        for number, run in enumerate(runs, start=1):
            log.info("run %d of %d: %s", number, len(runs), run.title)
            self.pulse.begin(f"run {number} of {len(runs)}: {run.title}")
            if not (self.study.out / run.folder).exists():
                self._adopt(run, runs)
            self._run(run)
            written = self._write()
        return Outcome(written, self.first_error, folder=self.study.out)

    def _run(self, run: StudyRun) -> None:
        record: dict[str, Any] | None = None
        try:
            _, error = pipeline.run_rows(run.recipe, command=self.command, one_plan=True)
            record = stored_record(self.study.out / run.folder)
        except GradPrunerError as failure:  # the run failed as a whole and has no record
            error = failure
        self.found.records.pop(run.folder, None)
        self.found.errors.pop(run.folder, None)
        if record is not None:
            self.found.records[run.folder] = record
        if error is not None:
            self._note(run, record, error)
        for line in _lines(record):
            log.info("  %s", line)

    def _note(self, run: StudyRun, record: dict[str, Any] | None, error: GradPrunerError) -> None:
        """Keeps the error of a run or of its first failed row."""
        self.found.errors[run.folder] = str(error)
        if record is None:
            log.error("%s failed: %s", run.title, error)
        if self.first_error is None:
            rows = (record or {}).get("variants", {})
            failed = next((name for name, row in rows.items() if row["error"]), None)
            where = f"{failed}, {run.title}" if failed else run.title
            self.first_error = named(error, where)

    def _adopt(self, run: StudyRun, runs: list[StudyRun]) -> None:
        """Lets a new run begin with the finished stages of another run of the same seed and variants."""
        for other in runs:
            same = other.seed == run.seed and other.recipe.variants == run.recipe.variants
            if same and other.folder in self.found.records:
                adopt(self.study.out / other.folder, self.study.out / run.folder)
                return

    def _write(self) -> dict[str, Any]:
        """Results so far -> study.json, report.html and table.md"""
        from gradpruner.reports.html import write_study_report

        found = summarise(self.study, self.found, self.command)
        write_json(self.study.out / STUDY, found)
        write_study_report(found, self.study.out)
        return found


def named(error: GradPrunerError, where: str) -> GradPrunerError:
    """Returns the same error with the place where it happened."""
    return type(error)(f"{where}: {error.message}", error.hint)


def stored_record(folder: Path) -> dict[str, Any] | None:
    """Reads the run record in a folder; None if there is none, or the folder is damaged."""
    if not (folder / "run.json").exists():
        return None
    try:
        read_manifest(folder / MANIFEST)
        return read_run_record(folder / "run.json")
    except IntegrityError:
        return None  # the run itself will report the damage


def is_of(record: dict[str, Any], recipe: Recipe) -> bool:
    """Whether a run record was made by this recipe, in whatever folder."""
    wanted, made = json.loads(recipe.model_dump_json()), record.get("recipe", {})
    for settled in SETTLED:
        section, _, key = settled.partition(".")
        found = made.get(section)
        if wanted[section][key] in (None, "auto") and isinstance(found, dict):
            wanted[section][key] = found.get(key)
    return all(made.get(key) == wanted[key] for key in wanted if effect_of(key) != "bookkeeping")


def state_of(out: Path, run: StudyRun) -> str:
    """Returns how far a run is: "done", "begun" or "new"."""
    folder = out / run.folder
    if not (folder / MANIFEST).exists():
        return "new"
    record = stored_record(folder)
    if record is None or not is_of(record, run.recipe):
        return "begun"
    rows = record["variants"]
    return "done" if all(is_measured(rows.get(name, {})) for name in run.recipe.variants) else "begun"


def adopt(source: Path, folder: Path) -> None:
    """Makes a new run directory that begins with the finished stages of another.

    Stages have fingerprints of what they depend on, so the new run uses only those that are the same: the
    recording, for example, in a sweep over `plan.num_merge`. The files are hard links, which is safe because
    files in a run directory are never changed in place.
    """
    manifest = read_manifest(source / MANIFEST)
    done = {name: stage for name, stage in manifest["stages"].items() if stage["state"] == "done"}
    files = sorted({relative for stage in done.values() for relative in stage["files"]})
    with staged_folder(folder) as staged:
        for relative in files:
            if (source / relative).is_file():
                target = staged / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source / relative, target)
                except OSError:  # a file system without hard links
                    shutil.copy2(source / relative, target)
        write_manifest(staged, manifest | {"created": utc_now(), "stages": done})


def _created(path: Path) -> str:
    """When the study was first started: by an earlier study.json, else now."""
    try:
        return typed(read_json(path, "study"), Begun, f"{path} is not a readable study")["created"]
    except IntegrityError:  # there is none, or it does not say when
        return utc_now()


def _lines(record: dict[str, Any] | None) -> list[str]:
    """The results of a run, one line per row."""
    lines = []
    for name, row in (record or {}).get("variants", {}).items():
        if not is_measured(row):
            lines.append(f"{name}: failed: {row.get('error')}")
            continue
        metrics = row["evaluation"]["metrics"]
        lines.append(f"{name}: " + ", ".join(f"{k} {m['value']:.4f}" for k, m in metrics.items()))
    return lines
