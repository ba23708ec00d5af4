"""Trainer callbacks: progress, a guard against NaN, and a base class for callbacks that undo changes."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from gradpruner.common.errors import NonFiniteError
from gradpruner.common.progress import Progress

log = logging.getLogger(__name__)


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


class SavingInterrupt(ClosingCallback):
    """Writes a checkpoint when Ctrl-C or SIGTERM ends a training; a second signal ends it at once.

    The step in progress is finished first. Only one process, in its main thread, does this: several would
    have to agree on the step.
    """

    def __init__(self) -> None:
        self._asked: int | None = None
        self._before: dict[int, Callable[[int, Any], Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the two signals over, if anybody handles them."""
        if args.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):
                self._before[number] = handler
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if self._asked is not None:
            self._before[number](number, frame)
        self._asked = number
        log.warning("Stopping after this step, to write a checkpoint. Interrupt again to stop at once.")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the Trainer for a checkpoint, if it fits on the disk."""
        if self._asked is None:
            return
        held = sum(p.nbytes * (4 if p.requires_grad else 1) for p in kwargs["model"].parameters())
        if shutil.disk_usage(args.output_dir).free < held:
            self._before[self._asked](self._asked, None)
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hands the signal on, once the checkpoint is whole."""
        if self._asked is not None:
            self._before[self._asked](self._asked, None)

    def close(self) -> None:
        """Gives the signals back; one that came after the last step is handed on."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        before, self._before = self._before, {}
        asked, self._asked = self._asked, None
        if asked is not None and asked in before and sys.exc_info()[0] is None:
            before[asked](asked, None)


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
