"""Minitron, depth: prunes the layers with the smallest block influence, then distils from the dense model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import nn

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import shortgpt
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.training.distillation import distil
from gradpruner.training.options import FinetuneOptions

# Keys of the recipe's fine-tuning that apply to the distillation too; it has its own learning rate, mode ...
_SHARED = {"accumulation", "batching", "device", "gradient_checkpointing", "max_grad_norm", "precision"}


class MinitronOptions(MethodOptions):
    """How activations are measured and the pruned model is distilled."""

    calibration_samples: int = Field(default=1024, ge=1)
    """Training samples activations are measured on; the paper takes 512 to 1024."""
    distil: bool = True
    """Whether the pruned model learns from the dense model's logits before it is fine-tuned."""
    distil_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of distillation; null: one pass over the training samples, with as many samples to a
    step as in fine-tuning. A pass costs an epoch of fine-tuning plus the dense model's forward passes: with
    40 % removed, about one and a half epochs."""
    distil_batch_size: int | None = Field(default=None, ge=1)
    """Samples per forward pass; null: as in fine-tuning."""
    distil_learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; cosine decay to a tenth of it."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models."""
    distil_tokens: Literal["all", "answers"] = "all"
    """Which tokens are distilled: all tokens, or the tokens of answers only."""


def score(context: MethodContext) -> LayerScores:
    """Returns `BI_l = mean over tokens of 1 - cos(x_l, x_{l+1})`, as `shortgpt`; only the recovery differs.

    Source: LLM Pruning and Distillation in Practice: The Minitron Approach (Sreenivas et al., 2024).
    """
    options: MinitronOptions = context.options or MinitronOptions()
    return shortgpt.score(context, options.calibration_samples, "minitron_depth")


def recover(context: MethodContext, model: nn.Module) -> dict[str, Any]:
    """Distils the pruned model, in place, from the dense one on the training samples.

    Returns:
        The report of `distil`; {} if the options switch it off.

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
        "Minitron: prunes the layers that turn the hidden state least; logit distillation",
        score,
        recover=recover,
        options=MinitronOptions,
        label="Minitron (depth)",
    )
)
