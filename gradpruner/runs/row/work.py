"""The work on one compared model: each function reads one folder of the run and writes the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.common.errors import IntegrityError
from gradpruner.common.progress import Progress, show_bytes
from gradpruner.common.world import this_world
from gradpruner.evaluation.outputs import journals
from gradpruner.evaluation.quality import Evaluation, evaluate
from gradpruner.gradients.trace import GradientTrace
from gradpruner.models.checking import ADAPTER_FILE
from gradpruner.models.dtypes import stored_dtype
from gradpruner.models.folder import read_pruning
from gradpruner.models.loading import load_adapter
from gradpruner.models.saving import save_model
from gradpruner.models.widths import WidthView
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import read_plan
from gradpruner.plans.repair import Repair
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.pruning.verification import VerifyReport
from gradpruner.pruning.widths_on_disk import check_narrowed, prune_width_checkpoint
from gradpruner.runs.folder.directory import RunDirectory
from gradpruner.runs.folder.plan_names import journal, scores_folder, tuned_folder
from gradpruner.runs.folder.row_names import scores_of_plan
from gradpruner.runs.job.evaluation_data import asked_of_harness, options_of
from gradpruner.runs.job.job import Job
from gradpruner.runs.row.held_out import better_of, losses_before
from gradpruner.runs.row.together import together
from gradpruner.runs.row.variant import Variant
from gradpruner.training.adapters import Adapters
from gradpruner.training.finetuning import FinetuneResult, finetune
from gradpruner.training.options import FinetuneOptions

log = logging.getLogger(__name__)

T = TypeVar("T")


def repair(variant: Variant) -> dict[str, Any]:
    """Dense model, plan and samples -> refitted linears"""
    found = _fitted_before(variant) or _in_all_processes(variant, fit)
    found.save(variant.path(variant.repaired))
    return found.facts()


def _fitted_before(variant: Variant) -> Repair | None:
    """Returns the repair that was fitted to choose the layers, if it is as this run would fit it.

    With plan.max_loss it is not: rows are set aside for the choice, and what is certified is fitted on all.
    """
    if variant.recipe.plan.max_loss is not None:
        return None
    folder = variant.path(scores_folder(str(scores_of_plan(variant.directory, variant.name)))) / "repair"
    if variant.plan is None or not folder.is_dir():
        return None
    wanted = variant.job.repair
    try:
        found = Repair.load(folder)
    except IntegrityError:  # from an interrupted start
        return None
    same = (found.kind, found.rows, found.answers) == (wanted.kind, wanted.rows, wanted.answers)
    if not same or found.pruned != variant.plan.pruned:
        return None
    log.info("repair %s: fitted already, when the layers were chosen", variant.name)
    return found


def fit(variant: Variant) -> Repair:
    """Fits the repair of a variant's plan; returns it in memory."""
    assert variant.plan is not None and variant.plan.kind == "layers"
    job = variant.job
    model = job.load_origin()
    steps = job.num_layers * (2 if job.repair.answers else 1)
    with Progress(steps, f"repair {variant.name} [layers]") as progress:
        trace = variant.trace() if variant.plan.needs_trace else None
        found = fit_repair(
            model,
            variant.plan,
            job.samples,
            job.collator,
            job.repair,
            trace=trace,
            progress=progress.advance,
            world=this_world(),
        )
        progress.update(steps)  # the walk ends at the last layer that is repaired
    job.release(model)
    return found


def prune(variant: Variant) -> dict[str, Any]:
    """Dense model and plan -> pruned model"""
    if variant.shrinks:
        found = _shrink(variant)
        read_plan(found["plan"]).save(variant.path(variant.own_plan))
        return found
    assert variant.plan is not None
    variant.directory.remove([scores_folder(str(scores_of_plan(variant.directory, variant.name)))])
    variant.plan.save(variant.path(variant.own_plan))
    report = (
        _prune_widths(variant, variant.plan)
        if variant.plan.kind == "width"
        else _prune_layers(variant, variant.plan)
    )
    return {"verified": report.to_dict()}


def _prune_widths(variant: Variant, plan: WidthPlan) -> VerifyReport:
    with Progress(1, f"prune {variant.name}") as progress:
        report = prune_width_checkpoint(
            variant.job.origin,
            variant.path(variant.pruned),
            plan,
            device=variant.job.device,
            name=variant.origin_name,
        )
        progress.update(1)
    return report


def _prune_layers(variant: Variant, plan: PruningPlan) -> VerifyReport:
    trace = variant.trace() if plan.needs_trace else None
    size = variant.job.sizes.savings(plan.keep)["disk_bytes"]["after"]
    with show_bytes(size, f"prune {variant.name}") as progress:
        return prune_checkpoint(
            variant.job.origin,
            variant.path(variant.pruned),
            plan,
            trace,
            verify=variant.recipe.verify,
            progress=progress,
            repair=Repair.load(variant.path(variant.repaired)) if variant.repairs else None,
            name=variant.origin_name,
        )


def _shrink(variant: Variant) -> dict[str, Any]:
    """Dense model -> model that was pruned during training"""
    assert variant.method is not None and variant.method.shrink is not None
    model, variant.plan = variant.method.shrink(variant.context)
    _save(variant, model, variant.pruned)
    expected = WidthView(variant.job.structure.model).parameters(variant.plan)
    report = check_narrowed(variant.path(variant.pruned), expected, None)
    variant.job.release(model)
    variant.directory.remove([variant.scratch])
    return {"plan": variant.plan.to_dict(), "verified": report.to_dict()}


def recover(variant: Variant) -> dict[str, Any]:
    """Pruned model -> model after the recovery that its method brings"""
    assert variant.method is not None and variant.method.recover is not None
    model = variant.job.load(variant.path(variant.pruned), dtype=variant.recipe.model.trained_dtype("full"))
    result = variant.method.recover(variant.context, model)
    _save(variant, model, variant.recovered)
    variant.job.release(model)
    variant.directory.remove([variant.scratch])
    return result


def tune(variant: Variant) -> dict[str, Any]:
    """Pruned (or dense) model -> fine-tuned model"""
    before = losses_before(variant.job, variant.source) if variant.compares else None
    model, result = _in_all_processes(variant, train)
    facts = asdict(result)
    if before is not None:
        model, facts["kept"] = better_of(variant.job, variant.source, model, before)
    _save(variant, model, variant.tuned, finetune=facts | {"losses": None})
    variant.directory.remove([variant.checkpoints])
    variant.job.release(model)
    return facts | {"output": variant.tuned}


def _in_all_processes(variant: Variant, work: Callable[..., T], *arguments: Any) -> T:
    """Calls `work(variant, *arguments)` in all processes of the job at once."""
    plan = variant.plan.to_dict() if variant.plan else None
    where = str(variant.directory.path)
    result: T = together(variant.job, on_variant, where, variant.name, plan, work, *arguments)
    return result


def train(variant: Variant) -> tuple[Any, FinetuneResult]:
    """Fine-tunes; returns the model, in memory, and how the training went."""
    options = _training_options(variant)
    updated = variant.recipe.model.trained_dtype(options.mode)
    callbacks = (
        variant.method.callbacks(variant.context) if variant.method and variant.method.callbacks else []
    )
    model, result = finetune(
        variant.job.load(variant.source, dtype=updated, quantise=options.mode == "qlora"),
        variant.job.samples,
        options,
        collator=variant.job.collator,
        checkpoints=variant.path(variant.checkpoints),
        description=f"finetune {variant.name}",
        callbacks=callbacks,
        **_teacher(variant),
    )
    return finished(variant.job, model, variant.source), result


def _training_options(variant: Variant) -> FinetuneOptions:
    """The recipe's `finetune` section, with the changes that `recover` or the method make."""
    options = variant.job.training if variant.starts_dense else variant.job.pruned_training
    if variant.method and variant.method.training:
        options = options.model_copy(update=variant.method.training(variant.context))
    return options


def _teacher(variant: Variant) -> dict[str, Any]:
    """The tuned dense model as the teacher, in arguments of `finetune`; {} without distillation."""
    if variant.starts_dense or not variant.recipe.distils:
        return {}
    folder = variant.job.folder if variant.recipe.start == "given" else variant.path(tuned_folder("dense"))
    return {"teacher": variant.job.load(folder), "distillation": variant.recipe.distil}


def _save(variant: Variant, model: Any, folder: str, **facts: Any) -> None:
    """Writes a model that was trained; its records say what `pruned/` says, too."""
    facts["previous"] = read_pruning(variant.origin) or None
    if variant.plan is not None:  # the model card says which engines serve the pruned model correctly
        facts["portability"] = [vars(v) for v in variant.job.portability_of(variant.plan)]
    if variant.repairs:
        facts["repair"] = read_pruning(variant.path(variant.pruned)).get("repair")
    save_model(
        model,
        variant.job.tokenizer,
        variant.path(folder),
        dtype=stored_dtype(variant.job.folder),
        plan=variant.plan,
        source=variant.origin_name,
        facts=facts,
        like=variant.job.folder,
    )


def load(variant: Variant, folder: Path) -> Any:
    """Loads a model from the folder that the user gets; merges adapters into their model."""
    if (folder / ADAPTER_FILE).exists():
        return load_adapter(variant.job.load(variant.source), folder)
    return variant.job.load(folder)


def measure(variant: Variant, folder: Path, file: str, rows: str, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Evaluates a model folder on rows (see `Job.rows`) and writes its answers to `file`."""
    kept = str(variant.path(journal(file)))
    result = _in_all_processes(variant, answer, str(folder), rows, metrics, kept)
    result.write_examples(variant.path(file))
    for part in journals(variant.path(journal(file))):
        part.unlink()
    return result.summary() | {"per_example": file, "source": variant.job.rows(rows).source}


def answer(variant: Variant, folder: str, rows: str, metrics: tuple[str, ...], kept: str) -> Evaluation:
    """Evaluates a model folder on rows; the journal `kept` holds the answers so far, for a resume."""
    model = load(variant, Path(folder))
    result = evaluate(
        model,
        variant.job.tokenizer,
        variant.job.questions(rows),
        options_of(variant.recipe, metrics, variant.job.max_length),
        progress=f"evaluate {variant.name}",
        journal=Path(kept),
        world=this_world(),
    )
    variant.job.release(model)
    return result


def run_harness(variant: Variant) -> dict[str, Any]:
    """Fine-tuned model -> scores of lm-evaluation-harness"""
    model = load(variant, variant.outcome)
    found = asked_of_harness(variant.recipe, model, variant.job.tokenizer)
    variant.job.release(model)
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


def on_variant(
    job: Job, out: str, name: str, plan: dict[str, Any] | None, work: Callable[..., T], *arguments: Any
) -> T:
    """Calls `work` with this process's own `Variant`; `_in_all_processes` sends this call."""
    directory = RunDirectory(out, device=job.device)
    found = read_plan(plan) if plan is not None else None
    trace = partial(GradientTrace.load, directory.path / "trace")
    return work(Variant(job, directory, name, found, trace), *arguments)
