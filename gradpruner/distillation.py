"""Logit distillation: a pruned model learns to predict what the dense one predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import set_seed

from gradpruner.batching import BATCHINGS, packing_fault
from gradpruner.callbacks import NonFiniteGuard, ProgressCallback
from gradpruner.encoding import IGNORED, Collator
from gradpruner.errors import ConfigError, DataError, ModelError, ShapeError
from gradpruner.resume import latest_complete_checkpoint
from gradpruner.trainer import CausalTrainer, answer_window
from gradpruner.training import LOGGED_POINTS, planned_steps, run_trainer, training_arguments

TOKENS = ("all", "answers")
# Entries of the logits of which both distributions exist at a time, in fp32: 64 MB each.
_CHUNK = 2**24
# The guide warms up for 100 steps; a run as short as ours would do little else.
_WARMUP_STEPS = 100
_WARMUP_SHARE = 10


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    counted: Tensor,
    temperature: float = 1.0,
    num_counted: Tensor | int | None = None,
) -> Tensor:
    """`T^2 / n * sum over counted positions of sum_v p_v (log p_v - log q_v)`: KL(p || q).

    p is `softmax(teacher / T)`, q `softmax(student / T)`; T^2 keeps the size of gradients the same for every
    temperature. Computed in fp32 (in fp64 for fp64 logits), a chunk of positions at a time; the gradient,
    whose form is known, is formed on the way. So memory beyond the logits is one tensor like the student's.

    Args:
        student_logits: Shape (..., vocabulary).
        teacher_logits: The same shape; no gradient goes there.
        counted: Shape (...), bool: which positions count.
        temperature: T > 0.
        num_counted: n; None takes the number of counted positions.

    Returns:
        A number >= 0 in nats; 0 if nothing counts.

    Raises:
        ShapeError: If the shapes disagree.
        ConfigError: If the temperature is not above 0.

    Source: Distilling the Knowledge in a Neural Network (Hinton et al., 2015); Minitron (Muralidharan et
    al., 2024), logit-based loss.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != counted.shape:
        raise ShapeError(
            f"Logits of the student are {tuple(student_logits.shape)}, of the teacher "
            f"{tuple(teacher_logits.shape)}, and {tuple(counted.shape)} positions are marked; a student has "
            "the teacher's vocabulary and sees the same tokens."
        )
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; above 0 is needed.")
    positions = counted.reshape(-1).nonzero()[:, 0]
    vocabulary = student_logits.shape[-1]
    total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_logits.reshape(-1, vocabulary),
        teacher_logits.detach().reshape(-1, vocabulary),
        positions,
        temperature,
    )
    return total / (max(1, len(positions)) if num_counted is None else num_counted)


class _Divergence(torch.autograd.Function):
    """Sum of T^2 KL(p || q) over rows; its gradient by a logit of the student is T (q - p)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, positions: Tensor, temperature: float) -> Tensor:
        precise = torch.promote_types(student.dtype, torch.float32)
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=precise, device=student.device)
        for rows in positions.split(max(1, _CHUNK // student.shape[-1])):
            log_q = (student[rows].to(precise) / temperature).log_softmax(-1)
            log_p = (teacher[rows].to(precise) / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            if gradient is not None:
                gradient[rows] = (log_q.exp_().sub_(p) * temperature).to(student.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None


class DistillationTrainer(CausalTrainer):
    """A `CausalTrainer` whose loss is the divergence from a teacher at the positions with labels.

    Logits of student and teacher are computed only where a label is predicted, whatever the batch's layout.

    Args:
        teacher: Gives the logits to learn; in evaluation mode, on the device that trains.
        temperature: See `distillation_loss`.
        **kwargs: As for `CausalTrainer`.
    """

    def __init__(self, *, teacher: Any, temperature: float = 1.0, **kwargs: Any) -> None:
        super().__init__(compute_loss_func=self._divergence, **kwargs)
        self.teacher, self.temperature = teacher, temperature
        self._teacher_logits: Tensor | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Asks the teacher first; the rest is the Trainer's way with a loss of one's own."""
        inputs = {**inputs, "use_cache": False}
        seen = {name: value for name, value in inputs.items() if name not in ("labels", "padding")}
        if self._windowed:
            window = answer_window(inputs["labels"])
            seen |= {name: value for name, value in window.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            self._teacher_logits = self.teacher(**seen).logits
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self._teacher_logits = None

    def _divergence(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert self._teacher_logits is not None
        counted = torch.zeros_like(labels, dtype=torch.bool)
        counted[:, :-1] = labels[:, 1:] != IGNORED
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        return distillation_loss(logits, self._teacher_logits, counted, self.temperature, num_items_in_batch)


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
        batching: As for `training.finetune`; packed only if the teacher too can be.
        seed: Seeds data order and dropout.
        checkpoints: Folder for checkpoints; an interrupted run there is taken up again.
        save_steps: Checkpoint interval; None writes none.
        description: Name for the progress bar.
        **training: Further `training_arguments` options.

    Returns:
        `training.FinetuneResult` as JSON values, losses in nats per counted token; temperature and tokens.

    Raises:
        ConfigError: If an option is unknown or out of range.
        DataError: If there are no samples, or nothing in them is learned.
        ModelError: If the student is quantised.
        NonFiniteError: If a loss or gradient becomes NaN or Inf.

    Source: Minitron (Muralidharan et al., 2024); its released guide for learning rates and warm-up.
    """
    for name, value, allowed in (("tokens", tokens, TOKENS), ("batching", batching, BATCHINGS)):
        if value not in allowed:
            raise ConfigError(f"{name} is '{value}'; one of {', '.join(allowed)} is needed.")
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}; above 0 is needed.")
    _check_trainable(student)
    learned = _learned(samples, tokens)
    if batching == "packed" and packing_fault(teacher, learned):
        batching = "grouped"
    set_seed(seed)
    steps = max_steps if max_steps > 0 else planned_steps(len(learned), batch_size, accumulation, epochs)
    final = learning_rate / 10 if final_learning_rate is None else final_learning_rate
    arguments = training_arguments(
        learning_rate=learning_rate,
        schedule="cosine_with_min_lr",
        schedule_options={"min_lr": final},
        warmup=min(_WARMUP_STEPS, steps // _WARMUP_SHARE) if warmup is None else warmup,
        batch_size=batch_size,
        accumulation=accumulation,
        epochs=epochs,
        max_steps=max_steps,
        seed=seed,
        output=checkpoints,
        save_steps=save_steps if checkpoints else None,
        logging_steps=max(1, steps // LOGGED_POINTS),
        **training,
    )
    teacher.eval()
    if next(teacher.parameters()).device != arguments.device:  # quantised models refuse to be moved
        teacher.to(arguments.device)
    with _in_float32(student):
        trainer = DistillationTrainer(
            teacher=teacher,
            temperature=temperature,
            model=student,
            args=arguments,
            samples=learned,
            collator=collator,
            batching=batching,
            callbacks=[NonFiniteGuard(), ProgressCallback(description)],
        )
        result = run_trainer(
            trainer, "full", latest_complete_checkpoint(Path(checkpoints)) if checkpoints else None
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


def _check_trainable(model: nn.Module) -> None:
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(
            "The student's weights are quantised and cannot be trained.",
            hint="Load it in float32 or bfloat16.",
        )


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """While it lasts, 16-bit parameters are float32; buffers stay what they are."""
    # Parameter by parameter, because model.to() would round the angles of the positions too.
    model.requires_grad_(True)
    halves = [(p, p.dtype) for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    for parameter, _ in halves:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in halves:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
