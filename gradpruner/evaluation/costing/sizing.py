"""Sizes and operations of two models, and the floor that depth alone sets for the cost of the pruned one.

No weights are loaded: models are built on the meta device. A floor is a ratio pruned / dense of operations or
bytes. It includes the parts that pruning layers does not shrink (the head and the embeddings) but no fixed
costs, so a measured ratio above its floor is due to fixed costs: kernel launches, Python, the optimizer's
bookkeeping.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gradpruner.common.errors import ModelError
from gradpruner.evaluation.costing.per_device import adapter_parameters
from gradpruner.models.sizes import ModelSizes, count_parameters, kv_bytes_per_token

log = logging.getLogger(__name__)


def size_facts(sizes: ModelSizes, *, tokens: int = 128, rank: int = 8) -> dict[str, Any]:
    """Returns the costs of a model that are known without running it, as JSON values.

    Args:
        sizes: The model.
        tokens: Length of the prompt whose FLOPs are counted.
        rank: Rank of the LoRA adapters.

    Returns:
        "layer_kinds" are the different parameter counts of single layers, ascending. "layer_macs" (of all
        layers) and "head_macs" are multiply-accumulates per token. "flops" are those of `count_flops`.
        "kv_entries_per_token" are the numbers that a token adds to the KV cache, "kv_bytes_per_token" their
        bytes in the checkpoint's dtype.

    Raises:
        ModelError: If transformers has no causal language model for the config.
    """
    model = sizes.model
    try:
        adapters = adapter_parameters(model, rank)
    except ModelError:  # the decoder layers were not found, so no adapters can be attached
        adapters = 0
    return {
        "model_type": str(model.config.model_type),
        "layers": len(sizes.layer_parameters),
        "parameters": sizes.parameters,
        "parameters_without_head": count_parameters(model.base_model),
        "decoder_parameters": sizes.decoder_parameters,
        "layer_kinds": sorted(set(sizes.layer_parameters)),
        "adapter_parameters": adapters,
        "layer_macs": sum(sizes.layer_macs),
        "head_macs": sizes.head_macs,
        "flops": count_flops(model, tokens=tokens),
        "kv_entries_per_token": kv_bytes_per_token(sizes.config, torch.int8),  # one byte an entry
        "kv_bytes_per_token": kv_bytes_per_token(sizes.config),
        "disk_bytes": sizes.disk_bytes,
    }


def count_flops(model: Any, *, tokens: int = 128) -> int | None:
    """Returns the FLOPs torch counts in one forward pass of a model on the meta device, without the head.

    The count includes the matrix products of linears and attention (over all pairs of tokens; a causal kernel
    computes about half of them) and no elementwise operations. Sets the model's attention to "eager".

    Returns:
        The count; None if the model's forward pass depends on data, as in mixtures of experts.
    """
    weight = next(model.parameters())
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # Pass a full mask: transformers would read data to build one, and meta tensors have none.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=weight.dtype, device="meta")
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # model code raises all kinds of errors on tensors without data
        log.debug("FLOPs of %s cannot be counted without weights: %s", type(model).__name__, error)
        return None
    counted = int(counter.get_total_flops())
    # A count below that of the linears alone has skipped experts, to which no token can be routed.
    return counted if counted >= 2 * tokens * sum(ModelSizes(model).layer_macs) else None


def depth_alone(dense: ModelSizes, pruned: ModelSizes) -> str:
    """Returns why two models differ in more than their number of layers; "" if they do not."""
    types = [str(sizes.model.config.model_type) for sizes in (dense, pruned)]
    if types[0] != types[1]:
        return f"{types[1]} instead of {types[0]}"
    if not set(pruned.layer_parameters) <= set(dense.layer_parameters):
        return "layers of another size"
    outside = [sizes.parameters - sizes.decoder_parameters for sizes in (dense, pruned)]
    # A few families keep per-layer slices outside the layers, so fewer parameters there are expected.
    if outside[1] > outside[0] or dense.head_macs != pruned.head_macs:
        return "another vocabulary or embeddings of another size"
    return ""


def time_floor(dense: ModelSizes, pruned: ModelSizes, *, tokens: int, head_tokens: int) -> float:
    """Returns the ratio pruned / dense of the operations: the lowest time ratio if compute is the bottleneck.

    With one token it is also the ratio of the weights read, the bottleneck when decoding small batches.

    Args:
        dense: Sizes of the dense model.
        pruned: Sizes of the pruned model.
        tokens: Tokens that pass through the layers.
        head_tokens: Tokens that are projected to the vocabulary.

    Returns:
        (T L' c + H h) / (T L c + H h) for L and L' layers, T tokens and H head tokens, where c and h are the
        multiply-accumulates per token of one layer and of the head.
    """
    work = [tokens * sum(sizes.layer_macs) + head_tokens * sizes.head_macs for sizes in (dense, pruned)]
    return work[1] / work[0]
