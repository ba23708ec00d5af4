"""Minitron, depth: layers of small block influence go, then the model is distilled from the dense one."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import shortgpt
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.training.distillation import distil
from gradpruner.training.options import FinetuneOptions

# Keys of the recipe's fine-tuning that hold here too; distillation has its own learning rate, mode ...
_SHARED = {"accumulation", "batching", "device", "gradient_checkpointing", "max_grad_norm", "precision"}


class MinitronOptions(MethodOptions):
    """How evidence is gathered and the pruned model distilled."""

    calibration_samples: int = Field(default=1024, ge=1)
    """Training samples on which activations are measured; the source takes 512 to 1024."""
    distil: bool = True
    """Whether the pruned model learns from the dense one's logits before it is fine-tuned."""
    distil_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of distillation; null: one pass over the training samples, in steps as large as
    fine-tuning's. A pass costs an epoch of fine-tuning and the dense model's forward passes: with 40 %
    removed, about one and a half epochs."""
    distil_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass; null: as many as fine-tuning."""
    distil_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; a cosine leads down to a tenth of it."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models."""
    distil_tokens: Literal["all", "answers"] = "all"
    """Where it learns: at all tokens, or those of the answers alone."""


def score(context: MethodContext) -> LayerScores:
    """`BI_l = mean over tokens of 1 - cos(x_l, x_{l+1})`, as `shortgpt`; only the recovery differs.

    Source: LLM Pruning and Distillation in Practice: The Minitron Approach (Sreenivas et al., 2024).
    """
    options: MinitronOptions = context.options or MinitronOptions()
    return shortgpt.score(context, options.calibration_samples, "minitron_depth")


def recover(context: MethodContext, model: nn.Module) -> dict[str, Any]:
    """Distils the pruned model, in place, from the dense one on the training samples.

    Returns:
        What `distil` reports; nothing if the options leave it out.

    Raises:
        DataError: If there are no samples.
        ModelError: If the model is quantised.
        NonFiniteError: If a loss or gradient becomes NaN or Inf.
    """
    options: MinitronOptions = context.options or MinitronOptions()
    if not options.distil:
        return {}
    tuning = FinetuneOptions(
        **context.finetune.model_dump(include=_SHARED),
        learning_rate=options.distil_learning_rate,
        batch_size=options.distil_batch_size or context.finetune.batch_size,
        epochs=1.0,
        max_steps=options.distil_steps,
        save_steps=context.finetune.save_steps,
        seed=context.seed,
    )
    return distil(
        model,
        context.model(),
        context.samples,
        tuning,
        collator=context.collator,
        temperature=options.temperature,
        tokens=options.distil_tokens,
        checkpoints=context.folder,
    )


METHODS.register("minitron_depth")(
    Method(
        "Minitron: layers that turn the hidden state least go; logit distillation",
        score,
        recover=recover,
        options=MinitronOptions,
        label="Minitron (depth)",
    )
)
