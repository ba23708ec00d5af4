"""run(recipe): record -> score -> plan -> prune -> fine-tune -> evaluate -> report.

Every arrow is a stage of the run directory, with a file on disk. Reads from top to bottom like the picture
in docs/design.md.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner._version import __version__
from gradpruner.checkpoint import (
    ADAPTER_FILE,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    locate_model,
    resolve_device,
    save_model,
    stored_dtype,
)
from gradpruner.config import Recipe, recipe_yaml
from gradpruner.cost import build_on_meta, count_parameters, decoder_parameters, layer_parameters, savings
from gradpruner.data import ExampleSet, load_examples, overlap
from gradpruner.encoding import Collator, EncodedDataset, encode_all
from gradpruner.errors import ConfigError, GradPrunerError
from gradpruner.evaluation import evaluate
from gradpruner.family import LayeredModel
from gradpruner.files import check_free_space, write_json, write_text
from gradpruner.methods import METHODS, MethodContext
from gradpruner.metrics import majority_class
from gradpruner.plan import PruningPlan, plan_pruning
from gradpruner.progress import Progress
from gradpruner.provenance import hash_folder, provenance, sha256_file, sha256_json, utc_now
from gradpruner.recording import default_steps, record_gradients
from gradpruner.rundir import RunDirectory
from gradpruner.scores import LayerScores
from gradpruner.surgery import prune_
from gradpruner.tasks import TASKS, load_task
from gradpruner.trace import GradientTrace
from gradpruner.training import check_trackers, finetune, planned_steps

log = logging.getLogger(__name__)

STAGES = ("record", "score", "plan", "prune", "finetune", "evaluate", "report")
LABELS = {"dense": "dense", "merged": "pruned + merged", "dropped": "pruned, no merging"}


@dataclass
class Job:
    """A recipe with its inputs opened: what every stage looks at.

    Making one checks the recipe against model and data, and loads no weights.
    """

    recipe: Recipe
    command: str = ""
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        recipe = self.recipe
        for variant in recipe.variants:
            if variant not in LABELS:
                METHODS.find(variant)
        resolve_device(recipe.model.device)
        check_trackers(recipe.finetune.report_to)
        self.folder = locate_model(recipe.model.path)
        self.config = load_config(self.folder, recipe.model.trust_remote_code)
        self._check_budget()
        self.tokenizer = load_tokenizer(self.folder, recipe.model.trust_remote_code)
        self.train, self.eval = self._load_data("train"), self._load_data("eval")
        longest = min(recipe.data.max_length, self._max_positions())
        self.max_length = longest
        self.samples = EncodedDataset(encode_all(self.tokenizer, self.train.examples, longest))
        self.collator = Collator(self.tokenizer)
        self._warn()

    def _check_budget(self) -> None:
        """Finds an impossible budget or plan before anything is recorded."""
        plan = plan_for(self, placeholder_scores(self.num_layers), merging=False)
        self.given_plan: PruningPlan | None = None
        if self.recipe.plan.file is not None:
            plan = self.given_plan = PruningPlan.load(self.recipe.plan.file)
            plan.check_model(self.num_layers)
        self.num_keep = len(plan.keep)

    def _max_positions(self) -> int:
        return int(getattr(self.config, "max_position_embeddings", None) or 2**31)

    def _load_data(self, split: str) -> ExampleSet:
        data, seed = self.recipe.data, self.recipe.seed
        limit = data.train_limit if split == "train" else data.eval_limit
        if data.task is not None:
            task = TASKS.find(data.task)
            named = task.train_split if split == "train" else task.eval_split
            return load_task(data.task, data.folder, named, limit, seed)
        source = data.train if split == "train" else data.eval
        assert source is not None
        return load_examples(
            source, split=split, format=data.format, limit=limit, seed=seed, skip_bad=data.skip_bad
        )

    def _warn(self) -> None:
        needed = self.record_steps * self.recipe.record.batch_size
        if len(self.samples) < needed:
            self.warnings.append(
                f"{len(self.samples)} training samples for {self.record_steps} recording steps of "
                f"{self.recipe.record.batch_size}: samples are used more than once."
            )
        self.overlap = overlap(self.train.examples, self.eval.examples)
        if self.overlap:
            self.warnings.append(
                f"{self.overlap} of {len(self.eval)} evaluation prompts also occur in the training data."
            )
        if len(self.eval) < 100:
            self.warnings.append(
                f"Only {len(self.eval)} evaluation examples: differences of several points are noise."
            )
        for name, examples in (("training", self.train), ("evaluation", self.eval)):
            if examples.num_dropped:
                self.warnings.append(f"{examples.num_dropped} unusable {name} rows were dropped.")
        self.warnings += [f"training data: {note}" for note in self.samples.notes()]

    @property
    def num_layers(self) -> int:
        """Decoder layers of the dense model."""
        return int(self.config.num_hidden_layers)

    @property
    def finetune_steps(self) -> int:
        """Optimizer steps of every fine-tuning."""
        options = self.recipe.finetune
        return planned_steps(
            len(self.samples), options.batch_size, options.accumulation, options.epochs
        )

    @property
    def record_steps(self) -> int:
        """Optimizer steps that are recorded."""
        return self.recipe.record.steps or default_steps(self.finetune_steps)

    @cached_property
    def model_sha256(self) -> str:
        """Hash of config and weights."""
        return hash_folder([self.folder / "config.json", *sorted(self.folder.glob("*.safetensors"))])

    @property
    def device(self) -> str:
        """The torch device stages run on."""
        return str(resolve_device(self.recipe.model.device))

    def input_hashes(self) -> dict[str, str]:
        """SHA-256 of everything the run reads."""
        hashes = {"model": self.model_sha256, "train": self.train.sha256, "eval": self.eval.sha256}
        return hashes | ({"plan": sha256_json(self.given_plan.to_dict())} if self.given_plan else {})

    def load(self, folder: Path, *, dtype: str | None = None, quantise: bool = False) -> nn.Module:
        """Loads a model folder as the recipe says."""
        options = self.recipe.model
        return load_model(
            folder,
            dtype=dtype or options.dtype,
            device=options.device,
            attn_implementation=options.attn_implementation,
            trust_remote_code=options.trust_remote_code,
            quantise=quantise,
        )


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
        self.scores: dict[str, LayerScores] = {}
        self.plans: dict[str, PruningPlan] = {}
        self.variants: dict[str, dict[str, Any]] = {}
        self.first_error: GradPrunerError | None = None

    def path(self, *parts: str) -> Path:
        return self.directory.path.joinpath(*parts)

    def up_to(self, until: str) -> dict[str, Any]:
        depth = STAGES.index(until)
        pruned = [v for v in self.recipe.variants if v != "dense"]
        if any(self._method(v).needs_trace for v in pruned) or until == "record":
            self.record()
        if depth >= STAGES.index("score"):
            for variant in pruned:
                self.score(_method_name(variant))
        if depth >= STAGES.index("plan"):
            for variant in pruned:
                self.plan(variant)
        if depth >= STAGES.index("prune"):
            for variant in self.recipe.variants:
                self.carry_out(variant, depth)
        record = self.run_record()
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
            "train": _data_identity(self.job.train),
            "max_length": self.job.max_length,
            "record": self.recipe.record.model_dump(),
            "steps": self.job.record_steps,
            "loading": self.recipe.model.model_dump(exclude={"path"}),
            "precision": self.recipe.finetune.precision,
            "seed": self.recipe.seed,
        }
        self.trace_result = self.directory.stage(
            "record", self.record_inputs, self._record, ["trace"]
        )
        self.job.warnings += self.trace_result["notes"]

    def _record(self) -> dict[str, Any]:
        from gradpruner.training import ProgressCallback

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
        _free(model)
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
            "record": getattr(self, "record_inputs", None) if METHODS.find(method).needs_trace else None,
            "model": self.job.model_sha256,
            "train": _data_identity(self.job.train),
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
            METHODS.find(method).score(context).save(self.path(target))
            return {}

        self.directory.stage(f"score {method}", inputs, work, [target])
        self.scores[method] = LayerScores.load(self.path(target))

    def plan(self, variant: str) -> None:
        """Scores -> plans/<variant>.json"""
        target = f"plans/{variant}.json"
        method = _method_name(variant)
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
        self.plans[variant] = PruningPlan.load(self.path(target))

    def carry_out(self, variant: str, depth: int) -> None:
        """Plan -> pruned model -> fine-tuned model -> figures, for one row of the comparison."""
        row: dict[str, Any] = {
            "label": LABELS.get(variant, variant.replace("_", " ")),
            "plan": variant if variant in self.plans else None,
            "before": None,
            "finetune": None,
            "evaluation": None,
            "error": None,
        }
        self.variants[variant] = row
        try:
            _Variant(self, variant, row).up_to(depth)
        except GradPrunerError as error:
            log.error("%s failed: %s", variant, error)
            row["error"] = str(error)
            self.first_error = self.first_error or error

    def report(self, record: dict[str, Any]) -> None:
        """run.json -> report.html"""
        from gradpruner.report import render_html

        render_html(record, self.path("report.html"))

    # -- the record ------------------------------------------------------------------------------------

    def run_record(self) -> dict[str, Any]:
        """Everything measured, as the report reads it."""
        job, stages = self.job, self.directory.stages
        return {
            "schema_version": 1,
            "gradpruner_version": __version__,
            "created": self.directory.manifest["created"],
            "finished": utc_now(),
            "command": job.command,
            "title": self.recipe.title or f"{job.folder.name} on {_task_name(self.recipe)}",
            "provenance": provenance(self.recipe.seed),
            "recipe": self.recipe.model_dump(mode="json"),
            "model": {
                "path": self.recipe.model.path,
                "model_type": job.config.model_type,
                "num_layers": job.num_layers,
                "num_parameters": count_parameters_of(job.config),
                "decoder_parameters": decoder_parameters(job.config),
                "dtype": str(stored_dtype(job.folder)).removeprefix("torch."),
                "sha256": job.model_sha256,
            },
            "data": {
                "train": _data_facts(job.train)
                | {"supervised_tokens": job.samples.supervised_tokens},
                "eval": _data_facts(job.eval),
                "overlap_rows": job.overlap,
            },
            "trace": self._trace_facts(),
            "scores": {name: _score_facts(scores) for name, scores in self.scores.items()},
            "plans": {
                name: _plan_facts(plan) | {"savings": stages[f"plan {name}"]["result"]}
                for name, plan in self.plans.items()
            },
            "variants": self.variants,
            "reference": {"majority_class": majority_class([e.answer for e in job.eval.examples])},
            "stages": [
                {
                    "name": name,
                    "state": state,
                    "seconds": stages[name].get("seconds"),
                    "peak_memory_bytes": stages[name].get("peak_memory_bytes"),
                }
                for name, state in self.directory.visited.items()
            ],
            "warnings": job.warnings,
        }

    def _trace_facts(self) -> dict[str, Any] | None:
        entry = self.directory.stages.get("record")
        if entry is None or entry["state"] != "done":
            return None
        facts = {key: value for key, value in entry["result"].items() if key != "notes"}
        return facts | {
            "seconds": entry["seconds"],
            "peak_memory_bytes": entry["peak_memory_bytes"],
        }

    def _method(self, variant: str) -> Any:
        return METHODS.find(_method_name(variant))


class _Variant:
    """One row: prune, measure, fine-tune, measure; each its own stage."""

    def __init__(self, run: _Run, name: str, row: dict[str, Any]) -> None:
        self.run, self.job, self.name, self.row = run, run.job, name, row
        self.recipe = run.recipe
        self.plan = run.plans.get(name)
        base = f"variants/{name}"
        self.pruned, self.tuned, self.checkpoints = (
            f"{base}/pruned",
            f"{base}/model",
            f"{base}/checkpoints",
        )
        self.before, self.examples = f"{base}/examples_before.jsonl", f"{base}/examples.jsonl"
        self.inputs: dict[str, Any] = {
            "model": self.job.model_sha256,
            "plan": self.plan.to_dict() if self.plan else None,
            "loading": self.recipe.model.model_dump(exclude={"path"}),
        }
        train = {
            "train": _data_identity(self.job.train),
            "max_length": self.job.max_length,
            "finetune": self.recipe.finetune.model_dump(exclude={"report_to", "save_steps"}),
            "seed": self.recipe.seed,
        }
        self.measure_inputs = {
            "eval": _data_identity(self.job.eval),
            "evaluate": self.recipe.evaluate.model_dump(exclude={"before_finetuning"}),
            "max_length": self.job.max_length,
            "seed": self.recipe.seed,
        }
        self.tune_inputs = {**self.inputs, **train}

    def up_to(self, depth: int) -> None:
        before = {**self.inputs, **self.measure_inputs}
        after = {**self.tune_inputs, **self.measure_inputs}
        wants_before = self.recipe.evaluate.before_finetuning and depth >= STAGES.index("evaluate")
        current = self.run.directory.is_current
        # With keep_models: none the folders are gone once measured; nothing needs them again then.
        measured = current(f"evaluate {self.name}", after) and (
            not wants_before or current(f"evaluate {self.name} before", before)
        )
        if self.plan is not None and not (measured and self.recipe.keep_models == "none"):
            self.stage("prune", self.inputs, self.prune, [self.pruned])
        if wants_before:
            self.row["before"] = self.stage(
                "evaluate", before, lambda: self.measure(self.source, self.before), [self.before], " before"
            )
        if depth >= STAGES.index("finetune"):
            done = self.run.directory.stages.get(f"finetune {self.name}", {})
            if measured and self.recipe.keep_models == "none" and "result" in done:
                self.row["finetune"] = done["result"]
            else:
                self.row["finetune"] = self.stage(
                    "finetune", self.tune_inputs, self.tune, [self.tuned, self.checkpoints]
                )
        if depth >= STAGES.index("evaluate"):
            self.row["evaluation"] = self.stage(
                "evaluate",
                after,
                lambda: self.measure(self.run.path(self.tuned), self.examples),
                [self.examples],
            )
            if self.recipe.keep_models == "none":
                self.run.directory.remove([self.pruned, self.tuned, self.checkpoints])
        self._describe_size()

    def stage(
        self,
        verb: str,
        inputs: dict[str, Any],
        work: Callable[[], dict[str, Any]],
        outputs: list[str],
        suffix: str = "",
    ) -> dict[str, Any]:
        return self.run.directory.stage(
            f"{verb} {self.name}{suffix}", inputs, work, outputs, keep_partial=verb == "finetune"
        )

    def _describe_size(self) -> None:
        keep = self.plan.keep if self.plan else range(self.job.num_layers)
        self.row["num_layers"] = len(keep)
        self.row["num_parameters"] = savings(self.job.config, list(keep))["parameters"]["after"]

    @property
    def source(self) -> Path:
        """The model before fine-tuning."""
        return self.run.path(self.pruned) if self.plan is not None else self.job.folder

    def prune(self) -> dict[str, Any]:
        assert self.plan is not None
        model = self.job.load(self.job.folder)
        linears = sum(
            len(self.run.trace.linear_names(target)) for target in self.plan.merged
        )
        with Progress(linears, f"merge {self.name}") as progress:
            trace = self.run.trace if self.plan.merged else None
            prune_(model, self.plan, trace, lambda _: progress.advance())
        self._save(model, self.pruned)
        _free(model)
        return {}

    def tune(self) -> dict[str, Any]:
        options = self.recipe.finetune
        # AdamW's updates are far below the resolution of bfloat16: weights that train are float32.
        updated = "float32" if options.mode == "full" and self.recipe.model.dtype == "auto" else None
        model, result = finetune(
            self.job.load(self.source, dtype=updated),
            self.job.samples,
            collator=self.job.collator,
            seed=self.recipe.seed,
            checkpoints=self.run.path(self.checkpoints),
            description=f"finetune {self.name}",
            device="cpu" if self.job.device == "cpu" else "auto",
            **options.model_dump(),
        )
        self._save(model, self.tuned, {"finetune": result.to_dict() | {"losses": None}})
        self.run.directory.remove([self.checkpoints])
        _free(model)
        return result.to_dict() | {"output": self.tuned}

    def _save(self, model: Any, folder: str, facts: dict[str, Any] | None = None) -> None:
        save_model(
            model,
            self.job.tokenizer,
            self.run.path(folder),
            dtype=stored_dtype(self.job.folder),
            plan=self.plan,
            source=self.recipe.model.path,
            facts=facts,
        )

    def measure(self, folder: Path, examples: str) -> dict[str, Any]:
        """Evaluates what is on disk: the very folder a user would load."""
        options = self.recipe.evaluate
        if (folder / ADAPTER_FILE).exists():
            model = load_adapter(self.job.load(self.source), folder)
        else:
            model = self.job.load(folder)
        result = evaluate(
            model,
            self.job.tokenizer,
            self.job.eval.examples,
            metrics=tuple(options.metrics),
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            max_length=self.job.max_length,
            seed=self.recipe.seed,
        )
        result.write_examples(self.run.path(examples))
        _free(model)
        return result.summary() | {"per_example": examples}


def bytes_to_write(job: Job) -> dict[str, int]:
    """What a run puts on disk: `trace`, `models` that stay, and `temporary` on top at the worst moment."""
    recipe = job.recipe
    plan = job.given_plan or plan_for(job, placeholder_scores(job.num_layers), merging=False)
    sizes = savings(job.config, plan.keep)["disk_bytes"]
    rows = [sizes["before"] if v == "dense" else 2 * sizes["after"] for v in recipe.variants]
    trace = 0
    if any(METHODS.find(_method_name(v)).needs_trace for v in recipe.variants if v != "dense"):
        view = LayeredModel(build_on_meta(job.config))
        modules: list[Any] = [m for i in range(view.num_layers) for m in view.linears(i).values()]
        per_step = sum(sum(module.weight.shape) for module in modules)
        trace = 4 * job.record_steps * recipe.record.rank * per_step
    temporary = 0 if recipe.keep_models == "all" else max(rows)
    options = recipe.finetune
    if options.mode == "full" and options.save_steps and job.finetune_steps >= options.save_steps:
        # float32 weights and two moments; two checkpoints are kept while a third is written.
        temporary += 3 * 12 * count_parameters_of(job.config)
    return {"trace": trace, "models": sum(rows) if recipe.keep_models == "all" else 0, "temporary": temporary}


def bytes_missing(job: Job, folder: Path, until: str) -> int:
    """What a run has still to write, given what an earlier start left in its directory."""
    needs = bytes_to_write(job)
    total = needs["trace"] if STAGES.index(until) < STAGES.index("prune") else sum(needs.values())
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return max(0, total - present)


def placeholder_scores(num_layers: int) -> LayerScores:
    """Scores for asking what a budget comes to; how many layers go does not depend on the scores."""
    return LayerScores("placeholder", tuple(map(float, range(num_layers))))


def plan_for(job: Job, scores: LayerScores, merging: bool) -> PruningPlan:
    """The recipe's budget applied to scores."""
    options = job.recipe.plan
    fractions: dict[str, Any] = {}
    if options.parameter_fraction is not None:
        fractions = {
            "layer_parameters": layer_parameters(job.config),
            "total_parameters": count_parameters_of(job.config),
        }
    chosen = options.model_dump(exclude={"file"}) | ({} if merging else {"num_merge": 0})
    return plan_pruning(scores, **chosen, **fractions)


def count_parameters_of(config: Any) -> int:
    """Parameters of a model given by its config; tied weights count once."""
    return count_parameters(build_on_meta(config))


def _method_name(variant: str) -> str:
    return "gradpruner" if variant in LABELS else variant


def _task_name(recipe: Recipe) -> str:
    return recipe.data.task or Path(str(recipe.data.train).partition("#")[0]).stem


def _data_identity(examples: ExampleSet) -> dict[str, Any]:
    """What makes two sets of examples the same: the bytes they came from and which rows were taken."""
    ids = [example.id for example in examples.examples]
    return {"sha256": examples.sha256, "format": examples.format, "rows": ids}


def _data_facts(examples: ExampleSet) -> dict[str, Any]:
    return {
        "source": examples.source,
        "format": examples.format,
        "rows": len(examples),
        "dropped_rows": examples.num_dropped,
        "sha256": examples.sha256,
        "notes": list(examples.notes),
    }


def _score_facts(scores: LayerScores) -> dict[str, Any]:
    return {
        "method": scores.method,
        "norm": scores.evidence.get("norm"),
        "values": list(scores.values),
        "low": list(scores.low),
        "high": list(scores.high),
        "stability": [{"step": step, "overlap": overlap} for step, overlap in scores.stability],
    }


def _plan_facts(plan: PruningPlan) -> dict[str, Any]:
    return {
        "num_layers": plan.num_layers,
        "actions": [
            {"layer": i, "action": a.action, "into": a.into} for i, a in enumerate(plan.actions)
        ],
        "num_kept": len(plan.keep),
        "rule": plan.rule,
        "density": plan.density,
    }


def _free(model: Any) -> None:
    """Gives the model's memory back before the next one is loaded."""
    if not getattr(model, "is_loaded_in_4bit", False):  # bitsandbytes refuses to be moved
        model.to("meta")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
