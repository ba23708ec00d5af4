"""Config of a small Llama and random samples, for measurements of memory."""

from __future__ import annotations

import torch
from transformers import LlamaConfig


def config_of(shape: tuple[int, ...]) -> LlamaConfig:
    """Returns the config of a shape: hidden size, MLP channels, layers, query heads, KV heads, vocabulary."""
    hidden, channels, layers, heads, kv_heads, vocabulary = shape
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
    )


def random_samples(count: int, tokens: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Returns samples of one length, the second half of which carries loss."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(min(3, vocabulary - 1), vocabulary, (count, tokens), generator=generator).tolist()
    return [{"input_ids": ids, "labels": [-100] * (tokens // 2) + ids[tokens // 2 :]} for ids in rows]
