"""Options of recording, fine-tuning and distillation: sections of the recipe, and what a run adds to them.

The same objects go from the recipe through methods to the Trainer, so every default is defined once.
Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gradpruner.common.errors import ConfigError

T = TypeVar("T", bound=BaseModel)


def validated(kind: type[T], raw: dict[str, Any], where: str = "") -> T:
    """Options made of plain values, the rest at defaults; ConfigError if one is unknown or not allowed.

    In messages their names begin with `where`: "methods.laco.".
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise ConfigError(
            f"{where}{key}: {fault['msg']} (given: {fault.get('input')!r}).",
            hint=f"Options: {', '.join(kind.model_fields) or 'none'}.",
        ) from error


def changed(kind: type[T], options: T | None, changes: dict[str, Any]) -> T:
    """Options with single values changed; None are the defaults. Raises ConfigError like `validated`."""
    options = options or kind()
    return validated(kind, options.model_dump() | changes) if changes else options


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    # Defaults are validated too: 32 for a float is 32.0, as it is when the recipe is read back.
    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )


class RecordSection(Section):
    """The first LoRA steps, whose gradients are recorded."""

    steps: int | None = Field(default=None, ge=3)
    """Optimizer steps; null: max(40, 1 % of the planned fine-tuning steps). The first two contribute
    nothing: LoRA B is zero at step 1, and the learning rate is still zero there."""
    batch_size: int = Field(default=4, ge=1)
    """Samples per optimizer step."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate; constant after warm-up."""
    adapter: Literal["lora", "rslora", "dora", "qlora"] = "lora"
    """Kind of adapter."""
    rank: int = Field(default=8, ge=1)
    """LoRA r."""
    alpha: float = Field(default=32, gt=0)
    """LoRA alpha."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout."""
    clip: float | None = Field(default=1.0, gt=0)
    """Gradient norm clipping before recording (as in the released code); null records raw gradients."""


class RecordOptions(RecordSection):
    """The options of `record_gradients`: the recipe's section, and what belongs to a run."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision, as in `FinetuneSection`."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """As in `FinetuneSection`."""
    fsdp: bool | dict[str, Any] = False
    """As in `FinetuneSection`."""
    seed: int = 0
    """Seeds LoRA initialisation, dropout and the order of samples."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" trains on a GPU when there is one."""


class FinetuneSection(Section):
    """Fine-tuning of every variant, the same for all."""

    mode: Literal["full", "lora", "qlora"] = "full"
    """full trains every weight; lora trains adapters; qlora trains them on weights in 4 bits (pip install
    'gradpruner[quant]') and puts them on the weights as they were before."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: by the size of the model and by mode (full at 8 B parameters: 1e-5, the
    paper's; smaller models need more). A dry run says which."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per forward pass and device."""
    accumulation: int | None = Field(default=8, ge=1)
    """Forward passes per optimizer step; null (effort fast and best): 8, or fewer where these make less than
    100 optimizer steps of the rows there are."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training data."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of steps with rising learning rate."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient clipping; 0 turns it off."""
    schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt",
    ] = "linear"  # fmt: skip
    """Learning-rate schedule after warm-up."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; auto: bf16 on GPUs that have it, fp32 elsewhere."""
    rank: int = Field(default=8, ge=1)
    """LoRA r (modes lora and qlora)."""
    alpha: float = Field(default=32, gt=0)
    """LoRA alpha (likewise)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout (likewise)."""
    merge_adapter: bool = True
    """Add LoRA into the weights on save, so that the folder is a plain model."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations: less memory, more time; offload: what is still kept waits in the host's memory
    (transformers 5.23 or newer)."""
    batching: Literal["packed", "grouped", "padded"] = "packed"
    """Layout of a batch: packed end to end where the model allows (else grouped), or padded to equal length,
    grouped by it or not. All learn the same."""
    compile: bool = False
    """Compile the model with torch.compile: slower start, faster steps."""
    liger: bool = False
    """Liger's fused kernels (GPU; pip install 'gradpruner[gpu]')."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by the Trainer's name: adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ..."""
    fsdp: bool | dict[str, Any] = False
    """Shard weights, gradients and optimizer over the processes (FSDP2): true, or the Trainer's fsdp_config.
    Needs torchrun or accelerate launch; a config of accelerate that turns FSDP on does the same."""
    deepspeed: str | None = None
    """DeepSpeed configuration file (ZeRO 1 to 3; pip install deepspeed). It is for fine-tuning: recording is
    data parallel all the same, because DeepSpeed steps before gradients can be read."""
    save_steps: int | None = Field(default=500, ge=1)
    """Checkpoint interval; an interrupted fine-tuning resumes from the last complete one. null: none."""
    report_to: str | list[str] = "none"
    """Trackers: tensorboard, wandb, trackio, mlflow, swanlab, all or none."""


class FinetuneOptions(FinetuneSection):
    """The options of `finetune`: the recipe's section, and what belongs to a run."""

    accumulation: int = Field(default=8, ge=1)
    """Forward passes per optimizer step."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps instead of epochs."""
    warmup: int | None = Field(default=None, ge=0)
    """Steps with rising learning rate, instead of `warmup_ratio`."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """With it, the schedule is a cosine that leads down to this learning rate."""
    seed: int = 0
    """Seeds LoRA initialisation, data order and dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" trains on a GPU when there is one."""


class DistillationOptions(Section):
    """The terms of a student's loss.

    With T the temperature, p the teacher's distribution at T and q the student's,

        loss = ce * mean -log q(label) + answers * T^2 mean KL(p || q) + prompts * T^2 mean KL(p || q).

    The first two means are over the answer tokens of an optimizer step, those with a label (the cross entropy
    is without temperature); the third is over its prompt tokens, which are all others but padding and the
    first of every sample, which is predicted from nothing. The weights need not add up to 1.

    Source: Distilling the Knowledge in a Neural Network (Hinton et al., 2015), section 2, for soft and hard
    targets together and for T^2. The weight of prompt tokens is this project's own.
    """

    ce: float = Field(default=0.3, ge=0)
    """Weight of the answers themselves (cross entropy)."""
    answers: float = Field(default=0.7, ge=0)
    """Weight of the divergence from the teacher on answer tokens."""
    prompts: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the teacher on prompt tokens; 0 saves computing logits there."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models."""

    @model_validator(mode="after")
    def _something_counts(self) -> DistillationOptions:
        if self.ce + self.answers + self.prompts == 0:
            raise ValueError("ce, answers and prompts are all 0: nothing would be learned; set one above 0")
        return self


class DistilSection(DistillationOptions):
    """What pruned models learn from the dense model tuned on the same task, while they are trained."""

    teacher: Literal["none", "tuned"] = "none"
    """none: pruned models learn from the answers alone. tuned: also from the logits of the tuned dense model,
    which needs the row dense, or start: given."""
