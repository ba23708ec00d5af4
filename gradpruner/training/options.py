"""Options of recording, fine-tuning and distillation: sections of the recipe, plus what a run adds.

The same objects go from the recipe through methods to the Trainer, so every default is defined once.
Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from gradpruner.common.options import Section


class RecordSection(Section):
    """The first LoRA steps; their gradients are recorded."""

    steps: int | None = Field(default=None, ge=3)
    """Optimizer steps; null: max(40, 1 % of the planned fine-tuning steps). The first two contribute
    nothing: LoRA B is zero at step 1, and so is the learning rate."""
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
    """The options of `record_gradients`: the recipe's section, plus those of a run."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision, see `FinetuneSection`."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """See `FinetuneSection`."""
    fsdp: bool | dict[str, Any] = False
    """See `FinetuneSection`."""
    seed: int = 0
    """Seeds LoRA initialisation, dropout and the order of samples."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" trains on a GPU when there is one."""


class FinetuneSection(Section):
    """Fine-tuning, the same for every variant."""

    mode: Literal["full", "lora", "qlora"] = "full"
    """full trains every weight; lora trains adapters; qlora trains adapters on 4-bit weights (pip install
    'gradpruner[quant]') and then puts them on the unquantised weights."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate; null: by model size and mode (full at 8 B parameters: 1e-5, as in the paper;
    smaller models need more). A dry run shows it."""
    batch_size: int = Field(default=8, ge=1)
    """Samples per forward pass and device."""
    accumulation: int | None = Field(default=8, ge=1)
    """Forward passes per optimizer step; null (effort fast and best): 8, or fewer if 8 would make less than
    100 optimizer steps."""
    epochs: float = Field(default=3.0, gt=0)
    """Passes over the training data."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay."""
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of steps in which the learning rate rises."""
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
    """LoRA alpha (modes lora and qlora)."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """LoRA dropout (modes lora and qlora)."""
    merge_adapter: bool = True
    """Merge LoRA into the weights when saving, so that the folder is a plain model."""
    gradient_checkpointing: bool | Literal["offload"] = False
    """Recompute activations: less memory, more time; offload: activations that are still kept wait in the
    host's memory (transformers 5.23 or newer)."""
    batching: Literal["packed", "grouped", "padded"] = "packed"
    """Layout of a batch: packed end to end if the model allows (else grouped); grouped: padded batches of
    samples of similar length; padded: padded batches in random order. All compute the same loss."""
    compile: bool = False
    """Compile the model with torch.compile: slower start, faster steps."""
    liger: bool = False
    """Liger's fused kernels (GPU; pip install 'gradpruner[gpu]')."""
    optim: str = "adamw_torch_fused"
    """Optimizer, by the Trainer's name: adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ..."""
    fsdp: bool | dict[str, Any] = False
    """Shard weights, gradients and optimizer over the processes (FSDP2): true, or the Trainer's
    fsdp_config. Needs torchrun or accelerate launch; an accelerate config with FSDP has the same effect."""
    deepspeed: str | None = None
    """DeepSpeed configuration file (ZeRO 1 to 3; pip install deepspeed), for fine-tuning only. Recording is
    data parallel, because DeepSpeed steps before gradients can be read."""
    save_steps: int | None = Field(default=500, ge=1)
    """Steps between checkpoints. One is also written at Ctrl-C or SIGTERM, unless several processes train. An
    interrupted run resumes from the last complete one; null: none."""
    report_to: str | list[str] = "none"
    """Trackers: tensorboard, wandb, trackio, mlflow, swanlab, all or none."""


class FinetuneOptions(FinetuneSection):
    """The options of `finetune`: the recipe's section, plus those of a run."""

    accumulation: int = Field(default=8, ge=1)
    """Forward passes per optimizer step."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    warmup: int | None = Field(default=None, ge=0)
    """Steps in which the learning rate rises, instead of `warmup_ratio`."""
    final_learning_rate: float | None = Field(default=None, ge=0)
    """If given, the schedule is a cosine that ends at this learning rate."""
    seed: int = 0
    """Seeds LoRA initialisation, data order and dropout."""
    device: Literal["auto", "cpu"] = "auto"
    """"auto" trains on a GPU when there is one."""


class DistillationOptions(Section):
    """The terms of a student's loss.

    With T the temperature, p the teacher's distribution at T and q the student's,

        loss = ce * mean -log q(label) + answers * T^2 mean KL(p || q) + prompts * T^2 mean KL(p || q).

    The first two means are over the answer tokens of an optimizer step, which have a label; the cross entropy
    does not use the temperature. The third mean is over the prompt tokens: all others except padding and the
    first token of every sample, which has no context. The weights need not add up to 1.

    Source: Distilling the Knowledge in a Neural Network (Hinton et al., 2015), section 2, for soft and hard
    targets together and for T^2. The weight of prompt tokens is this project's own.
    """

    ce: float = Field(default=0.3, ge=0)
    """Weight of the cross entropy of the answers."""
    answers: float = Field(default=0.7, ge=0)
    """Weight of the divergence from the teacher on answer tokens."""
    prompts: float = Field(default=0.1, ge=0)
    """Weight of the divergence from the teacher on prompt tokens; 0 saves computing logits there."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both models before the divergence."""

    @model_validator(mode="after")
    def _something_counts(self) -> DistillationOptions:
        if self.ce + self.answers + self.prompts == 0:
            raise ValueError(
                "ce, answers and prompts are all 0, so nothing would be learned; set one above 0"
            )
        return self


class DistilSection(DistillationOptions):
    """Distillation of the tuned dense model into the pruned models while they are trained."""

    teacher: Literal["none", "tuned"] = "none"
    """none: pruned models learn from the answers alone. tuned: also from the logits of the tuned dense model,
    which needs the variant dense, or start: given."""
