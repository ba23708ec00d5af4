"""Learning from a teacher: the loss of a student, and the Trainer that computes it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy

from gradpruner.common.errors import ConfigError, ShapeError
from gradpruner.data.encoding import IGNORED
from gradpruner.models.layers import unwrap
from gradpruner.training.batching import packing_fault
from gradpruner.training.options import DistillationOptions
from gradpruner.training.trainer import CausalTrainer, answer_window

PROMPT = -101
"""Label of a prompt token at which the student learns from its teacher."""

# Entries of the logits processed at a time: 64 MiB in fp32 for each of the two distributions.
_CHUNK = 2**24


ANSWERS_ALONE = DistillationOptions(ce=0, answers=1, prompts=0)
"""Only the divergence at tokens with labels."""


def check_teacher(teacher: nn.Module, student: nn.Module) -> None:
    """Raises ShapeError if the vocabularies differ in size, ConfigError if the models share weights."""
    models: list[Any] = [unwrap(teacher), unwrap(student)]
    theirs, ours = (model.config.get_text_config().vocab_size for model in models)
    if theirs != ours:
        raise ShapeError(
            f"The student predicts {ours:,} tokens and its teacher {theirs:,}; a student must have the "
            "teacher's vocabulary.",
            hint="Use a teacher of the same family, with the same tokenizer.",
        )
    if {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
        raise ConfigError(
            "The teacher shares weights with the student, so training would change the teacher too.",
            hint="Load the teacher as a separate model.",
        )


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    counted: Tensor,
    temperature: float = 1.0,
    num_counted: Tensor | int | None = None,
) -> Tensor:
    """Returns KL(p || q): `T^2 / n * sum over positions of c * sum_v p_v (log p_v - log q_v)`.

    p is `softmax(teacher / T)` and q is `softmax(student / T)`; T^2 keeps the size of gradients the same for
    every temperature. The loss is computed in fp32 (fp64 for fp64 logits), a chunk of positions at a time,
    together with its gradient, which has a closed form. So memory beyond the logits is one tensor of the size
    of the student's.

    Args:
        student_logits: Shape (..., vocabulary).
        teacher_logits: The same shape; gets no gradient.
        counted: c, shape (...); bool: which positions count, or floating point >= 0: their weights.
        temperature: T, > 0.
        num_counted: n; None takes the number of positions with c > 0.

    Returns:
        A scalar >= 0 in nats; 0 if no position counts.

    Raises:
        ShapeError: If the shapes disagree.
        ConfigError: If the temperature is not above 0.

    Source: Distilling the Knowledge in a Neural Network (Hinton et al., 2015); Minitron (Muralidharan et
    al., 2024), logit-based loss.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[:-1] != counted.shape:
        raise ShapeError(
            f"Logits of the student are {tuple(student_logits.shape)}, of the teacher "
            f"{tuple(teacher_logits.shape)}, and {tuple(counted.shape)} positions are marked; a student must "
            "have the teacher's vocabulary and see the same tokens."
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature is {temperature}; it must be finite and above 0.")
    weights = counted.reshape(-1)
    positions = weights.nonzero()[:, 0]
    vocabulary = student_logits.shape[-1]
    total: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        student_logits.reshape(-1, vocabulary),
        teacher_logits.detach().reshape(-1, vocabulary),
        weights.to(torch.promote_types(student_logits.dtype, torch.float32)),
        positions,
        temperature,
    )
    return total / (max(1, len(positions)) if num_counted is None else num_counted)


class _Divergence(torch.autograd.Function):
    """Sum of c T^2 KL(p || q) over rows; its gradient with respect to the student's logits is c T (q - p)."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, positions: Tensor, temperature: float
    ) -> Tensor:
        gradient = torch.zeros_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=weights.dtype, device=student.device)
        for rows in positions.split(max(1, _CHUNK // student.shape[-1])):
            log_q = (student[rows].to(weights.dtype) / temperature).log_softmax(-1)
            log_p = (teacher[rows].to(weights.dtype) / temperature).log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum(-1) @ weights[rows]
            if gradient is not None:
                gradient[rows] = (log_q.exp_().sub_(p) * temperature).to(student.dtype)
        if gradient is not None:
            # Weights join the upstream gradient: in fp16, before loss scaling, they could underflow.
            ctx.save_for_backward(gradient, weights)
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        gradient, weights = ctx.saved_tensors
        return gradient * (upstream * weights).to(gradient.dtype)[:, None], None, None, None, None


class DistillationTrainer(CausalTrainer):
    """A `CausalTrainer` with the loss of `DistillationOptions`.

    Logits of student and teacher are computed only where they are needed, in every layout of the batch: to
    predict answer tokens, and prompt tokens if those have a weight. In the log, `loss` is the whole loss and
    `ce` the unweighted cross entropy, if it is part of the loss.

    Args:
        teacher: A model, which is put into evaluation mode and moved to the training device, or a function
            with the inputs and outputs of a model. Rows are packed only if the teacher allows it too.
        options: The weights of the loss.
        **kwargs: See `CausalTrainer`.
    """

    def __init__(self, *, teacher: Any, options: DistillationOptions = ANSWERS_ALONE, **kwargs: Any) -> None:
        self.teacher, self.options = teacher, options
        if isinstance(teacher, nn.Module):
            teacher.eval()
            if next(teacher.parameters()).device != kwargs["args"].device:  # quantised models cannot be moved
                teacher.to(kwargs["args"].device)
        if options.prompts:
            kwargs["samples"] = _with_prompts_marked(kwargs["samples"])
        super().__init__(compute_loss_func=self._loss, **kwargs)
        self._teacher_logits: Tensor | None = None
        self._prompt_tokens: Tensor | None = None
        self._ce, self._ce_from = torch.zeros(()), -1

    def _packing_fault(self, model: nn.Module) -> str:
        fault = super()._packing_fault(model)
        if not fault and isinstance(self.teacher, nn.Module):
            fault = packing_fault(self.teacher, self.train_dataset, self.accelerator.autocast)
            fault = fault and f"the teacher: {fault}"
        return fault

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the batches of an optimizer step and their answer tokens; also counts prompt tokens."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = torch.zeros(2, dtype=torch.int64)
        for batch in batches:
            counts += torch.stack([(kind != 0).sum() for kind in _kinds(batch["labels"])]).cpu()
        counts = counts.to(self.args.device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self._prompt_tokens = counts[1]
        return batches, counts[0]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Runs the teacher; then the Trainer calls `_loss`."""
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

    def _loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Returns the weighted loss; `num_items_in_batch` is the optimizer step's number of answer tokens."""
        loss = self._divergence(outputs, labels, num_items_in_batch)
        if not self.options.ce:
            return loss
        answers = _kinds(labels)[0]
        nll = cross_entropy(
            _logits(outputs)[:, :-1][answers].float(), labels[:, 1:][answers], reduction="sum"
        )
        ce: Tensor = nll / _count(answers, num_items_in_batch)
        if self._ce_from < 0:
            self._ce_from = self.state.global_step
        self._ce = self._ce.to(ce.device) + ce.detach()
        return loss + self.options.ce * ce

    def _divergence(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Returns the weighted sum of both divergences, in one pass over the logits."""
        assert self._teacher_logits is not None
        answers, prompts = _kinds(labels)
        prompt_tokens = None if num_items_in_batch is None else self._prompt_tokens
        weights = torch.zeros(labels.shape, device=labels.device)
        weights[:, :-1] = self.options.answers / _count(answers, num_items_in_batch) * answers
        if self.options.prompts:
            weights[:, :-1] += self.options.prompts / _count(prompts, prompt_tokens) * prompts
        return distillation_loss(
            _logits(outputs), self._teacher_logits, weights, self.options.temperature, num_counted=1
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean cross entropy since the last entry to the log."""
        if "loss" in logs and self._ce_from >= 0:
            total = float(self.accelerator.reduce(self._ce, "sum"))
            logs["ce"] = total / max(1, self.state.global_step - self._ce_from)
            self._ce, self._ce_from = torch.zeros(()), self.state.global_step
        super().log(logs, *args, **kwargs)


def _with_prompts_marked(samples: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns samples with the label `PROMPT` for every token without a label, except the first."""
    # Labels work in every layout: the collator knows what is padding and where a sample begins.
    return [
        sample
        | {"labels": [IGNORED, *(PROMPT if label == IGNORED else label for label in sample["labels"][1:])]}
        for sample in samples
    ]


def _kinds(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where answer and prompt tokens are predicted: two bool tensors of shape (rows, tokens - 1)."""
    targets = labels[:, 1:]
    return targets >= 0, targets == PROMPT


def _count(marked: Tensor, of_step: Any) -> Any:
    """Returns the number of tokens to average over, at least 1: those of the whole step if known."""
    count = marked.sum() if of_step is None else torch.as_tensor(of_step)
    return count.clamp_min(1)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    return logits
