"""run(recipe): record -> score -> plan -> prune -> fine-tune -> evaluate -> report.

Every arrow is a stage of the run directory and leaves a file there. The code follows the picture in
docs/design.md: `_Run` records once and scores and plans each variant (planning.py); from the plan on, every
variant goes through stages of its own (stages.py).

A variant is an entry of the recipe's `variants`. A row is its name in the run directory, which can hold
several plans of one variant (plan_names.py).
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, GradPrunerError, ModelError
from gradpruner.common.files import check_free_space, write_text
from gradpruner.common.json_files import write_json
from gradpruner.common.registry import check_known
from gradpruner.common.run_names import row_file
from gradpruner.common.world import this_world
from gradpruner.gradients.scores import LayerScores
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext
from gradpruner.plans.reading import Plan
from gradpruner.runs.before.disk import bytes_missing
from gradpruner.runs.before.fitting import check_memory
from gradpruner.runs.folder.directory import RunDirectory, Stage
from gradpruner.runs.folder.plan_names import (
    MADE,
    MARK,
    STAGES,
    method_of,
    rows_in,
    scores_file,
    scores_folder,
    takes_given_plan,
    tuned_folder,
)
from gradpruner.runs.folder.row_names import row_for, row_of_failed, scores_name
from gradpruner.runs.folder.run_record import run_record
from gradpruner.runs.job.data_warnings import not_tuned, too_few_steps
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import Recipe, recipe_yaml
from gradpruner.runs.row.depth_search import check_validation_rows
from gradpruner.runs.row.planning import Planning
from gradpruner.runs.row.rate_search import find_rate
from gradpruner.runs.row.stages import do_stages
from gradpruner.runs.row.together import together
from gradpruner.runs.row.variant import Variant
from gradpruner.training.callbacks import ProgressCallback
from gradpruner.training.options import RecordOptions
from gradpruner.training.recording import record_gradients

log = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    *,
    until: str = "report",
    command: str = "",
    one_plan: bool = False,
    job: Job | None = None,
) -> dict[str, Any]:
    """Runs a recipe in its run directory and skips the stages that are already done there.

    Args:
        recipe: What to do.
        until: Last stage to do, one of `STAGES`.
        command: How the user called it, for the report.
        one_plan: Keep one plan per variant, as in a study: a new plan replaces the results of the old one.
            By default the results of other plans stay, see `plan_names`.
        job: The recipe with its inputs opened, if the caller has opened them already.

    Returns:
        The run record, which is also in `run.json`.

    Raises:
        GradPrunerError: The first error in the recipe, the data, the model or the machine. If a variant
            fails while others succeed, the report shows its error, and the error is raised after that.
    """
    record, failure = run_rows(recipe, until=until, command=command, one_plan=one_plan, job=job)
    if failure is not None:
        raise failure
    return record


def run_rows(
    recipe: Recipe,
    *,
    until: str = "report",
    command: str = "",
    one_plan: bool = False,
    job: Job | None = None,
) -> tuple[dict[str, Any], GradPrunerError | None]:
    """Does the same as `run`, but returns a variant's first error beside the run record; `run` raises it."""
    check_known("stage", until, STAGES)
    job = job or Job(recipe, command)
    check_memory(job, until)
    check_validation_rows(job)
    directory = RunDirectory(recipe.out, inputs=(job.folder,), device=job.device)
    check_free_space(directory.path, bytes_missing(job, directory.path, until), "This run")
    if STAGES.index(until) >= STAGES.index("finetune") and (short := too_few_steps(job)):
        log.warning("warning: %s", short)
    with directory:
        if not one_plan:
            _refuse_untuned(job, directory)
        _describe(job, directory)
        # The recipe as the user gave it, not `job.recipe` with its chosen learning rate: the next start may
        # use another mode of fine-tuning, which needs another rate.
        kept = partial(write_text, directory.path / "recipe.yaml", recipe_yaml(_without_name(recipe)))
        if not _made(directory):
            kept()
        if recipe.find_rate:
            find_rate(job, directory)
            _describe(job, directory)  # with the rate that was found
        return _Run(job, directory, one_plan, kept).up_to(until)


def _refuse_untuned(job: Job, directory: RunDirectory) -> None:
    """Refuses to put the given model, as it is, in place of a dense model that an earlier start tuned."""
    tuned = directory.result("finetune dense") is not None
    if tuned and job.recipe.start == "given" and "dense" in job.recipe.variants:
        raise ConfigError(
            f"{directory.path} holds {tuned_folder('dense')}, which an earlier start tuned. This start takes "
            "the given model as it is, and would replace that one.",
            hint="Choose another --out.",
        )


def _describe(job: Job, directory: RunDirectory) -> None:
    """Writes the resolved recipe and the hashes of its inputs into the manifest."""
    directory.describe(_without_name(job.recipe).model_dump(mode="json"), job.input_hashes())


def _without_name(recipe: Recipe) -> Recipe:
    """The recipe without `plan.name`, which is the name of one plan; the next start may make another plan."""
    return recipe.with_values(plan={"name": None})


def _made(directory: RunDirectory) -> list[str]:
    """The pruned rows that have a model."""
    return [row for row in rows_in(directory.stages, MADE) if row != "dense"]


class _Run:
    """One start of a run: goes through the stages and keeps what later stages need from earlier ones."""

    def __init__(
        self, job: Job, directory: RunDirectory, one_plan: bool, keep_recipe: Callable[[], object]
    ) -> None:
        self.job, self.directory, self.one_plan = job, directory, one_plan
        self.keep_recipe = keep_recipe
        self.recipe = job.recipe
        self.open_trace = cache(lambda: GradientTrace.load(self.path("trace")))
        self.record_failure: Exception | None = None
        self.scores: dict[str, LayerScores] = {}
        """Method -> its scores."""
        self.score_names: dict[str, str] = {}
        """Method -> name of its scores in the run directory, see `scores_name`."""
        self.plans: dict[str, Plan] = {}
        """Variant -> its plan."""
        self.rows: dict[str, str] = {}
        """Variant -> its row of the run directory."""
        self.failures: dict[str, GradPrunerError] = {}
        """Variant -> why it failed."""

    def path(self, *parts: str) -> Path:
        return self.directory.path.joinpath(*parts)

    def up_to(self, until: str) -> tuple[dict[str, Any], GradPrunerError | None]:
        """Does all stages up to `until`; returns the run record and the first error of a variant."""
        depth = STAGES.index(until)
        if self.recipe.start == "tuned" and depth > STAGES.index("rate"):
            self.tune_dense(depth)
        if until == "record":
            self.record()
        for variant in self.recipe.variants:
            if variant != "dense":
                with self.attempt(variant):
                    self.decide(variant, depth)
        # Once a model is made, the folder keeps the recipe of its first plan: another plan is beside it.
        beside = any(MARK in row and variant in _made(self.directory) for variant, row in self.rows.items())
        if depth >= STAGES.index("plan") and not beside:
            self.keep_recipe()
        # The dense model comes first: it may be the teacher of the others.
        for variant in sorted(self.recipe.variants, key=lambda name: name != "dense"):
            with self.attempt(variant):
                if variant not in self.failures:
                    self.build(variant, depth)
            if variant == "dense" and (doubt := not_tuned(self.job, self.directory.result("evaluate dense"))):
                log.warning("warning: %s", doubt)
        return self.write_record(depth), next(iter(self.failures.values()), None)

    @contextmanager
    def attempt(self, variant: str) -> Iterator[None]:
        """Logs and keeps the error of a variant, so that the other variants go on."""
        try:
            yield
        except Exception as error:
            if this_world().broken:  # the processes of the job have lost each other: no variant can go on
                raise
            traceback.clear_frames(error.__traceback__)  # the models in them would stay in memory
            ours = error
            if not isinstance(ours, GradPrunerError):  # a method met something it did not expect
                ours = ModelError(f"{type(error).__name__}: {error} ({_where(error)})")
                ours.__cause__ = error
            log.error("%s failed: %s", variant, ours)
            self.failures[variant] = ours

    def tune_dense(self, depth: int) -> None:
        """Fine-tunes the dense model; from then on it is the model that is recorded and pruned."""
        with self.attempt("dense"):
            self.build("dense", max(depth, STAGES.index("finetune")))
        if "dense" in self.failures:
            raise self.failures["dense"]
        self.job.prune_from(self.path(tuned_folder("dense")))

    def decide(self, variant: str, depth: int) -> None:
        """Records, scores and plans: what can be decided about a variant before its model is made."""
        name = method_of(variant)
        method = METHODS.find(name)
        given = self.job.given_plan if takes_given_plan(variant) else None
        if self.job.reads_trace(variant) and depth >= STAGES.index("record"):
            self.record()
        if method.score and not given and depth >= STAGES.index("score"):
            self.score(name)
        if depth >= STAGES.index("plan"):
            if method.score or method.plan:
                self.plan(variant)
            elif method.shrink:  # has a plan only after its training
                self.rows[variant] = self.find_row(variant)

    def record(self) -> None:
        """Model + task -> trace/; done once for all variants, and not tried again after it has failed."""
        if self.record_failure is not None:
            raise self.record_failure
        if "record" in self.directory.visited:
            return
        try:
            result = self.directory.ensure(Stage("record", self.job.record_inputs, self._record, ["trace"]))
        except Exception as error:
            self.record_failure = error
            raise
        self.job.warnings += result["notes"]

    def _record(self) -> dict[str, Any]:
        options = self.recipe.record
        trace = together(self.job, record_rows, str(self.path("trace")))
        return {
            "num_steps": trace.num_steps,
            "effective_steps": trace.effective_steps,
            "tokens": round(sum(self.job.samples.lengths) / len(self.job.samples) * trace.num_steps)
            * options.batch_size
            * this_world().size,
            "losses": list(trace.info.losses),
            "learning_rates": list(trace.info.learning_rates),
            "rank": trace.info.rank,
            "adapter": trace.info.adapter,
            "clip": trace.info.clip,
            "bytes_on_disk": trace.bytes_on_disk(),
            "notes": [f"recording: {note}" for note in trace.info.notes],
        }

    def score(self, method: str) -> None:
        """Trace (or model) -> scores/<method>.json"""
        if method in self.scores:
            return
        inputs = self.job.decision_inputs(method)
        name = self.score_names[method] = scores_name(self.directory, method, inputs)
        target = scores_file(name)

        def work() -> dict[str, Any]:
            folders = (str(self.path("trace")), str(self.path(scores_folder(name))))
            self.directory.remove([scores_folder(name)])
            if METHODS.find(method).compares:
                scores = together(self.job, scores_of, method, *folders)
            else:
                scores = scores_of(self.job, method, *folders)
            scores.save(self.path(target))
            return {}

        self.directory.ensure(Stage(f"score {name}", inputs, work, [target]))
        self.scores[method] = LayerScores.load(self.path(target))

    def context(self, method: str) -> MethodContext:
        """What a method may look at."""
        return self.job.context(method, self.open_trace, self.path(row_file(method, "method")))

    def plan(self, variant: str) -> None:
        """Scores (or model) -> plans/<row>.json"""
        name = method_of(variant)
        scored = (self.score_names[name], self.scores[name]) if name in self.scores else None
        planning = Planning(self.job, self.directory, variant, scored, partial(self.context, name))
        row = self.rows[variant] = self.find_row(variant, planning.plan_in)
        plan = self.plans[variant] = planning.make_in(row)
        for found in self.job.portability_of(plan):
            if found.status in ("wrong", "refused") and not found.also_unpruned:
                self.job.warnings.append(f"plan {row}, served by {found.engine}: {found.reason}")
                log.warning("%s", self.job.warnings[-1])

    def find_row(self, variant: str, plan_in: Callable[[str], Plan | None] = lambda row: None) -> str:
        """The row of the run directory for this recipe's plan of a variant; see `row_names.row_for`."""
        if self.one_plan:
            return variant
        return row_for(self.job, self.directory, variant, plan_in, self.open_trace)

    def build(self, variant: str, depth: int) -> None:
        """Plan -> pruned model -> fine-tuned model -> figures, for one variant."""
        if depth >= STAGES.index("prune"):
            row = self.rows.setdefault(variant, variant)
            plan = self.plans.get(variant)
            do_stages(Variant(self.job, self.directory, row, plan, self.open_trace), depth)

    def write_record(self, depth: int) -> dict[str, Any]:
        """Everything the run directory holds -> run.json and, once models are evaluated, report.html"""
        rows = {variant: self.row_of(variant) for variant in self.recipe.variants}
        errors = {rows[variant]: str(error) for variant, error in self.failures.items()}
        record = run_record(self.job, self.directory, rows, errors)
        write_json(self.path("run.json"), record)
        if depth >= STAGES.index("evaluate"):
            from gradpruner.reports.html import render_html

            render_html(record, self.path("report.html"))
        return record

    def row_of(self, variant: str) -> str:
        """The row of a variant, which may have failed before it had a plan."""
        if variant in self.failures and variant not in self.rows and not self.one_plan:
            return row_of_failed(self.directory, variant)
        return self.rows.get(variant, variant)


def _where(error: Exception) -> str:
    """Returns file and line of an error: the last ones that are not of an installed package, if there are."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    frame = next((one for one in frames if "site-packages" not in one.filename), frames[0])
    return f"{Path(frame.filename).name}:{frame.lineno}"


def scores_of(job: Job, method: str, trace: str, folder: str) -> LayerScores:
    """Scores the layers by a method, with the gradients recorded in the folder `trace`."""
    score = METHODS.find(method).score
    assert score is not None
    found = score(job.context(method, cache(lambda: GradientTrace.load(trace)), Path(folder)))
    if not isinstance(found, LayerScores):
        raise ConfigError(f"The method {method} returned {type(found).__name__}; LayerScores are needed.")
    if found.num_layers != job.num_layers:
        raise ConfigError(
            f"The method {method} returned {found.num_layers} scores; the model has {job.num_layers} layers."
        )
    return found


def record_rows(job: Job, folder: str) -> GradientTrace:
    """Model + task -> trace/; every process reads its share of the rows, the first one writes."""
    shared = {"precision", "gradient_checkpointing", "fsdp", "seed", "device"}
    options = job.recipe.record
    model = job.load_origin(quantise=options.adapter == "qlora")
    trace = record_gradients(
        model,
        job.samples,
        RecordOptions(
            **options.model_dump() | {"steps": job.record_steps}, **job.training.model_dump(include=shared)
        ),
        folder=folder,
        collator=job.collator,
        callbacks=[ProgressCallback("record")],
    )
    job.release(model)
    return trace
