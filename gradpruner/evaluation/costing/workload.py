"""Workload: what is run to measure a model's cost, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import check_known

MODES = ("full", "lora", "inference")
RECORDING = "recording"
"""A LoRA step with recorded gradients, to be compared with "lora" on one model, not across two models."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
_AT_LEAST = {"batch_size": 1, "tokens": 2, "new_tokens": 2, "repeats": 1, "warmup": 0, "rank": 1}


@dataclass(frozen=True)
class Workload:
    """What is run to measure a model's cost, and how often.

    Attributes:
        batch_size: Sequences per training step and per generation, >= 1.
        tokens: Length of every training sample and of every prompt, >= 2.
        learned_tokens: Tokens at the end of each training sample that carry loss; None for all of them. The
            head is computed for these tokens only.
        new_tokens: Tokens generated after every prompt, >= 2.
        repeats: Measured steps per model, >= 1.
        warmup: Steps before the measured ones, >= 0.
        dtype: Dtype of the weights; "auto" is the choice of a run: bfloat16 on accelerators that support it,
            float32 on other devices and for weights that full fine-tuning updates.
        device: "auto" (an accelerator if there is one) or a torch device; always a single one.
        attn: Attention implementation ("sdpa", "eager", "flash_attention_2"); None lets transformers choose.
        gradient_checkpointing: Recompute activations in training, to save memory at the cost of time.
        rank: Rank of the adapters in LoRA fine-tuning, >= 1.
        shortest: Length of the shortest training sample, 2 to `tokens`: lengths are drawn evenly on a
            logarithmic scale from `shortest` to `tokens`. None: all samples have `tokens` tokens.
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
                hint=f"Give 1 to {self.tokens}, or leave it out to learn all tokens.",
            )
        if self.shortest is not None and not 2 <= self.shortest <= self.tokens:
            raise ConfigError(
                f"shortest is {self.shortest}; it must be 2 to {self.tokens}, the longest length."
            )
        check_known("dtype", self.dtype, DTYPES)

    @property
    def head_tokens(self) -> int:
        """Positions of a training sample at which the head is computed.

        That is one more than the learned tokens, because each token is predicted at the position before it
        (`answer_window`).
        """
        return self.tokens if self.learned_tokens is None else min(self.tokens, self.learned_tokens + 1)

    def weight_dtype(self, mode: str) -> str:
        """Returns the weights' dtype in a mode, as in a run: bfloat16 is too coarse for AdamW's updates."""
        return "float32" if mode == "full" and self.dtype == "auto" else self.dtype

    @property
    def steps(self) -> int:
        """Steps per model, including warm-up."""
        return self.warmup + self.repeats


def checked_modes(modes: Sequence[str]) -> tuple[str, ...]:
    """Returns the modes without repeats, in the order of `MODES`.

    Raises:
        ConfigError: If no mode is given, or a mode is unknown.
    """
    check_known("mode", modes, MODES)
    if not modes:
        raise ConfigError("No mode is given.", hint=f"Give any of {', '.join(MODES)}.")
    return tuple(mode for mode in MODES if mode in modes)
