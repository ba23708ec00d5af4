"""run(recipe): record -> score -> plan -> prune -> fine-tune -> evaluate -> report.

Every arrow is a stage of the run directory, with a file on disk. Reads from top to bottom like the picture
in docs/design.md; from the plan on, every row of the comparison goes its own way (variant.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from gradpruner.common.errors import GradPrunerError, ModelError
from gradpruner.common.files import check_free_space, write_text
from gradpruner.common.json_files import write_json
from gradpruner.common.provenance import sha256_file
from gradpruner.common.registry import check_known
from gradpruner.common.world import this_world
from gradpruner.gradients.scores import LayerScores
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan, load_plan
from gradpruner.runs.budget import REPAIR_KEYS, plan_for
from gradpruner.runs.data_warnings import not_tuned, too_few_steps
from gradpruner.runs.depth_search import refuse_uncertified, search_depth
from gradpruner.runs.directory import RunDirectory, Stage
from gradpruner.runs.disk import bytes_missing
from gradpruner.runs.evaluation_data import data_identity
from gradpruner.runs.fitting import check_fitting
from gradpruner.runs.job import Job
from gradpruner.runs.plan_names import LABELS, STAGES, method_of
from gradpruner.runs.rate_search import find_rate
from gradpruner.runs.recipe import Recipe, recipe_yaml
from gradpruner.runs.row_names import row_for, row_of_failed
from gradpruner.runs.run_record import run_record
from gradpruner.runs.together import together
from gradpruner.runs.variant import Variant
from gradpruner.runs.work import plan_file, same_plan, stored_plan, tuned_folder
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
    """Carries out a recipe in its run directory, skipping what is already done there.

    Args:
        recipe: What to do.
        until: Last stage to do, one of `STAGES`.
        command: How the user called it, for the report.
        one_plan: The folder holds what this recipe makes and nothing else, as in a study: results of another
            plan are replaced. Else they stay, see `plan_names`.
        job: The recipe with its inputs opened, where that was done before.

    Returns:
        The run record (also `run.json`).

    Raises:
        GradPrunerError: The first fault of recipe, data, model or machine. A variant that fails while
            others succeed is a row of the report, and raises after the report is written.
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
    """Like `run`, but the first fault of a row is returned beside the record, not raised."""
    check_known("stage", until, STAGES)
    job = job or Job(recipe, command)
    check_fitting(job, until)
    directory = RunDirectory(recipe.out, inputs=(job.folder,), device=job.device)
    check_free_space(directory.path, bytes_missing(job, directory.path, until), "This run")
    if STAGES.index(until) >= STAGES.index("finetune") and (short := too_few_steps(job)):
        log.warning("warning: %s", short)
    with directory:
        # A name is given to one plan; the next start may make another.
        unnamed = {"name": None}
        directory.describe(job.recipe.with_values(plan=unnamed).model_dump(mode="json"), job.input_hashes())
        # As it was given: another start may have another mode, and then another learning rate.
        write_text(directory.path / "recipe.yaml", recipe_yaml(recipe.with_values(plan=unnamed)))
        if recipe.find_rate:
            find_rate(job, directory)
            directory.describe(
                job.recipe.with_values(plan=unnamed).model_dump(mode="json"), job.input_hashes()
            )
        return _Run(job, directory, one_plan).up_to(until)


class _Run:
    """One pass over the stages; holds what later stages need of earlier ones."""

    def __init__(self, job: Job, directory: RunDirectory, one_plan: bool) -> None:
        self.job, self.directory, self.one_plan = job, directory, one_plan
        self.recipe = job.recipe
        self.open_trace = cache(lambda: GradientTrace.load(self.path("trace")))
        self.record_failure: Exception | None = None
        self.scores: dict[str, LayerScores] = {}
        self.plans: dict[str, Plan] = {}
        self.names: dict[str, str] = {}
        """Variant -> the row of the run directory that this recipe makes of it, see `plan_names`."""
        self.failures: dict[str, GradPrunerError] = {}

    def path(self, *parts: str) -> Path:
        return self.directory.path.joinpath(*parts)

    def up_to(self, until: str) -> tuple[dict[str, Any], GradPrunerError | None]:
        """The run record, and the first fault of a row."""
        depth = STAGES.index(until)
        pruned = [v for v in self.recipe.variants if v != "dense"]
        if self.recipe.start == "tuned" and depth > STAGES.index("rate"):
            self.tune_dense(depth)
        if until == "record":
            self.record()
        for variant in pruned:
            with self.row(variant):
                self.decide(variant, depth)
        for variant in sorted(self.recipe.variants, key=lambda name: name != "dense"):  # teacher first
            with self.row(variant):
                if variant not in self.failures:
                    self.carry_out(variant, depth)
            if variant == "dense" and (doubt := not_tuned(self.job, self.directory.result("evaluate dense"))):
                log.warning("warning: %s", doubt)
        if self.recipe.keep_models == "none" and depth >= STAGES.index("evaluate"):
            self.directory.remove([tuned_folder("dense")])  # kept until now for the other rows
        rows = {variant: self.name_of(variant) for variant in self.recipe.variants}
        errors = {self.name_of(variant): str(error) for variant, error in self.failures.items()}
        record = run_record(self.job, self.directory, rows, errors)
        write_json(self.path("run.json"), record)
        if depth >= STAGES.index("evaluate"):
            from gradpruner.reports.html import render_html

            render_html(record, self.path("report.html"))
        return record, next(iter(self.failures.values()), None)

    def tune_dense(self, depth: int) -> None:
        """Fine-tunes the dense model, which everything after this is recorded on and pruned from."""
        with self.row("dense"):
            self.carry_out("dense", max(depth, STAGES.index("finetune")))
        if "dense" in self.failures:
            raise self.failures["dense"]
        self.job.prune_from(self.path(tuned_folder("dense")))

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """A row that fails says so and does not end the run; the first failure is raised at its end."""
        try:
            yield
        except Exception as error:
            if this_world().broken:  # no row can be finished any more
                raise
            ours = error
            if not isinstance(ours, GradPrunerError):  # a method met something it did not expect
                ours = ModelError(f"{type(error).__name__}: {error}")
                log.debug("%s", name, exc_info=error)
            log.error("%s failed: %s", name, ours)
            self.failures[name] = ours

    def decide(self, variant: str, depth: int) -> None:
        """Chooses what a row prunes, as far as that is known before its model is made."""
        method = METHODS.find(method_of(variant))
        if method.needs_trace and depth >= STAGES.index("record"):
            self.record()
        if method.score and depth >= STAGES.index("score"):
            self.score(method_of(variant))
        if depth >= STAGES.index("plan"):
            if method.score or method.plan:
                self.plan(variant)
            elif method.shrink:
                self.names[variant] = self.row_of(variant)

    # -- stages --------------------------------------------------------------------------------------

    @property
    def record_inputs(self) -> dict[str, Any]:
        """What the recorded gradients depend on."""
        return {
            "model": self.job.origin_sha256,
            "record": self.recipe.record.model_dump(),
            "steps": self.job.record_steps,
            "loading": self.job.loading,
            "precision": self.recipe.finetune.precision,
            **self.job.learned,
            **self.job.spread,
        }

    def record(self) -> None:
        """Model + task -> trace/; done, or tried in vain, once for all rows that need it."""
        if self.record_failure is not None:
            raise self.record_failure
        if "record" in self.directory.visited:
            return
        try:
            result = self.directory.ensure(Stage("record", self.record_inputs, self._record, ["trace"]))
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

    def decision_inputs(self, method: str) -> dict[str, Any]:
        """What scores or a plan depend on."""
        options = self.recipe.plan
        found = METHODS.find(method)
        return {
            "method": method,
            "options": self.job.method_options(method).model_dump(mode="json"),
            "score": self.recipe.score.model_dump(),
            "num_keep": self.job.num_keep,
            "protect": [options.protect_first, options.protect_last, options.protect],
            "budget": None if found.score else [self.job.num_remove, options.unit, options.portable_to],
            "record": self.record_inputs if found.needs_trace else None,
            "model": self.job.origin_sha256,
            **self.job.learned,
        }

    def score(self, method: str) -> None:
        """Trace (or model) -> scores/<method>.json"""
        if method in self.scores:
            return
        target = f"scores/{method}.json"

        def work() -> dict[str, Any]:
            score = METHODS.find(method).score
            assert score is not None
            score(self.context(method)).save(self.path(target))
            return {}

        self.directory.ensure(Stage(f"score {method}", self.decision_inputs(method), work, [target]))
        self.scores[method] = LayerScores.load(self.path(target))

    def context(self, method: str) -> MethodContext:
        """What a method may look at."""
        return self.job.context(method, self.open_trace, self.path("variants", method, "method"))

    def plan(self, variant: str) -> None:
        """Scores (or model) -> plans/<row>.json"""
        method = METHODS.find(method_of(variant))
        given = self.job.given_plan if variant in LABELS else None
        inputs = self.plan_inputs(variant, given)
        searches = method.score is not None and given is None and self.recipe.plan.max_loss is not None
        asked = inputs | self.search_inputs() if searches else {}

        def planned(count: int | None = None) -> Plan:
            if given:
                return given if variant == "merged" else given.without_merging()
            return method.plan(self.context(variant)) if method.plan else self.planned(variant, count)

        def alike(row: str) -> Plan | None:
            """The plan this recipe makes, if it is that of a row that is there."""
            recorded = stored_plan(self.directory, row)
            if searches:
                search = self.directory.result(f"search {row}")
                is_that = search and search["best"] and self.directory.is_done(f"search {row}", asked)
                return planned(search["best"]) if search and is_that else None
            if method.plan:
                return recorded if self.directory.is_done(f"plan {row}", inputs) else None
            plan = planned()
            return (
                plan if same_plan(recorded, plan) or self.directory.is_done(f"plan {row}", inputs) else None
            )

        row = self.names[variant] = self.row_of(variant, alike)
        if searches:
            inputs["num_prune"] = refuse_uncertified(self.search(variant, asked))

        def work() -> dict[str, Any]:
            plan = planned(inputs.get("num_prune"))
            plan.save(self.path(plan_file(row)))
            return self.job.savings_of(plan)

        self.directory.ensure(Stage(f"plan {row}", inputs, work, [plan_file(row)]))
        plan = self.plans[variant] = load_plan(self.path(plan_file(row)))
        for verdict in self.job.portability_of(plan):
            if verdict.status in ("wrong", "refused") and not verdict.also_unpruned:
                self.job.warnings.append(f"plan {row}, served by {verdict.engine}: {verdict.reason}")
                log.warning("%s", self.job.warnings[-1])

    def plan_inputs(self, variant: str, given: PruningPlan | None) -> dict[str, Any]:
        """What a plan depends on."""
        name = method_of(variant)
        method = METHODS.find(name)
        if not method.score:
            return self.decision_inputs(name)
        return {
            "scores": sha256_file(self.path("scores", f"{name}.json")),
            "plan": self.recipe.plan.model_dump(exclude={"name", *REPAIR_KEYS}) | method.plan_options,
            "given": given.to_dict() if given else None,
            "variant": variant,
        }

    def row_of(self, variant: str, alike: Callable[[str], Plan | None] = lambda row: None) -> str:
        """The row of the run directory for this recipe's model of a variant; see `row_names.row_for`."""
        return (
            variant if self.one_plan else row_for(self.job, self.directory, variant, alike, self.open_trace)
        )

    def name_of(self, variant: str) -> str:
        """The row of a variant, also of one that failed before it had a plan."""
        if variant in self.failures and variant not in self.names and not self.one_plan:
            return row_of_failed(self.directory, variant)
        return self.names.get(variant, variant)

    def planned(self, variant: str, num_prune: int | None = None) -> PruningPlan:
        """The plan of a row whose layers have scores."""
        name = method_of(variant)
        method = METHODS.find(name)
        merging = variant == "merged" or (method.merges and variant not in LABELS)
        return plan_for(self.job, self.scores[name], merging, method.plan_options, num_prune)

    def search_inputs(self) -> dict[str, Any]:
        """What the number of layers depends on, beside what a plan depends on."""
        options = self.recipe.plan
        validation = self.job.validation
        assert validation is not None
        return {
            "model": self.job.origin_sha256,
            "train": data_identity(self.job.train),
            "validation": data_identity(validation),
            "limit": [options.max_loss, options.confidence, *self.job.how_repaired],
            "metrics": list(self.job.metrics),
            "seed": self.recipe.seed,
        }

    def search(self, variant: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """Tuned model, scores and validation rows -> how many layers may go"""

        def work() -> dict[str, Any]:
            return search_depth(self.job, lambda count: self.planned(variant, count), self.path("trace"))

        return self.directory.ensure(Stage(f"search {self.names[variant]}", inputs, work))

    def carry_out(self, variant: str, depth: int) -> None:
        """Plan -> pruned model -> fine-tuned model -> figures, for one row of the comparison."""
        if depth >= STAGES.index("prune"):
            row = self.names.setdefault(variant, variant)
            Variant(self.job, self.directory, row, self.plans.get(variant), self.open_trace).up_to(depth)


def record_rows(job: Job, folder: str) -> GradientTrace:
    """Model + task -> trace/; every process reads its share of the rows, the first one writes."""
    shared = {"precision", "gradient_checkpointing", "fsdp", "seed", "device"}
    options = job.recipe.record
    model = job.load_origin(quantise=options.adapter == "qlora")
    trace = record_gradients(
        model,
        job.samples,  # type: ignore[arg-type]
        RecordOptions(
            **options.model_dump() | {"steps": job.record_steps}, **job.training.model_dump(include=shared)
        ),
        folder=folder,
        collator=job.collator,
        callbacks=[ProgressCallback("record")],
    )
    job.release(model)
    return trace
