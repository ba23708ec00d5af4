"""Trainer callbacks: progress, a guard against NaN, and a base class for callbacks that undo changes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from gradpruner.common.errors import NonFiniteError
from gradpruner.common.progress import Progress


class ClosingCallback(TrainerCallback):
    """A callback that changes something while a model trains, and undoes it however training ends.

    The Trainer does not tell its callbacks when training fails; `CausalTrainer` then calls `close`.
    """

    def close(self) -> None:
        """Undoes what the callback changed; a second call does nothing."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calls `close`."""
        self.close()


class ProgressCallback(ClosingCallback):
    """Shows steps, loss and remaining time."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._loss: float | None = None
        self._progress: Progress | None = None
        self.rate: Callable[[], float] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self._progress = Progress(int(state.max_steps), self.description)
        self._progress.history = state.log_history  # the Trainer's own list, which grows
        self._progress.rate = self.rate
        self._progress.__enter__()
        self._progress.skip(int(state.global_step))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remembers the last loss."""
        if logs and "loss" in logs:
            self._loss = float(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self._progress is not None:
            fields = {"loss": round(self._loss, 4)} if self._loss is not None else {}
            self._progress.update(int(state.global_step), **fields)

    def close(self) -> None:
        """Closes the bar."""
        if self._progress is not None:
            self._progress.__exit__(*sys.exc_info())
            self._progress = None


class NonFiniteGuard(TrainerCallback):
    """Stops training at the first NaN or Inf; the Trainer itself would go on and save damaged weights.

    Gradients are checked before the optimizer uses them, so no checkpoint has damaged weights. This costs one
    pass over the gradients per optimizer step.
    """

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the gradients of this step."""
        # With fp16, gradients that overflow are Inf by design; the scaler skips such a step.
        if args.fp16:
            return
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)):
            self._stop(f"The gradient at step {state.global_step + 1}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Checks the loss whenever the Trainer reports it."""
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            self._stop(f"The loss at step {state.global_step}")

    def _stop(self, fault: str) -> None:
        raise NonFiniteError(
            f"{fault} is NaN or Inf; training stopped.",
            hint="Lower the learning rate, use bf16 or fp32 instead of fp16, or look at the data. "
            "Checkpoints written before are kept.",
        )
