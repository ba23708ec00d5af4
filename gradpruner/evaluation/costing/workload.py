"""Workload: what is run to measure a model's cost, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import check_known

MODES = ("full", "lora", "inference")
RECORDING = "recording"
"""A LoRA step whose gradients are recorded: measured against "lora", not of two models."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
_AT_LEAST = {"batch_size": 1, "tokens": 2, "new_tokens": 2, "repeats": 1, "warmup": 0, "rank": 1}


@dataclass(frozen=True)
class Workload:
    """What is run to measure a model's cost, and how often.

    Attributes:
        batch_size: Sequences per training step and per generation, >= 1.
        tokens: Length of every training sample and of every prompt, >= 2.
        learned_tokens: Tokens at the end of each training sample that carry loss; None for all of them. The
            projection to the vocabulary is computed for these alone.
        new_tokens: Tokens generated after every prompt, >= 2.
        repeats: Measured steps of either model, >= 1.
        warmup: Steps before these that are not measured, >= 0.
        dtype: Type of the weights; "auto" is what a run chooses: bfloat16 on accelerators that have it,
            float32 elsewhere and for weights that full fine-tuning updates.
        device: "auto" (an accelerator when there is one) or a torch device; always a single one.
        attn: Attention implementation ("sdpa", "eager", "flash_attention_2"); None leaves it to transformers.
        gradient_checkpointing: Trade time for activation memory in training.
        rank: Rank of the adapters of LoRA fine-tuning, >= 1.
        shortest: Length of the shortest training sample, 2 to `tokens`: lengths are then spread evenly, on a
            logarithmic scale, from there to `tokens`. None: all are as long as `tokens`.
        batching: Layout of training batches, as in `finetune`: "packed", "grouped" or "padded".
        liger: Train with Liger's fused kernels.
        seed: Seed of random weights, samples and prompts.

    Raises:
        ConfigError: If a value is out of range.
    """

    batch_size: int = 4
    tokens: int = 128
    learned_tokens: int | None = None
    new_tokens: int = 32
    repeats: int = 7
    warmup: int = 2
    dtype: str = "auto"
    device: str = "auto"
    attn: str | None = None
    gradient_checkpointing: bool = False
    rank: int = 8
    shortest: int | None = None
    batching: str = "packed"
    liger: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least {least} is needed.")
        if self.learned_tokens is not None and not 1 <= self.learned_tokens <= self.tokens:
            raise ConfigError(
                f"learned_tokens is {self.learned_tokens}; a sample has {self.tokens} tokens.",
                hint=f"Give 1 to {self.tokens}, or leave it out to learn all of them.",
            )
        if self.shortest is not None and not 2 <= self.shortest <= self.tokens:
            raise ConfigError(f"shortest is {self.shortest}; 2 to {self.tokens}, the longest, is needed.")
        check_known("dtype", self.dtype, DTYPES)

    @property
    def head_tokens(self) -> int:
        """Positions of a training sample at which the projection to the vocabulary is computed.

        One more than is learned, because each token is predicted at the one before (`answer_window`).
        """
        return self.tokens if self.learned_tokens is None else min(self.tokens, self.learned_tokens + 1)

    def weight_dtype(self, mode: str) -> str:
        """Type of the weights in a mode, chosen as in a run: bfloat16 is too coarse for AdamW's updates."""
        return "float32" if mode == "full" and self.dtype == "auto" else self.dtype

    @property
    def steps(self) -> int:
        """Steps of either model, warm-up included."""
        return self.warmup + self.repeats


def checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    """The modes once each, in the order of `MODES`.

    Raises:
        ConfigError: If there is none, or one is unknown.
    """
    check_known("mode", modes, MODES)
    if not modes:
        raise ConfigError("No mode is given.", hint=f"Any of {', '.join(MODES)}.")
    return tuple(mode for mode in MODES if mode in modes)
