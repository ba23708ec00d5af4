"""What a run directory holds already, for a dry run: those stages are skipped."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from gradpruner.gradients.trace import GradientTrace
from gradpruner.runs.folder.directory import MANIFEST, RunDirectory, Stage, read_manifest
from gradpruner.runs.folder.plan_names import tuned_folder
from gradpruner.runs.job.job import Job
from gradpruner.runs.row.stages import stages_of
from gradpruner.runs.row.variant import Variant


def done_before(job: Job) -> set[str]:
    """Returns the names of stages that are done: the dense model's, and "record".

    Which pruned models are done is known only once the layers are chosen.
    """
    folder = Path(job.recipe.out)
    if not (folder / MANIFEST).is_file():
        return set()
    directory = RunDirectory(folder, inputs=(job.folder,), device=job.device)
    directory.manifest = read_manifest(folder / MANIFEST)
    done: set[str] = set()
    if "dense" in job.recipe.variants:
        dense = Variant(job, directory, "dense", None, partial(GradientTrace.load, folder / "trace"))
        done = {stage.name for stage in stages_of(dense) if directory.is_current(stage)}
    if job.recipe.start == "tuned":
        if "finetune dense" not in done:
            return done
        job.prune_from(folder / tuned_folder("dense"))
    if directory.is_current(Stage("record", job.record_inputs, dict)):
        done.add("record")
    job.prune_from(job.folder)
    return done
