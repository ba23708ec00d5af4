"""Distillation on its own: a pruned model learns to predict what the dense one predicts.

While fine-tuning, a teacher is given to `finetuning.finetune`; the loss of both is that of `teacher.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.errors import ConfigError, DataError
from gradpruner.training.finetuning import finetune, planned_steps
from gradpruner.training.teacher import DistillationOptions, DistillationTrainer, distillation_loss

__all__ = ["TOKENS", "DistillationOptions", "DistillationTrainer", "distil", "distillation_loss"]

TOKENS = ("all", "answers")
# The guide warms up for 100 steps; a run as short as ours would do little else.
_WARMUP_STEPS = 100
_WARMUP_SHARE = 10


def distil(
    student: nn.Module,
    teacher: nn.Module,
    samples: Sequence[dict[str, list[int]]],
    *,
    collator: Collator,
    learning_rate: float = 1e-4,
    final_learning_rate: float | None = None,
    warmup: int | None = None,
    batch_size: int = 8,
    accumulation: int = 1,
    epochs: float = 1.0,
    max_steps: int = -1,
    temperature: float = 1.0,
    tokens: str = "all",
    batching: str = "packed",
    seed: int = 0,
    checkpoints: str | Path | None = None,
    save_steps: int | None = None,
    description: str = "distil",
    **training: Any,
) -> dict[str, Any]:
    """Trains every weight of a student on its teacher's logits, in place.

    A student in 16 bits is trained in float32, for AdamW's updates are below its resolution, and gets its
    number format back. A training step costs that of a plain one and the teacher's forward pass.

    Args:
        student: The causal LM to train.
        teacher: A causal LM of the same vocabulary; not changed, but moved to the device that trains.
        samples: Encoded samples with `input_ids` and `labels`.
        collator: Makes batches.
        learning_rate: Peak learning rate; a cosine leads down from it.
        final_learning_rate: At the end; None is a tenth of the peak.
        warmup: Steps with rising learning rate; None is 100, but at most a tenth of all.
        batch_size: Samples per forward pass.
        accumulation: Forward passes per optimizer step.
        epochs: Passes over the samples.
        max_steps: Optimizer steps instead of epochs when > 0.
        temperature: See `distillation_loss`.
        tokens: Where the student learns: at "all" real tokens, or those of the "answers" alone.
        batching: As for `finetuning.finetune`; packed only if the teacher too can be.
        seed: Seeds data order and dropout.
        checkpoints: Folder for checkpoints; an interrupted run there is taken up again.
        save_steps: Checkpoint interval; None writes none.
        description: Name for the progress bar.
        **training: Further `training_arguments` options.

    Returns:
        `finetuning.FinetuneResult` as JSON values, losses in nats per counted token; temperature and tokens.

    Raises:
        ConfigError: If an option is unknown or out of range.
        DataError: If there are no samples, or nothing in them is learned.
        ModelError: If the student is quantised.
        NonFiniteError: If a loss or gradient becomes NaN or Inf.

    Source: Minitron (Muralidharan et al., 2024); its released guide for learning rates and warm-up.
    """
    if tokens not in TOKENS:
        raise ConfigError(f"tokens is '{tokens}'; one of {', '.join(TOKENS)} is needed.")
    options = DistillationOptions(ce=0, answers=1, prompts=0, temperature=temperature)
    learned = _learned(samples, tokens)
    steps = max_steps if max_steps > 0 else planned_steps(len(learned), batch_size, accumulation, epochs)
    final = learning_rate / 10 if final_learning_rate is None else final_learning_rate
    with _in_float32(student):
        _, result = finetune(
            student,
            learned,
            collator=collator,
            teacher=teacher,
            distillation=options,
            learning_rate=learning_rate,
            schedule="cosine_with_min_lr",
            schedule_options={"min_lr": final},
            warmup=min(_WARMUP_STEPS, steps // _WARMUP_SHARE) if warmup is None else warmup,
            batch_size=batch_size,
            accumulation=accumulation,
            epochs=epochs,
            max_steps=max_steps,
            batching=batching,
            seed=seed,
            checkpoints=checkpoints,
            save_steps=save_steps,
            description=description,
            **training,
        )
    student.eval()
    facts = {"losses": list(result.losses), "temperature": temperature, "learned_tokens": tokens}
    return result.to_dict() | facts


def _learned(samples: Sequence[dict[str, list[int]]], tokens: str) -> list[dict[str, list[int]]]:
    """The samples with a label wherever the student learns; the first token is predicted from nothing."""
    learned = [
        {
            "input_ids": sample["input_ids"],
            "labels": [IGNORED, *(sample["input_ids"] if tokens == "all" else sample["labels"])[1:]],
        }
        for sample in samples
    ]
    if not any(label != IGNORED for sample in learned for label in sample["labels"]):
        raise DataError(
            "There are no samples to distil on." if not learned else "No token of the samples is learned.",
            hint="Give training samples, or leave distillation out.",
        )
    return learned


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """While it lasts, 16-bit parameters are float32; buffers stay what they are."""
    # Parameter by parameter, because model.to() would round the angles of the positions too.
    halves = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    for parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in halves:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
