"""The work on one row of the comparison: each method goes from one folder of the run to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from gradpruner.common.progress import Progress, show_bytes
from gradpruner.common.run_names import row_file
from gradpruner.common.world import this_world
from gradpruner.evaluation.outputs import journals
from gradpruner.evaluation.quality import Evaluation, evaluate
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext
from gradpruner.models.checking import ADAPTER_FILE
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.loading import load_adapter
from gradpruner.models.saving import save_model
from gradpruner.models.widths import WidthView
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan, load_plan, read_plan
from gradpruner.plans.repair import Repair
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.refitting import fit_repair
from gradpruner.pruning.verification import VerifyReport
from gradpruner.pruning.widths_on_disk import check_narrowed, prune_width_checkpoint
from gradpruner.runs.folder.directory import RunDirectory, fingerprint
from gradpruner.runs.folder.plan_names import LABELS, variant_of
from gradpruner.runs.job.evaluation_data import asked_of_harness, options_of
from gradpruner.runs.job.job import Job
from gradpruner.runs.row.held_out import better_of, loss_before
from gradpruner.runs.row.together import together
from gradpruner.training.adapters import Adapters
from gradpruner.training.finetuning import FinetuneResult, finetune
from gradpruner.training.options import FinetuneOptions


class Work:
    """What can be done for one row; `variant.Variant` says in which order, and what is skipped.

    Args:
        name: Of the row: "dense", "merged", "dropped" or a method of `METHODS`. With several plans of one
            variant, "merged@NAME".
        plan: What is pruned; None for the dense model, and for methods that plan while they train.
        trace: Opens the recorded gradients; called only if layers are merged.
    """

    def __init__(
        self,
        job: Job,
        directory: RunDirectory,
        name: str,
        plan: Plan | None,
        trace: Callable[[], GradientTrace],
    ) -> None:
        self.job, self.recipe, self.directory = job, job.recipe, directory
        self.name, self.plan, self.trace = name, plan, trace
        self.variant = variant_of(name)
        self.method = METHODS.find(self.variant) if self.variant not in LABELS else None
        self.pruned, self.recovered = row_file(name, "pruned"), row_file(name, "recovered")
        self.repaired, self.scratch = row_file(name, "repair"), row_file(name, "method")
        self.checkpoints = row_file(name, "checkpoints")
        self.own_plan, self.tuned = own_plan(name), tuned_folder(name)

    def path(self, relative: str) -> Path:
        """A path inside the run directory."""
        return self.directory.path / relative

    @property
    def is_dense(self) -> bool:
        """Whether the row starts from the model as given: dense, or a method that sets its own training."""
        return self.name == "dense" or (self.method is not None and self.method.training is not None)

    @property
    def trains(self) -> bool:
        """Whether this row is trained: fine-tuned or, if a tuned model was pruned, recovered."""
        if self.is_dense:
            return self.recipe.start != "given"
        return self.recipe.start == "base" or self.recipe.recover.trains

    @property
    def repairs(self) -> bool:
        """Whether linears of the kept layers are refitted."""
        wanted = self.recipe.plan.repair != "none"
        return wanted and self.plan is not None and bool(self.plan.pruned)

    @property
    def shrinks(self) -> bool:
        """Whether the method prunes while it trains."""
        return self.method is not None and self.method.shrink is not None

    @property
    def context(self) -> MethodContext:
        """What the method of this row may look at."""
        return self.job.context(self.variant, self.trace, self.path(self.scratch))

    @property
    def source(self) -> Path:
        """Folder of the model before fine-tuning."""
        if self.method and self.method.recover:
            return self.path(self.recovered)
        if self.plan is not None:
            return self.path(self.pruned)
        return self.job.folder if self.is_dense else self.job.origin

    @property
    def outcome(self) -> Path:
        """Folder of the finished model."""
        return self.path(self.tuned) if self.trains else self.source

    def repair(self) -> dict[str, Any]:
        """Dense model, plan and samples -> refitted linears"""
        found: Repair = self._in_all_processes("fit")
        found.save(self.path(self.repaired))
        return found.facts()

    def fit(self) -> Repair:
        """Fits the repair of this row's plan; returns it in memory."""
        assert self.plan is not None and self.plan.kind == "layers"
        model = self.job.load_origin()
        with Progress(self.job.num_layers, f"repair {self.name} [layers]") as progress:
            trace = self.trace() if self.plan.needs_trace else None
            found = fit_as_asked(self.job, model, self.plan, trace, progress.advance)
        self.job.release(model)
        return found

    def prune(self) -> dict[str, Any]:
        """Dense model and plan -> pruned model"""
        if self.shrinks:
            found = self._shrink()
            read_plan(found["plan"]).save(self.path(self.own_plan))
            return found
        assert self.plan is not None
        self.plan.save(self.path(self.own_plan))
        report = self._prune_widths(self.plan) if self.plan.kind == "width" else self._prune_layers(self.plan)
        return {"verified": report.to_dict()}

    def _prune_widths(self, plan: WidthPlan) -> VerifyReport:
        with Progress(1, f"prune {self.name}") as progress:
            report = prune_width_checkpoint(
                self.job.origin,
                self.path(self.pruned),
                plan,
                device=self.job.device,
                name=self.recipe.model.path,
            )
            progress.update(1)
        return report

    def _prune_layers(self, plan: PruningPlan) -> VerifyReport:
        trace = self.trace() if plan.needs_trace else None
        size = self.job.sizes.savings(plan.keep)["disk_bytes"]["after"]
        with show_bytes(size, f"prune {self.name}") as progress:
            return prune_checkpoint(
                self.job.origin,
                self.path(self.pruned),
                plan,
                trace,
                verify=self.recipe.verify,
                progress=progress,
                repair=Repair.load(self.path(self.repaired)) if self.repairs else None,
            )

    def _shrink(self) -> dict[str, Any]:
        """Dense model -> model that was pruned during training"""
        assert self.method is not None and self.method.shrink is not None
        model, self.plan = self.method.shrink(self.context)
        self._save(model, self.pruned)
        expected = WidthView(self.job.skeleton()).parameters(self.plan)
        report = check_narrowed(self.path(self.pruned), expected, None)
        self.job.release(model)
        self.directory.remove([self.scratch])
        return {"plan": self.plan.to_dict(), "verified": report.to_dict()}

    def recover(self) -> dict[str, Any]:
        """Pruned model -> model after the recovery that its method brings"""
        assert self.method is not None and self.method.recover is not None
        model = self.job.load(self.path(self.pruned), dtype=self.recipe.model.trained_dtype("full"))
        result = self.method.recover(self.context, model)
        self._save(model, self.recovered)
        self.job.release(model)
        self.directory.remove([self.scratch])
        return result

    def tune(self) -> dict[str, Any]:
        """Pruned (or dense) model -> fine-tuned model"""
        compares = self.recipe.chooses_recovery and not self.is_dense
        before = loss_before(self.job, self.source) if compares else None
        result: FinetuneResult
        model, result = self._in_all_processes("train")
        facts = asdict(result)
        if before is not None:
            model, facts["kept"] = better_of(self.job, self.source, model, before)
        self._save(model, self.tuned, finetune=facts | {"losses": None})
        self.directory.remove([self.checkpoints])
        self.job.release(model)
        return facts | {"output": self.tuned}

    def _in_all_processes(self, method: str, *arguments: Any) -> Any:
        """Calls a method of this row, by its name, in all processes of the job at once."""
        plan = self.plan.to_dict() if self.plan else None
        return together(self.job, on_row, str(self.directory.path), self.name, plan, method, *arguments)

    def train(self) -> tuple[Any, FinetuneResult]:
        """Fine-tunes; returns the model, in memory, and how the training went."""
        options = self._training_options()
        updated = self.recipe.model.trained_dtype(options.mode)
        callbacks = self.method.callbacks(self.context) if self.method and self.method.callbacks else []
        model, result = finetune(
            self.job.load(self.source, dtype=updated, quantise=options.mode == "qlora"),
            self.job.samples,
            options,
            collator=self.job.collator,
            checkpoints=self.path(self.checkpoints),
            description=f"finetune {self.name}",
            callbacks=callbacks,
            **self._teacher(),
        )
        return finished(self.job, model, self.source), result

    def _training_options(self) -> FinetuneOptions:
        """The recipe's `finetune` section, with the changes that `recover` or the method make."""
        options, recover = self.job.training, self.recipe.recover
        changes: dict[str, Any] = {}
        if not self.is_dense and self.recipe.start != "base":
            changes["learning_rate"] = self.job.recover_rate
            changes |= {"epochs": recover.epochs} if recover.steps is None else {"max_steps": recover.steps}
        if self.method and self.method.training:
            changes |= self.method.training(self.context)
        return options.model_copy(update=changes)

    def _teacher(self) -> dict[str, Any]:
        """The tuned dense model as the teacher, in arguments of `finetune`; {} without distillation."""
        if self.is_dense or not self.recipe.distils:
            return {}
        folder = self.job.folder if self.recipe.start == "given" else self.path(tuned_folder("dense"))
        return {"teacher": self.job.load(folder), "distillation": self.recipe.distil}

    def _save(self, model: Any, folder: str, **facts: Any) -> None:
        if self.plan is not None:  # the model card says which engines serve the pruned model correctly
            facts["portability"] = [vars(v) for v in self.job.portability_of(self.plan)]
        save_model(
            model,
            self.job.tokenizer,
            self.path(folder),
            dtype=stored_dtype(self.job.folder),
            plan=self.plan,
            source=self.recipe.model.path,
            facts=facts,
            like=self.job.folder,
        )

    def load(self, folder: Path) -> Any:
        """Loads a model from the folder that the user gets; merges adapters into their model."""
        if (folder / ADAPTER_FILE).exists():
            return load_adapter(self.job.load(self.source), folder)
        return self.job.load(folder)

    def measure(self, folder: Path, file: str, rows: str, metrics: tuple[str, ...]) -> dict[str, Any]:
        """Evaluates a model folder on rows (see `Job.rows`) and writes its answers to `file`."""
        kept = str(self.path(journal(file)))
        result: Evaluation = self._in_all_processes("evaluate", str(folder), rows, metrics, kept)
        result.write_examples(self.path(file))
        for part in journals(self.path(journal(file))):
            part.unlink()
        return result.summary() | {"per_example": file, "source": self.job.rows(rows).source}

    def evaluate(self, folder: str, rows: str, metrics: tuple[str, ...], kept: str) -> Evaluation:
        """Evaluates a model folder on rows; the journal `kept` holds the answers so far, for a resume."""
        model = self.load(Path(folder))
        result = evaluate(
            model,
            self.job.tokenizer,
            self.job.questions(rows),
            options_of(self.recipe, metrics, self.job.max_length),
            progress=f"evaluate {self.name}",
            journal=Path(kept),
            world=this_world(),
        )
        self.job.release(model)
        return result

    def run_harness(self) -> dict[str, Any]:
        """Fine-tuned model -> scores of lm-evaluation-harness"""
        model = self.load(self.outcome)
        found = asked_of_harness(self.recipe, model, self.job.tokenizer)
        self.job.release(model)
        return found


def finished(job: Job, model: Any, folder: Path) -> Any:
    """Returns a fine-tuned model as it is saved; of several processes, only the first one uses it.

    Adapters that were trained on 4-bit weights go onto the full weights, which are in `folder`.
    """
    if job.recipe.finetune.mode != "qlora" or not this_world().is_first:
        return model
    adapters = Adapters.of(model)
    job.release(model)
    return adapters.put_on(job.load(folder), merge=job.recipe.finetune.merge_adapter)


def on_row(job: Job, out: str, name: str, plan: dict[str, Any] | None, method: str, *arguments: Any) -> Any:
    """Calls a method of `Work`, by its name, on a row; `_in_all_processes` sends this call."""
    directory = RunDirectory(out, device=job.device)
    found = read_plan(plan) if plan is not None else None
    row = Work(job, directory, name, found, lambda: GradientTrace.load(directory.path / "trace"))
    return getattr(row, method)(*arguments)


def fit_as_asked(
    job: Job,
    model: nn.Module,
    plan: PruningPlan,
    trace: GradientTrace | None,
    progress: Callable[[int], None] | None = None,
) -> Repair:
    """Fits the repair of a plan with the recipe's settings."""
    kind, rows, answers = job.how_repaired
    return fit_repair(
        model,
        plan,
        job.samples,  # type: ignore[arg-type]
        job.collator,
        kind=kind,
        rows=rows,
        answers=answers,
        trace=trace,
        seed=job.recipe.seed,
        progress=progress,
        world=this_world(),
    )


def tuned_folder(name: str) -> str:
    """Folder of a row's fine-tuned model, relative to the run directory."""
    return row_file(name, "model")


def plan_file(row: str) -> str:
    """File of a row's plan, for users to read and edit, relative to the run directory."""
    return f"plans/{row}.json"


def stored_plan(directory: RunDirectory, row: str) -> Plan | None:
    """The plan of a row as it was decided; None if there is none, or only a file that was edited since."""
    shrunk = (directory.result(f"prune {row}") or {}).get("plan")
    if shrunk is not None:
        return read_plan(shrunk)
    if directory.result(f"plan {row}") is not None and directory.has_files(f"plan {row}"):
        return load_plan(directory.path / plan_file(row))
    path = directory.path / own_plan(row)
    return load_plan(path) if path.is_file() else None


def same_plan(one: Plan | None, other: Plan | None) -> bool:
    """Whether both plans are there and say the same."""
    return (
        one is not None and other is not None and fingerprint(one.to_dict()) == fingerprint(other.to_dict())
    )


def own_plan(name: str) -> str:
    """File of the plan that a row's models were made by; the one in plans/ may have been edited since."""
    return row_file(name, "plan.json")


def journal(file: str) -> str:
    """File that keeps the answers of an evaluation until all are there."""
    return f"{file}.part"
