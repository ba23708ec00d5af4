"""The search for the learning rate: a short fine-tuning at each rate, compared on held-out training rows.

Every rate is a stage of the run directory, so an interrupted search resumes. Evaluation rows are never used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import EncodedDataset
from gradpruner.data.examples import sample
from gradpruner.runs.folder.directory import RunDirectory, Stage
from gradpruner.runs.job.evaluation_data import data_identity, with_validation
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.effects import keys_of
from gradpruner.runs.row.held_out import loss_on
from gradpruner.runs.row.together import together
from gradpruner.runs.row.work import finished
from gradpruner.training.finetuning import finetune, planned_steps

log = logging.getLogger(__name__)

STEPS = 100
"""Optimizer steps at each rate; fewer if the fine-tuning itself has fewer."""
_MOST_RATES = 12


def find_rate(job: Job, directory: RunDirectory) -> None:
    """Tries learning rates, doubling and halving from the job's own, and sets the best one in the job.

    Raises:
        DataError: If there are too few rows to hold any out.
        NonFiniteError: If training became NaN or infinite at every rate.
    """
    first = job.recipe.finetune.learning_rate
    assert first is not None
    inputs = _inputs(job)
    tried: list[dict[str, Any]] = []

    def loss_at(rate: float) -> float:
        work = partial(_measured, job, rate)
        found = directory.ensure(Stage(f"rate {rate:g}", inputs | {"rate": rate}, work))
        tried.append(found)
        return math.inf if found["loss"] is None else float(found["loss"])

    best = best_rate({first: loss_at(first)}, loss_at)
    held_out = tried[0]["rows"]
    job.set_rate(best, f"the best of {len(tried)} tried on {held_out} held-out training rows")
    tried.sort(key=lambda entry: entry["rate"])
    log.info("learning rate  loss on %d held-out rows after %d steps", held_out, tried[0]["steps"])
    for entry in tried:
        loss = "not finite" if entry["loss"] is None else f"{entry['loss']:.4f}"
        log.info("%-13g  %s%s", entry["rate"], loss, "  (taken)" if entry["rate"] == best else "")


def best_rate(losses: dict[float, float], loss_at: Callable[[float], float]) -> float:
    """Finds the rate with the lowest loss: doubles or halves it until it has a worse rate on either side.

    Args:
        losses: Rate -> loss, of at least one rate; infinite if training diverged. Rates that are tried are
            added.
        loss_at: Trains at a rate and returns the loss.

    Raises:
        NonFiniteError: If training diverged at every rate.
    """
    for _ in range(_MOST_RATES):
        best = min(losses, key=lambda rate: (losses[rate], rate))
        finite = math.isfinite(losses[best])
        further = best / 2 if best == min(losses) else None
        if finite and best == max(losses):
            further = best * 2
        if further is None:
            return best
        losses[further] = loss_at(further)
    if math.isfinite(min(losses.values())):
        return min(losses, key=lambda rate: losses[rate])
    raise NonFiniteError(
        f"Training gave NaN or Inf at every learning rate from {min(losses):g} to {max(losses):g}.",
        hint="Look at the training rows, or try another precision: --set finetune.precision=fp32.",
    )


def _inputs(job: Job) -> dict[str, Any]:
    """What the loss at a rate depends on, besides the rate."""
    ignored = keys_of("finetune", "execution") | {"learning_rate"}
    return {
        "model": job.model_sha256,
        "validation": data_identity(job.validation) if job.validation else job.recipe.data.validation,
        "limit": job.recipe.data.validation_limit,
        "finetune": job.recipe.finetune.model_dump(exclude=ignored),
        "loading": job.loading,
        **job.learned,
        **job.spread,
    }


def _measured(job: Job, rate: float) -> dict[str, Any]:
    """Tunes the dense model at a rate and measures its loss on the held-out rows; the result of a stage."""
    held_out = _rows(job)[1]
    try:
        model, facts = together(job, tune_at, rate)
        loss = loss_on(job, model, held_out, f"tuned at {rate:g}")
        job.release(model)
    except NonFiniteError as error:
        log.info("%g: %s", rate, error.message)
        facts, loss = {"steps": _steps(job), "seconds": None}, None
    return {"rate": rate, "loss": loss, "rows": len(held_out), **facts}


def tune_at(job: Job, rate: float) -> tuple[Any, dict[str, Any]]:
    """Tunes the dense model briefly at a rate, in all processes of the job at once."""
    updated = job.recipe.model.trained_dtype(job.recipe.finetune.mode)
    changes = {"learning_rate": rate, "max_steps": _steps(job), "save_steps": None, "report_to": "none"}
    model, result = finetune(
        job.load(job.folder, dtype=updated, quantise=job.recipe.finetune.mode == "qlora"),
        _rows(job)[0],
        job.training.model_copy(update=changes),
        collator=job.collator,
        description=f"rate {rate:g}",
    )
    return finished(job, model, job.folder), {"steps": result.steps, "seconds": round(result.seconds, 1)}


def _steps(job: Job) -> int:
    return min(STEPS, planned_steps(len(job.samples), job.recipe.finetune))


def _rows(job: Job) -> tuple[EncodedDataset, EncodedDataset]:
    """Samples to tune on, as many as the steps need, and held-out samples."""
    recipe, tuning = job.recipe, job.training
    train, held_out = job.train, job.validation
    if held_out is None:
        train, held_out = with_validation(recipe, train, job.tokenizer, job.max_length)
    needed = _steps(job) * tuning.batch_size * tuning.accumulation * job.spread.get("processes", 1)
    chosen, _ = sample(train.examples, needed, recipe.seed)
    return job.encode(chosen), job.encode(held_out.examples)
