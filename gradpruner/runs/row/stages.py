"""The stages of one compared model: repair, prune, evaluate, fine-tune, evaluate again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

from gradpruner.common.run_names import StageName
from gradpruner.evaluation.outputs import journals
from gradpruner.plans.reading import read_plan
from gradpruner.runs.folder.directory import Stage, inputs_hash
from gradpruner.runs.folder.plan_names import MADE, STAGES, answers_file, journal
from gradpruner.runs.job.evaluation_data import data_identity, metrics_of_task
from gradpruner.runs.job.inputs import encoder_content, harness_identity
from gradpruner.runs.row import work
from gradpruner.runs.row.variant import Variant

log = logging.getLogger(__name__)

# Key of a variant in run.json -> name of the stage whose result it is.
RESULTS = {
    "repair": "repair {}",
    "pruning": "prune {}",
    "recovery": "recover {}",
    "before": "evaluate {} before",
    "finetune": "finetune {}",
    "evaluation": "evaluate {}",
    "lm_eval": "evaluate {} by lm-eval",
}


def stages_of(variant: Variant) -> Iterator[Stage]:
    """The stages of a variant, in order."""
    v, name, pruned, tuned = variant, variant.name, variant.prune_inputs, variant.tune_inputs
    repair, prune, recover = partial(work.repair, v), partial(work.prune, v), partial(work.recover, v)
    tune, harness, options = partial(work.tune, v), partial(work.run_harness, v), v.recipe.evaluate
    if v.repairs:
        yield Stage(f"repair {name}", pruned, repair, [v.repaired], resumes=True, step="prune")
    if v.plan is not None or v.shrinks:
        outputs, origin = [v.pruned, v.scratch, v.own_plan], str(pruned["model"])
        yield Stage(f"prune {name}", pruned, prune, outputs, v.shrinks, "prune", origin)
    if v.recovers:
        outputs = [v.recovered, v.scratch]
        yield Stage(f"recover {name}", tuned, recover, outputs, resumes=True, step="prune")
    if v.trains:
        if options.before_finetuning:
            yield _evaluation(v, "before", tuned if v.recovers else pruned)
        outputs = [v.tuned, v.checkpoints]
        yield Stage(f"finetune {name}", tuned, tune, outputs, resumes=True, step="finetune")
    yield _evaluation(v, "", tuned)
    for task in v.job.also:
        yield _evaluation(v, f"on {task}", tuned, task, metrics_of_task(task))
    if v.recipe.data.validation is not None:
        yield _evaluation(v, "on validation", tuned, "validation")
    if options.lm_eval:
        by_harness, inputs = RESULTS["lm_eval"].format(name), tuned | {"lm_eval": harness_identity(options)}
        yield Stage(by_harness, inputs, harness, resumes=True, step="evaluate")


def _evaluation(
    variant: Variant, what: str, model: dict[str, Any], rows: str = "eval", metrics: tuple[str, ...] = ()
) -> Stage:
    """The stage that evaluates a variant's model.

    Args:
        variant: The compared model.
        what: "before" fine-tuning, "on TASK" for further rows, "" for the finished model on the recipe's.
        model: What the model depends on.
        rows: See `Job.rows`.
        metrics: () takes the job's.
    """
    job, metrics = variant.job, metrics or variant.job.metrics
    settings = {"batch_size", "max_new_tokens", "encoder", "encoder_layer"}
    inputs = {
        "eval": data_identity(job.rows(rows)),
        "evaluate": job.recipe.evaluate.model_dump(include=settings) | {"metrics": list(metrics)},
        "max_length": job.max_length,
        "seed": job.recipe.seed,
        **encoder_content(job.recipe.evaluate, metrics),
    }
    file = answers_file(variant.name, what)

    def measure() -> dict[str, Any]:
        folder = variant.source if what == "before" else variant.outcome
        return work.measure(variant, folder, file, rows, metrics)

    name = f"evaluate {variant.name} {what}".rstrip()
    # The answers so far of every process that took part; there may be fewer processes this time.
    begun = [str(path.relative_to(variant.directory.path)) for path in journals(variant.path(journal(file)))]
    outputs, conditions = [file, *begun], inputs_hash(inputs)[:16]
    return Stage(name, model | inputs, measure, outputs, True, "evaluate", conditions)


def do_stages(variant: Variant, depth: int) -> None:
    """Does a variant's stages up to position `depth` of `STAGES`, except those that are done already."""
    stages, directory, recipe = list(stages_of(variant)), variant.directory, variant.recipe
    _forget_dropped(variant, stages)
    feeds = variant.name == "dense" and recipe.tunes_first  # the other variants need its model
    # With keep_models: none the models are deleted after their evaluation, and not made again.
    deletes = recipe.keep_models == "none" and not feeds
    cleared = deletes and all(directory.is_current(stage) for stage in stages if stage.step == "evaluate")
    for number, stage in enumerate(stages):
        makes = stage.step != "evaluate"  # the stage makes or changes a model
        if STAGES.index(stage.step) > depth:
            continue
        if not (cleared and makes and directory.result(stage.name) is not None):
            if makes and not directory.is_current(stage):
                later = [stage.name for stage in stages[number + 1 :] if directory.result(stage.name)]
                directory.discard([*later, *_dropped(variant, stages)])
                if feeds and directory.result(stage.name):
                    log.warning("warning: the dense model is tuned again; rows of the old one are left out")
            directory.ensure(stage)
        if variant.shrinks and stage.name == f"prune {variant.name}":
            variant.plan = read_plan((directory.result(stage.name) or {})["plan"])
    if deletes and depth >= STAGES.index("evaluate"):
        models = [variant.repaired, variant.pruned, variant.recovered, variant.tuned]
        directory.remove([*models, variant.checkpoints])


def _forget_dropped(variant: Variant, stages: list[Stage]) -> None:
    """Deletes what this recipe no longer makes of a row, such as a recovery, and evaluations of it."""
    dropped = _dropped(variant, stages)
    made = [name for name in dropped if StageName.of(name).verb != "evaluate"]
    if not made:  # evaluations that are no longer asked for are still true of the model
        return
    for name in made:
        log.info("%s: not part of this start any more, its results are deleted", name)
    variant.directory.discard(dropped)


def _dropped(variant: Variant, stages: list[Stage]) -> list[str]:
    """Returns the row's stages of earlier starts that are none of this start's `stages`."""
    ours = {stage.name for stage in stages}
    names = {name: StageName.of(name) for name in variant.directory.stages if name not in ours}
    return [name for name, said in names.items() if said.row == variant.name and said.verb in MADE]
