"""Distillation alone: a pruned model learns to predict what the dense model predicts.

To learn from a teacher while fine-tuning, pass one to `finetuning.finetune`. The losses are in `teacher`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradpruner.common.errors import DataError
from gradpruner.common.options import changed, validated
from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.training.finetuning import finetune, planned_steps
from gradpruner.training.options import DistillationOptions, FinetuneOptions
from gradpruner.training.rates import with_rate

DEFAULTS = FinetuneOptions(learning_rate=1e-4, accumulation=1, epochs=1.0)
# The guide warms up for 100 steps, which could be most of a run as short as ours.
_WARMUP_STEPS = 100
_WARMUP_SHARE = 10


def distil(
    student: nn.Module,
    teacher: nn.Module,
    samples: Sequence[dict[str, list[int]]],
    options: FinetuneOptions = DEFAULTS,
    *,
    collator: Collator,
    temperature: float = 1.0,
    tokens: Literal["all", "answers"] = "all",
    checkpoints: str | Path | None = None,
    description: str = "distil",
    **changes: Any,
) -> dict[str, Any]:
    """Trains every weight of a student on its teacher's logits, in place.

    A student in 16 bits is trained in float32, because AdamW's updates are smaller than the resolution of 16
    bits, and is converted back afterwards. A training step costs an ordinary step plus the teacher's forward
    pass.

    Args:
        student: The causal LM to train.
        teacher: A causal LM with the same vocabulary; moved to the training device, otherwise not changed.
        samples: Encoded samples with `input_ids` and `labels`.
        options: See `finetune`. The learning rate falls as a cosine, to a tenth if `final_learning_rate` is
            None; if `warmup` is None, it is 100 steps, but at most a tenth of all steps.
        collator: Makes padded batches.
        temperature: See `distillation_loss`.
        tokens: Where the student learns: at "all" real tokens, or at the tokens of "answers" only.
        checkpoints: As for `finetune`.
        description: Name for the progress bar.
        **changes: Single options, for example learning_rate=1e-3.

    Returns:
        `finetuning.FinetuneResult` as JSON values, with losses in nats per counted token; also the
        temperature and `tokens`.

    Raises:
        DataError: If there are no samples, or none of their tokens is learned.
        GradPrunerError: See `finetune`.

    Source: Minitron (Muralidharan et al., 2024); its released guide for learning rates and warm-up.
    """
    options = with_rate(changed(FinetuneOptions, options, changes), student)
    assert options.learning_rate is not None
    weights = {"ce": 0, "answers": 1, "prompts": 0, "temperature": temperature}
    distillation = validated(DistillationOptions, weights, "distil: ")
    learned = _learned(samples, tokens)
    steps = planned_steps(len(learned), options)
    final, warmup = options.final_learning_rate, options.warmup
    options = options.model_copy(
        update={
            "final_learning_rate": options.learning_rate / 10 if final is None else final,
            "warmup": min(_WARMUP_STEPS, steps // _WARMUP_SHARE) if warmup is None else warmup,
        }
    )
    with _in_float32(student):
        _, result = finetune(
            student,
            learned,
            options,
            collator=collator,
            teacher=teacher,
            distillation=distillation,
            checkpoints=checkpoints,
            description=description,
        )
    student.eval()
    facts = {"losses": list(result.losses), "temperature": temperature, "learned_tokens": tokens}
    return asdict(result) | facts


def _learned(samples: Sequence[dict[str, list[int]]], tokens: str) -> list[dict[str, list[int]]]:
    """Returns samples with labels where the student learns; not at the first token, which has no context."""
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
    """Within the block, 16-bit parameters are float32; buffers keep their dtype."""
    # Not by model.to(), which would also round the buffers that hold the angles of positions.
    halves = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    for parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in halves:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
