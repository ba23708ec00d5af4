"""What a recipe's budget comes to: plans made from scores or read from a file, and the bytes a run writes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradpruner.evaluation.costing.per_device import trace_bytes
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS
from gradpruner.models.config_patch import required_layers
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.selection import plan_pruning
from gradpruner.runs.plan_names import STAGES, method_of

if TYPE_CHECKING:
    from gradpruner.runs.job import Job

# Keys of the recipe's plan section that say nothing about which layers go.
REPAIR_KEYS = frozenset({"repair", "repair_rows", "repair_answers", "max_loss", "confidence"})


def placeholder_scores(num_layers: int) -> LayerScores:
    """Scores to work out a budget with: how many layers go does not depend on them."""
    return LayerScores("placeholder", tuple(map(float, range(num_layers))))


def plan_for(
    job: Job,
    scores: LayerScores,
    merging: bool,
    chosen_by_method: dict[str, Any] | None = None,
    num_prune: int | None = None,
) -> PruningPlan:
    """The recipe's budget, or `num_prune` layers, applied to scores; all are dropped without `merging`.

    Keys of the plan section that a method sets itself (`chosen_by_method`) come before the recipe's.
    """
    options = job.recipe.plan
    fractions: dict[str, Any] = {}
    if options.parameter_fraction is not None:
        fractions = {
            "layer_parameters": job.sizes.layer_parameters,
            "total_parameters": job.sizes.parameters,
        }
    chosen = options.model_dump(exclude={"file", "name", "portable_to", "unit", *REPAIR_KEYS}) | (
        {} if merging else {"num_merge": 0}
    )
    chosen |= chosen_by_method or {}
    if num_prune is not None:
        chosen |= {"num_prune": num_prune, "layer_fraction": None, "parameter_fraction": None, "layers": None}
        fractions = {}
    chosen["protect"] = sorted({*options.protect, *required_layers(job.text, job.family)})
    if merging:
        chosen["kinds"] = job.layer_kinds
    return plan_pruning(scores, **chosen, **fractions, fits=job.slots())


def bytes_to_write(job: Job) -> dict[str, int]:
    """What a run puts on disk: `trace`, `models` that stay, and `temporary` on top at the worst moment."""
    recipe = job.recipe
    plan = job.expected_plan
    sizes = job.sizes.savings(plan.keep)["disk_bytes"]
    rows = [sizes["before"] if v == "dense" else _row_bytes(v, sizes) for v in recipe.variants]
    trace = 0
    if any(METHODS.find(method_of(v)).needs_trace for v in recipe.variants if v != "dense"):
        trace = trace_bytes(job.sizes.model, recipe.record.rank, job.record_steps)
    temporary = 0 if recipe.keep_models == "all" else max(rows)
    options = recipe.finetune
    if options.mode == "full" and options.save_steps and job.finetune_steps >= options.save_steps:
        # float32 weights and two moments; two checkpoints are kept while a third is written.
        temporary += 3 * 12 * job.sizes.parameters
    return {"trace": trace, "models": sum(rows) if recipe.keep_models == "all" else 0, "temporary": temporary}


def _row_bytes(variant: str, sizes: dict[str, int]) -> int:
    """The pruned model, the recovered one, and the fine-tuned one."""
    method = METHODS.find(method_of(variant))
    if not method.removes:
        return sizes["before"]
    return (3 if method.recover else 2) * sizes["after"]


def bytes_missing(job: Job, folder: Path, until: str) -> int:
    """What a run has still to write, given what an earlier start left in its directory."""
    needs = bytes_to_write(job)
    total = needs["trace"] if STAGES.index(until) < STAGES.index("prune") else sum(needs.values())
    files = (path for path in folder.rglob("*") if path.is_file() and job.folder not in path.parents)
    present = sum(path.stat().st_size for path in files)
    return max(0, total - present)
