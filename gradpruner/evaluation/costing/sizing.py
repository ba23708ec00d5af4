"""What the cost of two models must come to: sizes, operations, and the floor that depth alone allows.

Nothing is loaded: models are built on the meta device. A floor is a ratio pruned / dense. It counts what
depth leaves as it is (the projection to the vocabulary, the embeddings) and nothing else, so what a
measurement has above it are fixed costs: launching, the optimizer's bookkeeping, Python.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from gradpruner.common.errors import ModelError
from gradpruner.evaluation.costing.per_device import adapter_parameters
from gradpruner.models.sizes import ModelSizes, count_parameters, kv_bytes_per_token

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What is known of a model's cost without running it.

    Attributes:
        parameters: All of them; tied ones once.
        parameters_without_head: The same without the projection to the vocabulary.
        layer_kinds: Parameter counts of one layer that occur, ascending.
        adapter_parameters: Of LoRA adapters on every linear of every layer.
        layer_macs: Multiply-accumulates of all layers' linears for one token.
        head_macs: Those of the projection to the vocabulary for one token.
        flops: Counted by torch for one prompt, attention included, head left out; None when the model cannot
            be counted without weights (experts, which data chooses).
        kv_entries_per_token: Numbers the cache grows by with every token; `kv_bytes_per_token` in the
            checkpoint's type.
    """

    model_type: str
    layers: int
    parameters: int
    parameters_without_head: int
    decoder_parameters: int
    layer_kinds: tuple[int, ...]
    adapter_parameters: int
    layer_macs: int
    head_macs: int
    flops: int | None
    kv_entries_per_token: int
    kv_bytes_per_token: int
    disk_bytes: int


def size_model(counted: ModelSizes, *, tokens: int = 128, rank: int = 8) -> Sizes:
    """All that is known of a model's cost; operations are those of a prompt, adapters those of LoRA.

    Raises:
        ModelError: If transformers has no causal language model for the config.
    """
    model = counted.model
    try:
        adapters = adapter_parameters(model, rank)
    except ModelError:  # its layers cannot be told, so it gets none
        adapters = 0
    return Sizes(
        model_type=str(model.config.model_type),
        layers=len(counted.layer_parameters),
        parameters=counted.parameters,
        parameters_without_head=count_parameters(model.base_model),
        decoder_parameters=counted.decoder_parameters,
        layer_kinds=tuple(sorted(set(counted.layer_parameters))),
        adapter_parameters=adapters,
        layer_macs=sum(counted.layer_macs),
        head_macs=counted.head_macs,
        flops=count_flops(model, tokens=tokens),
        kv_entries_per_token=kv_bytes_per_token(counted.config, torch.int8),  # one byte an entry
        kv_bytes_per_token=kv_bytes_per_token(counted.config),
        disk_bytes=counted.disk_bytes,
    )


def count_flops(model: Any, *, tokens: int = 128) -> int | None:
    """FLOPs torch counts in one forward pass of a model on the meta device, head left out.

    Matrix products of linears and of attention (all pairs of tokens: a causal kernel computes about half of
    these); what works entry by entry counts nothing. The model's attention becomes "eager".

    Returns:
        The count; None when the model's forward pass depends on data, as with experts.
    """
    weight = next(model.parameters())
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    # The mask must be a finished one: to make it from lengths, transformers reads data, which meta has not.
    mask = torch.zeros(1, 1, tokens, tokens, dtype=weight.dtype, device="meta")
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # an architecture may do anything with data that is not there
        log.debug("FLOPs of %s cannot be counted without weights: %s", type(model).__name__, error)
        return None
    counted = int(counter.get_total_flops())
    # Experts are left out where no token can be sent to them.
    return counted if counted >= 2 * tokens * sum(ModelSizes(model).layer_macs) else None


def depth_alone(dense: Sizes, pruned: Sizes) -> str:
    """Why two models differ in more than their number of layers; "" when they do not."""
    if dense.model_type != pruned.model_type:
        return f"{pruned.model_type} instead of {dense.model_type}"
    if not set(pruned.layer_kinds) <= set(dense.layer_kinds):
        return "layers of another size"
    outside = [sizes.parameters - sizes.decoder_parameters for sizes in (dense, pruned)]
    # A few families hold a slice for every layer outside the layers, so less there is no other model.
    if outside[1] > outside[0] or dense.head_macs != pruned.head_macs:
        return "another vocabulary or embeddings of another size"
    return ""


def time_floor(dense: Sizes, pruned: Sizes, *, tokens: int, head_tokens: int) -> float:
    """Ratio of the operations of two models: the least a shallower one takes where computing is the bound.

    It is also the ratio of the weights read, which bound the decoding of small batches. `tokens` pass through
    the layers, `head_tokens` are projected to the vocabulary.

    Returns:
        (L' c + h) / (L c + h), with c the multiply-accumulates of one layer and h those of the head.
    """
    work = [tokens * sizes.layer_macs + head_tokens * sizes.head_macs for sizes in (dense, pruned)]
    return work[1] / work[0]
