"""What a loaded model computes, on tokens that are always the same: what the export gate compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.models.config_patch import text_config
from gradpruner.models.shards import open_shards
from gradpruner.pruning.writer import TORCH_DTYPES

PROMPT_TOKENS = 16
NEW_TOKENS = 8


def computing_dtype(folder: Path) -> torch.dtype:
    """The dtype most weights are stored in, so that loading rounds nothing; bfloat16 for 8-bit floats."""
    sizes: dict[str, int] = {}
    for ref in open_shards(folder).tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.num_bytes
    dtype = TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name], default="F32"), torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, to be compared as they are."""
    return tensor.contiguous().view(torch.uint8)


def dtype_name(dtype: torch.dtype) -> str:
    """What `load_model` calls a dtype."""
    return str(dtype).removeprefix("torch.")


def is_tied(model: Any) -> bool | None:
    """Whether input and output embeddings are one tensor, where the config says so; None elsewhere."""
    if not getattr(text_config(model.config), "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def behaviour(model: nn.Module) -> dict[str, Tensor]:
    """Logits without a cache, and greedy tokens with their logits computed with one."""
    lm: Any = model
    vocabulary = lm.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(PROMPT_TOKENS) * 37 + 11).remainder(vocabulary)[None]
    logits = lm(input_ids=ids, use_cache=False).logits
    out = lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, PROMPT_TOKENS:]
    return {"logits": logits, "cached": torch.stack(out.logits), "tokens": tokens}
