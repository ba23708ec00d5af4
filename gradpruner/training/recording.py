"""Records LoRA gradients while a Trainer trains: a plain callback, and a function that runs it.

recorder = GradientRecorder(steps=40)
SFTTrainer(model, args=..., train_dataset=..., peft_config=..., callbacks=[recorder]).train()
scores = score_layers(recorder.trace)
"""

from __future__ import annotations

import logging
import math
import shutil
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import set_seed

from gradpruner.common.errors import ConfigError, DataError, NonFiniteError
from gradpruner.common.options import changed
from gradpruner.data.encoding import Collator, any_learned, check_encoded
from gradpruner.gradients.gates import GateHooks
from gradpruner.gradients.trace import GradientTrace, LinearRef, TraceInfo
from gradpruner.gradients.trace_writer import TraceWriter
from gradpruner.models.kernels import with_fast_products
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.models.restoring import modes_kept
from gradpruner.training.adapters import (
    adapter_kind,
    attach_lora,
    find_lora_linears,
    trained_in_place,
)
from gradpruner.training.callbacks import ClosingCallback
from gradpruner.training.finetuning import resolve_precision, training_arguments
from gradpruner.training.options import FinetuneOptions, RecordOptions
from gradpruner.training.step_gradients import full_gradient, learning_rate, loss_scale, unscale
from gradpruner.training.trainer import CausalTrainer

log = logging.getLogger(__name__)

MIN_STEPS = 2
DEFAULT_STEPS = 40
WARMUP_RATIO = 0.03
# The fp16 scaler starts at 2**16 and halves on every overflow; more overflows in a row than this mean NaN.
MAX_OVERFLOWS = 20


def default_steps(planned_steps: int) -> int:
    """Returns the number of optimizer steps to record: 1 % of the planned fine-tuning steps, at least 40."""
    return max(DEFAULT_STEPS, math.ceil(planned_steps * 0.01))


class GradientRecorder(ClosingCallback):
    """Records the LoRA gradients of the first optimizer steps of any Hugging Face Trainer.

    Works with LoRA, rsLoRA, DoRA and QLoRA through PEFT, with gradient accumulation, bf16, the fp16
    scaler, DDP and FSDP2. Gradients are read when the Trainer calls `on_pre_optimizer_step`: once per
    optimizer step, accumulated, reduced, un-scaled, and clipped if `max_grad_norm` is set (as in the
    released code; clipping by c scales that step's energy by c**4).

    The same backward passes also give the gates of every decoder layer and example (`gates.GateHooks`) in
    the same steps, not clipped. There are none, and a note says so, for models whose layers do not pass on a
    single hidden state of shape (rows, tokens, hidden size), for example Gemma 3n, and for several GPUs
    without a launcher. The hooks are removed from the model when recording ends or fails; if training fails
    elsewhere, call `close`.

    The trace is complete at the next optimizer step, or when training ends. A second `train()` of the same
    model is not recorded, and says so; with another model, recording begins anew and `trace` becomes that of
    the new model. A `folder` holds one trace only.

    Memory: layer energies take kilobytes. Factors are float32 on the host, 4 * rank * (in + out) bytes per
    linear and step; with a `folder` they go to disk, and at most those of two steps are in memory. Nothing
    stays on the training device.

    Args:
        steps: Optimizer steps to record, >= 2. The default of 40 suits short runs; 1 % of the planned
            steps is the paper's rule.
        folder: Where the trace is written, a new or empty folder; None keeps it in host memory.
        keep_factors: False keeps only layer energies: enough to score and drop layers, not to merge them.
        stop_training: True ends training after the last recorded step; False lets it go on.
        on_non_finite: "stop" ends training at the first NaN or Inf loss or gradient, keeps the steps recorded
            so far and raises NonFiniteError; "skip" leaves that step out and goes on. A step that the fp16
            scaler is about to skip is always left out.

    Raises:
        ConfigError: If `steps` < 2, `on_non_finite` is unknown, or the folder is not empty. When training
            begins: if a layer has no trainable LoRA, or the adapters changed the model's own weights (PiSSA).
    """

    def __init__(
        self,
        steps: int = DEFAULT_STEPS,
        folder: str | Path | None = None,
        *,
        keep_factors: bool = True,
        stop_training: bool = False,
        on_non_finite: str = "stop",
    ) -> None:
        if steps < MIN_STEPS:
            raise ConfigError(
                f"steps = {steps}; at least {MIN_STEPS} are needed, because LoRA B is zero at the first "
                "step, so that step contributes exactly nothing.",
                hint=f"The default is {DEFAULT_STEPS}.",
            )
        if on_non_finite not in ("stop", "skip"):
            raise ConfigError(f"on_non_finite is '{on_non_finite}'; it must be 'stop' or 'skip'.")
        self.steps = steps
        self.folder = _check_folder(Path(folder)) if folder is not None else None
        self.keep_factors = keep_factors
        self.stop_training = stop_training
        self.on_non_finite = on_non_finite
        self._trace: GradientTrace | None = None
        self._writer: TraceWriter | None = None
        self._recorded: weakref.ref[nn.Module] | None = None
        self._gates = GateHooks((), "recording has not begun")
        self._losses: list[float] = []
        self._learning_rates: list[float] = []
        self._notes: list[str] = []
        self._overflows = 0

    @property
    def trace(self) -> GradientTrace:
        """The finished trace; ConfigError if nothing has been recorded yet."""
        if self._trace is None:
            raise ConfigError("Nothing has been recorded yet.", hint="Call trainer.train() first.")
        return self._trace

    # -- Trainer events ----------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the LoRA linears of every decoder layer, and hooks the layers for their gates."""
        model = kwargs["model"]
        if self._trace is not None:
            if self._recorded is not None and self._recorded() is model:
                log.warning("Not recorded: this GradientRecorder holds a trace of the model. Use a new one.")
                return
            if self.folder is not None:
                _check_folder(self.folder)
        self._losses, self._learning_rates, self._notes, self._overflows = [], [], [], 0
        self._pairs, linears = find_lora_linears(model)
        adapter, alpha, quantised = adapter_kind(model)
        self._trace, self._recorded = None, weakref.ref(model)
        if state.global_step:
            self._notes.append(f"recording began after step {state.global_step}, not at the start")
        if changed := trained_in_place(model):
            what = f"{len(changed)} of the model's own parameters are trained too ({changed[0]})"
            self._notes.append(what)
            log.warning("%s. unload() does not undo that; prune the model as it was before.", what)
        view = LayeredModel(model)
        self._info = TraceInfo(
            num_layers=view.num_layers,
            linears=tuple(linears),
            # Packed 4-bit weights do not identify the model they were made from.
            model="" if quantised else fingerprint(model),
            adapter=adapter,
            alpha=alpha,
            clip=float(args.max_grad_norm) if args.max_grad_norm else None,
            seed=int(args.seed),
        )
        # Every process helps to gather sharded gradients; only one keeps the result.
        folder = self.folder if state.is_world_process_zero else None
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted recording, see `_check_folder`
        self._writer = TraceWriter(linears, folder, self.keep_factors and state.is_world_process_zero)
        self.close()  # a Trainer that searches for its batch size begins several times
        # DataParallel runs copies of the layers in threads, so rows would arrive in any order.
        parallel = getattr(args, "n_gpu", 1) > 1
        self._gates = GateHooks(view.layers, "several GPUs without a launcher" if parallel else "")
        weakref.finalize(self, self._gates.close)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records the gradients of this optimizer step."""
        if self._writer is None or self._trace is not None:
            return
        if self._writer.num_steps >= self.steps:  # the last step has been logged by now
            self._finish()
            return
        try:
            self._record(self._writer, state.global_step + 1, kwargs.get("optimizer"), control)
        except BaseException:
            self.close()
            raise

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keeps the loss that the Trainer reports."""
        loss = (logs or {}).get("loss")
        if loss is None or self._trace is not None:
            return
        if not math.isfinite(float(loss)):
            if self.on_non_finite == "stop":
                self._stop(f"The loss at step {state.global_step} is {loss}.")
            return
        self._losses.append(float(loss))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Completes the trace at the end of training, early or not."""
        self._finish()

    def close(self) -> None:
        """Removes the hooks from the model; keeps what was recorded."""
        self._gates.close()

    # ------------------------------------------------------------------------------------------------

    def _record(self, writer: TraceWriter, step: int, optimizer: Any, control: Any) -> None:
        gates_EL = self._gates.step(loss_scale(optimizer))
        if unscale(optimizer):
            self._handle_overflow(step)
            return
        self._overflows = 0
        grad_b, grad_a = [], []
        for linear, (weight_a, weight_b) in zip(self._info.linears, self._pairs, strict=True):
            grad_a.append(full_gradient(weight_a, linear))
            grad_b.append(full_gradient(weight_b, linear))
        bad = writer.add_step(grad_b, grad_a, gates_EL)
        if bad is not None:
            self._handle_non_finite(step, self._info.linears[bad])
            return
        self._learning_rates.append(learning_rate(optimizer))
        if writer.num_steps >= self.steps:
            self.close()
            if self.stop_training:
                control.should_training_stop = True

    def _handle_overflow(self, step: int) -> None:
        """Leaves out a step whose fp16 gradients overflowed; the optimizer skips it too."""
        self._notes.append(f"step {step} left out: fp16 overflow")
        self._overflows += 1
        if self._overflows > MAX_OVERFLOWS and self.on_non_finite == "stop":
            self._stop(f"Gradients overflowed at {self._overflows} steps in a row, the last being {step}.")

    def _handle_non_finite(self, step: int, linear: LinearRef) -> None:
        where = f"the gradient of layer {linear.layer} {linear.name} at step {step} is NaN or Inf"
        if self.on_non_finite == "skip":
            self._notes.append(f"step {step} left out: {where}")
            log.warning("Left out of the trace: %s.", where)
        else:
            self._stop(f"T{where[1:]}.")

    def _stop(self, message: str) -> None:
        kept = self._writer.num_steps if self._writer else 0
        self._notes.append(message)
        self._finish()
        raise NonFiniteError(
            f"{message} Recording stopped; {kept} good steps are kept.",
            hint="Lower the learning rate, use bf16 or fp32 instead of fp16, or look at the data.",
        )

    def _finish(self) -> None:
        self.close()
        if self._trace is not None or self._writer is None or self._writer.num_steps == 0:
            return
        if self._gates.fault:
            self._notes.append(f"no gates: {self._gates.fault}")
        if self._writer.num_steps < self.steps:
            self._notes.append(f"{self._writer.num_steps} of {self.steps} steps were recorded")
        info = replace(
            self._info,
            losses=tuple(self._losses),
            learning_rates=tuple(self._learning_rates),
            notes=tuple(self._notes),
        )
        self._trace = self._writer.finish(info)


def _check_folder(folder: Path) -> Path:
    """Returns the folder; raises ConfigError if it holds more than an interrupted recording leaves."""
    if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {"factors"}:
        raise ConfigError(
            f"The trace folder {folder} is not empty.",
            hint="Recordings are never overwritten: choose another folder, or delete this one.",
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"The trace folder {folder} is a file.", hint="Choose another folder.")
    return folder


@with_fast_products
def record_gradients(
    model: nn.Module,
    dataset: Sequence[dict[str, list[int]]],
    options: RecordOptions | None = None,
    *,
    folder: str | Path | None = None,
    collator: Any = None,
    callbacks: Sequence[Any] = (),
    **changes: Any,
) -> GradientTrace:
    """Runs the first steps of LoRA fine-tuning and records their gradients.

    Defaults are the released code's: r=8, alpha=32, dropout 0.05, learning rate 1e-4, batch 4, AdamW
    with weight decay 0.1, warm-up ratio 0.03, clipping to 1.0. The learning rate is constant after
    warm-up: these are the first steps of a longer run, not a short run that decays.

    Args:
        model: The causal LM; afterwards its weights are the same as before.
        dataset: Encoded samples with `input_ids` and `labels` (-100 where nothing is learned), as
            `encode_all` returns them; repeated if there are fewer than steps * batch_size.
        options: None takes the defaults, with 40 steps. The scale of the scores depends on alpha / rank.
        folder: Where the trace is written; None keeps it in host memory.
        collator: Makes padded batches; None pads with token 0, which is neither attended to nor learned.
        callbacks: More Trainer callbacks (progress).
        **changes: Single options, for example steps=60.

    Returns:
        The trace.

    Raises:
        ConfigError: If an option is unknown or not allowed.
        DataError: If the dataset is empty or not encoded, or no token in it is learned.
        NonFiniteError: If a loss or gradient is NaN or Inf; earlier steps are kept in `folder`.
        PlanError: If the model carries adapters; it is unchanged then.

    Source: GradPruner, section 3.1, Algorithm 1 steps 1-2.
    """
    options = changed(RecordOptions, options, changes)
    if len(dataset) == 0:
        raise DataError("The dataset is empty; there is nothing to record gradients from.")
    check_encoded(dataset)
    if not any_learned(dataset):
        raise DataError(
            f"None of the {len(dataset)} samples has a learned token, so there are no gradients to record.",
            hint="At least one label after the first must differ from -100.",
        )
    steps = options.steps or DEFAULT_STEPS
    recorder = GradientRecorder(steps, folder, stop_training=True)
    # Steps that the fp16 scaler may skip are added.
    fp16 = resolve_precision(options.precision, options.device) == "fp16"
    tuning = FinetuneOptions(
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        accumulation=1,
        max_steps=steps + (MAX_OVERFLOWS if fp16 else 0),
        warmup=math.ceil(steps * WARMUP_RATIO),
        max_grad_norm=options.clip or 0.0,
        schedule="constant_with_warmup",
        **options.model_dump(include={"precision", "gradient_checkpointing", "fsdp", "seed", "device"}),
    )
    set_seed(options.seed)
    with _adapters(model, options) as peft_model:
        trainer = CausalTrainer(
            model=peft_model,
            args=training_arguments(tuning),
            samples=dataset,
            collator=collator or Collator(),
            callbacks=[recorder, *callbacks],
        )
        try:
            trainer.train()
        finally:
            recorder.close()
    return recorder.trace


@contextmanager
def _adapters(model: nn.Module, options: RecordOptions) -> Iterator[Any]:
    """Puts LoRA on the model within the block; restores the model afterwards, even after an error."""
    # PEFT, its preparation for quantised training, and the Trainer change these.
    config: Any = model.config
    use_cache = bool(getattr(config, "use_cache", True))
    before = {name: (p.requires_grad, p.dtype) for name, p in model.named_parameters()}
    peft_model = attach_lora(model, **options.model_dump(include={"rank", "alpha", "dropout", "adapter"}))
    try:
        with modes_kept(model):
            yield peft_model
    finally:
        peft_model.unload()
        # Named gradient_checkpointing_disable before transformers 5.23.
        uncheckpoint: Any = getattr(model, "activation_checkpointing_disable", None) or getattr(
            model, "gradient_checkpointing_disable", None
        )
        if options.gradient_checkpointing and uncheckpoint is not None:
            uncheckpoint()
        if hasattr(model, "peft_config"):  # older PEFT leaves it behind
            del model.peft_config
        for name, parameter in model.named_parameters():
            requires_grad, dtype = before[name]
            parameter.requires_grad_(requires_grad)
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        config.use_cache = use_cache
