"""Fine-tuning through `transformers.Trainer`: full or LoRA, loss on answer tokens only."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, set_seed

from gradpruner.common.errors import ConfigError, DataError, ModelError
from gradpruner.common.memory import PeakMemory
from gradpruner.common.options import changed
from gradpruner.common.world import this_world
from gradpruner.data.encoding import Collator, check_encoded
from gradpruner.models.kernels import with_fast_products
from gradpruner.training.adapters import attach_lora, is_4bit
from gradpruner.training.callbacks import NonFiniteGuard, ProgressCallback, SavingInterrupt
from gradpruner.training.checks import check_liger, check_optimizer, check_trackers
from gradpruner.training.options import DistillationOptions, FinetuneOptions, FinetuneSection
from gradpruner.training.rates import PAPER_RATE, with_rate
from gradpruner.training.resume import latest_complete_checkpoint, tally_of
from gradpruner.training.sharding import check_sharding, make_whole_, num_trainable
from gradpruner.training.teacher import DistillationTrainer, check_teacher
from gradpruner.training.trainer import CausalTrainer

log = logging.getLogger(__name__)

# About this many points make a readable loss curve.
LOGGED_POINTS = 200
WANTED_STEPS = 100
"""Optimizer steps that were enough to learn the tasks of docs/quality.md."""
_RECOMPUTE = "activation_checkpointing"


def training_arguments(
    options: FinetuneOptions, output: str | Path | None = None, logging_steps: int = 1
) -> TrainingArguments:
    """Returns the Trainer's arguments, without its surprising defaults; `output` is for checkpoints."""
    chosen = resolve_precision(options.precision, options.device)
    final = options.final_learning_rate
    return TrainingArguments(
        output_dir=str(output) if output else str(Path(tempfile.gettempdir()) / "gradpruner-unused"),
        learning_rate=options.learning_rate or PAPER_RATE,  # `with_rate`, which knows the model, has set it
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        weight_decay=options.weight_decay,
        # transformers 5 reads a value below 1 as a ratio
        warmup_steps=options.warmup_ratio if options.warmup is None else options.warmup,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=options.schedule if final is None else "cosine_with_min_lr",
        lr_scheduler_kwargs=None if final is None else {"min_lr": final},
        optim=options.optim,
        **_sharding(options),
        bf16=chosen == "bf16",
        fp16=chosen == "fp16",
        **_checkpointing(options),
        torch_compile=options.compile,
        use_liger_kernel=options.liger,
        logging_steps=logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if output and options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=2,
        report_to=options.report_to,
        seed=options.seed,
        data_seed=options.seed,
        use_cpu=options.device == "cpu" or not torch.accelerator.is_available(),
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )


def _checkpointing(options: FinetuneOptions) -> dict[str, Any]:
    """Returns the arguments that make the Trainer recompute activations, and offload those it keeps."""
    kind = options.gradient_checkpointing
    check_checkpointing(kind, options.device)
    recompute = _RECOMPUTE if _new_recompute() else "gradient_checkpointing"
    offload = {f"{_RECOMPUTE}_kwargs": {"offload": True}} if kind == "offload" else {}
    return {recompute: True, **offload} if kind else {}


def _new_recompute() -> bool:
    """Returns whether this is transformers 5.23 or newer, which renamed the option."""
    return _RECOMPUTE in {field.name for field in fields(TrainingArguments)}


def check_checkpointing(kind: bool | str, device: str = "auto") -> None:
    """Raises ConfigError if activations are to be offloaded to the host and cannot be."""
    if kind != "offload":
        return
    if device == "cpu" or not torch.accelerator.is_available():
        raise ConfigError(
            "gradient_checkpointing: offload moves activations from a GPU to the host, but this training is "
            "on the CPU.",
            hint="Use true.",
        )
    if not _new_recompute():
        raise ConfigError(
            "gradient_checkpointing: offload needs transformers 5.23 or newer.",
            hint="pip install -U transformers, or use true.",
        )


def _sharding(options: FinetuneOptions) -> dict[str, Any]:
    """Returns the arguments for sharding the model over processes; none for plain data parallelism."""
    if options.deepspeed:
        return {"deepspeed": options.deepspeed}
    if not options.fsdp:
        return {}
    given = options.fsdp if isinstance(options.fsdp, dict) else {}
    return {"fsdp": True, "fsdp_config": {"version": 2} | given}


def resolve_precision(precision: str, device: str = "auto") -> str:
    """Replaces "auto" by bf16 on GPUs that have it, else by fp32: most CPUs emulate bf16, which is slow."""
    if precision != "auto":
        return precision
    on_gpu = device != "cpu" and torch.cuda.is_available()
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning.

    Attributes:
        mode: "full", "lora" or "qlora".
        steps: Optimizer steps.
        losses: Dicts of step, loss (mean over the logging interval) and learning_rate; with a teacher also
            ce, the unweighted cross entropy, if it is part of the loss.
        seconds: Wall time of training without loading and saving, interrupted starts included.
        peak_memory_bytes: Peak during training: device memory on CUDA, resident memory on CPU.
        trainable_parameters: Number of parameters with a gradient.
        tokens: Input tokens seen, without padding.
        batching: "packed", "grouped" or "padded", and why if packing was asked for but not possible.
        padding_fraction: Measured share of the computed token positions that were padding, in [0, 1].
        resumed_from: Step of the checkpoint that training resumed from; 0 for a fresh start.
        measured_from: `seconds` and `padding_fraction` leave out the steps up to this one; above 0 if an
            interrupted start left no figures.
    """

    mode: str
    steps: int
    losses: tuple[dict[str, float], ...]
    seconds: float
    peak_memory_bytes: int
    trainable_parameters: int
    tokens: int
    batching: str = "padded"
    padding_fraction: float = 0.0
    resumed_from: int = 0
    measured_from: int = 0


def planned_steps(num_samples: int, options: FinetuneSection) -> int:
    """Returns the number of optimizer steps of a fine-tuning, given the number of processes."""
    if isinstance(options, FinetuneOptions) and options.max_steps is not None:
        return options.max_steps
    batches = math.ceil(num_samples / (options.batch_size * this_world().size))
    per_epoch = math.ceil(batches / chosen_accumulation(num_samples, options))
    return max(1, math.ceil(per_epoch * options.epochs))


def chosen_accumulation(num_samples: int, options: FinetuneSection) -> int:
    """Returns the forward passes per optimizer step: as given, else 8, or fewer if 8 makes too few steps."""
    if options.accumulation is not None:
        return options.accumulation

    def steps(count: int) -> int:
        return planned_steps(num_samples, options.model_copy(update={"accumulation": count}))

    return next((count for count in (8, 4, 2) if steps(count) >= WANTED_STEPS), 1)


@with_fast_products
def finetune(
    model: nn.Module,
    dataset: Any,
    options: FinetuneOptions | None = None,
    *,
    collator: Collator | None = None,
    teacher: nn.Module | None = None,
    distillation: DistillationOptions | None = None,
    checkpoints: str | Path | None = None,
    description: str = "finetune",
    callbacks: Sequence[Any] = (),
    **changes: Any,
) -> tuple[Any, FinetuneResult]:
    """Fine-tunes a causal LM on encoded samples.

    Args:
        model: The causal LM, pruned or not; trained in place.
        dataset: Encoded samples with `input_ids` and `labels`, as `encode_all` returns them.
        options: None takes the paper's settings: AdamW, batch 64 (here 8 x 8 accumulated), 3 epochs, weight
            decay 0.1, warm-up 0.03, and at 8 B a learning rate of 1e-5 (`rates.default_rate`).
        collator: Makes padded batches; None pads with token 0, which is neither attended to nor learned.
        teacher: A causal LM with the same vocabulary to learn from, in addition to the labels. It is put into
            evaluation mode and moved to the training device; its weights do not change. Every step costs one
            forward pass of the teacher more.
        distillation: The weights of labels and teacher; None takes `DistillationOptions()`.
        checkpoints: Folder for checkpoints, written every `options.save_steps` steps and at Ctrl-C. If it
            holds an interrupted run, that run is resumed. None writes no checkpoints.
        description: Name for the progress bar.
        callbacks: More Trainer callbacks; a `ClosingCallback` is closed even if training fails.
        **changes: Single options, for example learning_rate=1e-3.

    Returns:
        The trained model and the result. The model is a PeftModel if mode is "lora" and `merge_adapter` is
        False, and always if mode is "qlora": merged into 4-bit weights, the adapters would be rounded away;
        they belong on the unquantised weights (`adapters.Adapters`). A sharded model is whole on the first
        process and without weights on the others.

    Raises:
        ConfigError: If an option is unknown or not allowed, a tracker or Liger is not installed, fp16
            autocast is to train weights stored in float16, the teacher shares weights with the model, or
            distillation is given without a teacher.
        DataError: If the dataset is empty or not encoded.
        ModelError: If mode is "full" and the weights are quantised; if mode is "lora" and the model is in
            4 bits, or mode is "qlora" and it is not.
        NonFiniteError: If a loss or gradient becomes NaN or Inf.
        PlanError: If mode is "lora" or "qlora" and the model carries adapters already.
        ShapeError: If the teacher has another vocabulary.

    Source: GradPruner, C.2; for the teacher see `DistillationOptions`.
    """
    options = with_rate(changed(FinetuneOptions, options, changes), model)
    if options.liger:
        check_liger(options.device)
    check_sharding(options.fsdp, options.deepspeed, options.device)
    if len(dataset) == 0:
        raise DataError("The dataset is empty; there is nothing to fine-tune on.")
    check_encoded(dataset)
    trainer_class = _trainer_class(model, teacher, distillation)
    set_seed(options.seed)
    trained: Any = model
    _check_trainable(model, options.mode)
    if options.mode == "full":
        model.requires_grad_(True)
    else:
        trained = attach_lora(
            model, rank=options.rank, alpha=options.alpha, dropout=options.dropout, adapter=options.mode
        )
    check_trackers(options.report_to)
    check_optimizer(options.optim)
    arguments = training_arguments(
        options, checkpoints, max(1, planned_steps(len(dataset), options) // LOGGED_POINTS)
    )
    if arguments.fp16 and any(p.requires_grad and p.dtype == torch.float16 for p in trained.parameters()):
        raise ConfigError(
            "fp16 autocast needs float32 weights to update; these are float16.",
            hint="Set model.dtype to float32, or finetune.precision to bf16 or fp32.",
        )
    keeping = [SavingInterrupt()] if checkpoints and options.save_steps else []
    trainer = trainer_class(
        model=trained,
        args=arguments,
        samples=dataset,
        collator=collator or Collator(),
        batching=options.batching,
        callbacks=[NonFiniteGuard(), ProgressCallback(description), *keeping, *callbacks],
    )
    # One process looks, because looking removes broken checkpoints.
    found = this_world().agreed(
        lambda: latest_complete_checkpoint(Path(checkpoints), trainer.sharding) if checkpoints else None
    )
    result = _train(trainer, options.mode, found)
    make_whole_(trained, trainer.deepspeed)
    if options.mode == "lora" and options.merge_adapter:
        trained = trained.merge_and_unload()
    return trained, result


def _trainer_class(
    model: nn.Module, teacher: nn.Module | None, distillation: DistillationOptions | None
) -> Callable[..., CausalTrainer]:
    if teacher is not None:
        check_teacher(teacher, model)
        return partial(DistillationTrainer, teacher=teacher, options=distillation or DistillationOptions())
    if distillation is not None:
        raise ConfigError(
            "distillation is given, but no teacher.", hint="Give a teacher, or leave distillation out."
        )
    return CausalTrainer


def _check_trainable(model: nn.Module, mode: str) -> None:
    if mode == "full" and not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise ModelError(
            "The model's weights are quantised and cannot be trained.",
            hint="Load it in float32 or bfloat16, or train adapters on 4-bit weights: mode qlora.",
        )
    if mode == "qlora" and not is_4bit(model):
        raise ModelError(
            "mode is qlora, but the model is not in 4 bits.",
            hint="Load it with gradpruner.load_model(folder, quantise=True), or use mode lora.",
        )
    if mode == "lora" and is_4bit(model):
        raise ModelError(
            "mode is lora, but the model is in 4 bits: adapters added to such weights are rounded away.",
            hint="Use mode qlora, or load the model in float32 or bfloat16.",
        )


def _train(trainer: CausalTrainer, mode: str, checkpoint: Path | None) -> FinetuneResult:
    """Trains, from a checkpoint if there is one, and returns the result."""
    if checkpoint is not None:
        log.info("Resuming from %s.", checkpoint)
    resumed = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    earlier = tally_of(checkpoint) if checkpoint else None
    if checkpoint and earlier is None:
        log.warning("Time and padding of steps 1 to %d are unknown; the figures leave them out.", resumed)
    trainer.start_counting(earlier)
    with PeakMemory(trainer.args.device) as memory:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = trainer.seconds
    samples: Any = trainer.train_dataset
    return FinetuneResult(
        mode=mode,
        steps=int(trainer.state.global_step),
        losses=_loss_curve(trainer.state.log_history),
        seconds=seconds,
        peak_memory_bytes=memory.peak_bytes,
        trainable_parameters=num_trainable(trainer.model),
        tokens=int(sum(len(sample["input_ids"]) for sample in samples) * trainer.state.epoch),
        batching=trainer.batching + (f" ({trainer.packing_fault})" if trainer.packing_fault else ""),
        padding_fraction=trainer.padding_fraction,
        resumed_from=resumed,
        measured_from=resumed if earlier is None else 0,
    )


def _loss_curve(history: list[dict[str, Any]]) -> tuple[dict[str, float], ...]:
    return tuple(
        {
            "step": int(entry["step"]),
            "loss": float(entry["loss"]),
            "learning_rate": float(entry.get("learning_rate", 0.0)),
        }
        | ({"ce": float(entry["ce"])} if "ce" in entry else {})
        for entry in history
        if "loss" in entry
    )
