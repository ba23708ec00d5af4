"""Control: the dense model, tuned with as much compute as a pruned row takes in all."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from transformers import TrainerCallback

from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions


class LongerOptions(MethodOptions):
    """Options of the longer fine-tuning."""

    factor: float | None = Field(default=None, gt=0)
    """Factor by which the dense model's epochs grow; null: such that the work equals that of a pruned row."""


def training(context: MethodContext) -> dict[str, Any]:
    """Returns the epochs that make the dense model's fine-tuning as much work as a pruned row in all.

    See `MethodContext.pruned_work`; if that is below 1, the dense model is tuned for a shorter time.
    """
    options: LongerOptions = context.options or LongerOptions()
    factor = context.pruned_work if options.factor is None else options.factor
    return {"epochs": factor * context.finetune.epochs}


def callbacks(context: MethodContext) -> list[TrainerCallback]:
    """Returns no callbacks: only the number of steps differs."""
    return []


METHODS.register("longer")(
    Method(
        "control: the dense model, tuned with as much compute as a pruned row takes in all",
        callbacks=callbacks,
        training=training,
        options=LongerOptions,
        label="dense, same work",
    )
)
