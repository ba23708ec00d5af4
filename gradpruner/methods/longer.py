"""The dense model, tuned for the work a smaller one takes in all: what the same compute buys otherwise."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from transformers import TrainerCallback

from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions


class LongerOptions(MethodOptions):
    """What can be set about the dense model tuned for longer."""

    factor: float | None = Field(default=None, gt=0)
    """Times the epochs of the dense model; null: as many as make it the work of a pruned row in all."""


def training(context: MethodContext) -> dict[str, Any]:
    """Epochs that make the dense model's fine-tuning as much work as a pruned row is in all.

    That is the work of recording, repair, teacher and training, in units of the dense fine-tuning; see
    `runs.job.Job.pruned_work`. Below 1 where pruning saves more than it costs: the dense model is then tuned
    for a shorter time.
    """
    options: LongerOptions = context.options or LongerOptions()
    factor = context.pruned_work if options.factor is None else options.factor
    return {"epochs": factor * context.finetune.epochs}


def callbacks(context: MethodContext) -> list[TrainerCallback]:
    """None: only the number of steps differs."""
    return []


METHODS.register("longer")(
    Method(
        "the dense model, tuned for the work of a pruned row in all: the same compute without pruning",
        callbacks=callbacks,
        training=training,
        options=LongerOptions,
        label="dense, same work",
    )
)
