"""Finding the learning rate: the dense model tuned briefly at several rates, read on held-out training rows.

Every rate is a stage of the run directory, so a search that was interrupted goes on. Evaluation rows are not
looked at.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import Any

from gradpruner.common.errors import NonFiniteError
from gradpruner.data.encoding import EncodedDataset, encode_all
from gradpruner.data.examples import sample
from gradpruner.runs.directory import RunDirectory, Stage
from gradpruner.runs.evaluation_data import data_identity, with_validation
from gradpruner.runs.held_out import loss_on
from gradpruner.runs.job import Job
from gradpruner.runs.together import together
from gradpruner.runs.work import finished
from gradpruner.training.finetuning import finetune, planned_steps
from gradpruner.training.rates import best_rate

log = logging.getLogger(__name__)

STEPS = 100
"""Optimizer steps at every rate, at most; of a shorter fine-tuning, as many as it has."""


def find_rate(job: Job, directory: RunDirectory) -> None:
    """Searches from the job's learning rate on, doubling and halving, and gives the job the best one.

    Raises:
        DataError: If there are too few rows to hold any out.
        NonFiniteError: If training stayed finite at no rate.
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


def _inputs(job: Job) -> dict[str, Any]:
    """What the loss at a rate depends on, beside the rate."""
    same = {"report_to", "save_steps", "fsdp", "deepspeed", "learning_rate"}
    return {
        "model": job.model_sha256,
        "validation": data_identity(job.validation) if job.validation else job.recipe.data.validation,
        "limit": job.recipe.data.validation_limit,
        "finetune": job.recipe.finetune.model_dump(exclude=same),
        "loading": job.loading,
        **job.learned,
        **job.spread,
    }


def _measured(job: Job, rate: float) -> dict[str, Any]:
    """The dense model tuned at a rate, and its loss on rows it was not tuned on."""
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
    """The dense model tuned briefly at a rate; every process of a job does it."""
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
    """Samples to tune on, as many as the steps need, and held-out ones."""
    recipe, tuning = job.recipe, job.training
    train, held_out = job.train, job.validation
    if held_out is None:
        train, held_out = with_validation(recipe, train, job.tokenizer, job.max_length)
    needed = _steps(job) * tuning.batch_size * tuning.accumulation * job.spread.get("processes", 1)
    chosen, _ = sample(train.examples, needed, recipe.seed)
    return (
        encode_all(job.tokenizer, chosen, job.max_length),
        encode_all(job.tokenizer, held_out.examples, job.max_length),
    )
