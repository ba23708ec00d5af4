"""run(recipe): record -> score -> plan -> prune -> fine-tune -> evaluate -> report.

Every arrow is a stage of the run directory, with a file on disk. Reads from top to bottom like the picture
in docs/design.md; from the plan on, every row of the comparison goes its own way (variant.py).
"""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path
from typing import Any

from gradpruner.callbacks import ProgressCallback
from gradpruner.config import Recipe, recipe_yaml
from gradpruner.cost import savings
from gradpruner.errors import ConfigError, GradPrunerError
from gradpruner.files import check_free_space, write_json, write_text
from gradpruner.job import LABELS, STAGES, Job, bytes_missing, data_identity, plan_for, scoring_method
from gradpruner.methods import METHODS, MethodContext
from gradpruner.plan import PruningPlan
from gradpruner.portability import judge, layer_facts
from gradpruner.provenance import sha256_file
from gradpruner.recording import record_gradients
from gradpruner.run_record import run_record
from gradpruner.rundir import RunDirectory
from gradpruner.scores import LayerScores
from gradpruner.trace import GradientTrace
from gradpruner.variant import Variant

log = logging.getLogger(__name__)


def run(recipe: Recipe, *, until: str = "report", command: str = "") -> dict[str, Any]:
    """Carries out a recipe in its run directory, skipping what is already done there.

    Args:
        recipe: What to do.
        until: Last stage to do, one of `STAGES`.
        command: How the user called it, for the report.

    Returns:
        The run record (also `run.json`).

    Raises:
        GradPrunerError: The first fault of recipe, data, model or machine. A variant that fails while
            others succeed is a row of the report, and raises after the report is written.
    """
    if until not in STAGES:
        raise ConfigError(f"Unknown stage '{until}'.", hint=f"Stages: {', '.join(STAGES)}.")
    job = Job(recipe, command)
    directory = RunDirectory(recipe.out, inputs=(job.folder,), device=job.device)
    check_free_space(directory.path, bytes_missing(job, directory.path, until), "This run")
    with directory:
        directory.describe(recipe.model_dump(mode="json"), job.input_hashes())
        write_text(directory.path / "recipe.yaml", recipe_yaml(recipe))
        return _Run(job, directory).up_to(until)


class _Run:
    """One pass over the stages; holds what later stages need of earlier ones."""

    def __init__(self, job: Job, directory: RunDirectory) -> None:
        self.job, self.directory = job, directory
        self.recipe = job.recipe
        self.record_inputs: dict[str, Any] | None = None
        self.scores: dict[str, LayerScores] = {}
        self.plans: dict[str, PruningPlan] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self.first_error: GradPrunerError | None = None

    def path(self, *parts: str) -> Path:
        return self.directory.path.joinpath(*parts)

    def up_to(self, until: str) -> dict[str, Any]:
        depth = STAGES.index(until)
        pruned = [v for v in self.recipe.variants if v != "dense"]
        if any(METHODS.find(scoring_method(v)).needs_trace for v in pruned) or until == "record":
            self.record()
        if depth >= STAGES.index("score"):
            for variant in pruned:
                self.score(scoring_method(variant))
        if depth >= STAGES.index("plan"):
            for variant in pruned:
                self.plan(variant)
        if depth >= STAGES.index("prune"):
            for variant in self.recipe.variants:
                self.carry_out(variant, depth)
        record = run_record(self.job, self.directory, self.scores, self.plans, self.variants)
        write_json(self.path("run.json"), record)
        if depth >= STAGES.index("evaluate"):
            self.report(record)
        if self.first_error is not None:
            raise self.first_error
        return record

    # -- stages --------------------------------------------------------------------------------------

    def record(self) -> None:
        """Model + task -> trace/"""
        self.record_inputs = {
            "model": self.job.model_sha256,
            "train": data_identity(self.job.train),
            "max_length": self.job.max_length,
            "record": self.recipe.record.model_dump(),
            "steps": self.job.record_steps,
            "loading": self.recipe.model.model_dump(exclude={"path"}),
            "precision": self.recipe.finetune.precision,
            "seed": self.recipe.seed,
        }
        result = self.directory.stage("record", self.record_inputs, self._record, ["trace"])
        self.job.warnings += result["notes"]

    def _record(self) -> dict[str, Any]:
        options = self.recipe.record
        model = self.job.load(self.job.folder, quantise=options.adapter == "qlora")
        trace = record_gradients(
            model,
            self.job.samples,  # type: ignore[arg-type]
            steps=self.job.record_steps,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.dropout,
            adapter=options.adapter,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            clip=options.clip,
            folder=self.path("trace"),
            seed=self.recipe.seed,
            collator=self.job.collator,
            callbacks=[ProgressCallback("record")],
            device="cpu" if self.job.device == "cpu" else "auto",
            precision=self.recipe.finetune.precision,
            gradient_checkpointing=self.recipe.finetune.gradient_checkpointing,
        )
        self.job.release(model)
        return {
            "num_steps": trace.num_steps,
            "effective_steps": trace.effective_steps,
            "losses": list(trace.info.losses),
            "learning_rates": list(trace.info.learning_rates),
            "rank": trace.info.rank,
            "adapter": trace.info.adapter,
            "clip": trace.info.clip,
            "bytes_on_disk": trace.bytes_on_disk(),
            "notes": [f"recording: {note}" for note in trace.info.notes],
        }

    @cached_property
    def trace(self) -> GradientTrace:
        return GradientTrace.load(self.path("trace"))

    def score(self, method: str) -> None:
        """Trace (or model) -> scores/<method>.json"""
        if method in self.scores:
            return
        target = f"scores/{method}.json"
        inputs = {
            "method": method,
            "score": self.recipe.score.model_dump(),
            "num_keep": self.job.num_keep,
            "record": self.record_inputs if METHODS.find(method).needs_trace else None,
            "model": self.job.model_sha256,
            "train": data_identity(self.job.train),
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }

        def work() -> dict[str, Any]:
            context = MethodContext(
                num_layers=self.job.num_layers,
                seed=self.recipe.seed,
                trace=lambda: self.trace,
                model=lambda: self.job.load(self.job.folder),
                samples=self.job.samples,  # type: ignore[arg-type]
                collator=self.job.collator,
                norm=self.recipe.score.norm,
                num_keep=self.job.num_keep,
            )
            score = METHODS.find(method).score
            assert score is not None
            score(context).save(self.path(target))
            return {}

        self.directory.stage(f"score {method}", inputs, work, [target])
        self.scores[method] = LayerScores.load(self.path(target))

    def plan(self, variant: str) -> None:
        """Scores -> plans/<variant>.json"""
        target = f"plans/{variant}.json"
        method = scoring_method(variant)
        given = self.job.given_plan if variant in LABELS else None
        inputs = {
            "scores": sha256_file(self.path("scores", f"{method}.json")),
            "plan": self.recipe.plan.model_dump(),
            "given": given.to_dict() if given else None,
            "variant": variant,
        }

        def work() -> dict[str, Any]:
            if given:
                plan = given if variant == "merged" else given.without_merging()
            else:
                plan = plan_for(self.job, self.scores[method], merging=variant == "merged")
            plan.save(self.path(target))
            return savings(self.job.config, plan.keep)

        self.directory.stage(f"plan {variant}", inputs, work, [target])
        plan = self.plans[variant] = PruningPlan.load(self.path(target))
        for verdict in judge(layer_facts(self.job.config), plan.keep):
            if verdict.status in ("wrong", "refused") and not verdict.also_unpruned:
                self.job.warnings.append(f"plan {variant}, served by {verdict.engine}: {verdict.reason}")
                log.warning("%s", self.job.warnings[-1])

    def carry_out(self, name: str, depth: int) -> None:
        """Plan -> pruned model -> fine-tuned model -> figures, for one row of the comparison."""
        variant = Variant(self.job, self.directory, name, self.plans.get(name), lambda: self.trace)
        self.variants[name] = variant.row
        try:
            variant.up_to(depth)
        except GradPrunerError as error:
            log.error("%s failed: %s", name, error)
            variant.row["error"] = str(error)
            self.first_error = self.first_error or error

    def report(self, record: dict[str, Any]) -> None:
        """run.json -> report.html"""
        from gradpruner.report import render_html

        render_html(record, self.path("report.html"))
