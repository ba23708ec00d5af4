"""How many bytes a run writes to disk."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gradpruner.common.files import folder_bytes
from gradpruner.evaluation.costing.per_device import trace_bytes
from gradpruner.methods import METHODS
from gradpruner.runs.folder.plan_names import STAGES, method_of
from gradpruner.runs.job.job import Job


def bytes_to_write(job: Job, done: Collection[str] = ()) -> dict[str, int]:
    """Returns the bytes a run writes: `trace`, `models` that stay, and `temporary` files at their peak.

    The trace and the dense model do not count if their stages are `done`.
    """
    recipe = job.recipe
    plan = job.expected_plan
    sizes = job.sizes.savings(plan.keep)["disk_bytes"]
    rows = [sizes["before"] if v == "dense" else _row_bytes(v, sizes) for v in recipe.variants]
    written = sum(rows) - (sizes["before"] if "finetune dense" in done else 0)
    trace = 0
    if "record" not in done and job.recorded_steps:
        trace = trace_bytes(job.sizes.model, recipe.record.rank, job.recorded_steps)
    temporary = 0 if recipe.keep_models == "all" else max(rows)
    options = recipe.finetune
    if options.mode == "full" and options.save_steps and job.finetune_steps >= options.save_steps:
        # A checkpoint is float32 weights and two moments; two are kept while a third is written.
        temporary += 3 * 12 * job.sizes.parameters
    # With keep_models: none, only the tuned model stays that the others are made from.
    kept = sizes["before"] if recipe.tunes_first and "finetune dense" not in done else 0
    return {
        "trace": trace,
        "models": written if recipe.keep_models == "all" else kept,
        "temporary": temporary,
    }


def _row_bytes(variant: str, sizes: dict[str, int]) -> int:
    """Bytes of a pruned row's models: pruned, recovered if the method does that, and fine-tuned."""
    method = METHODS.find(method_of(variant))
    if not method.removes:
        return sizes["before"]
    return (3 if method.recover else 2) * sizes["after"]


def bytes_missing(job: Job, folder: Path, until: str) -> int:
    """Returns the bytes a run has still to write, besides what its directory already holds."""
    needs = bytes_to_write(job)
    total = needs["trace"] if STAGES.index(until) < STAGES.index("prune") else sum(needs.values())
    return max(0, total - folder_bytes(folder, without=job.folder))
