"""The dense model, tuned with as much compute as a pruned row takes in all: what it buys without pruning."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from transformers import TrainerCallback

from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions


class LongerOptions(MethodOptions):
    """What can be set about the dense model tuned for longer."""

    factor: float | None = Field(default=None, gt=0)
    """Factor of the dense model's epochs; null: so that the work is that of a pruned row in all."""


def training(context: MethodContext) -> dict[str, Any]:
    """Epochs that make the dense model's fine-tuning as much work as all of a pruned row's.

    See `MethodContext.pruned_work`; where that is below 1, the dense model is tuned for a shorter time.
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
