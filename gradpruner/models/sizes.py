"""What a model costs: parameters, KV cache, operations, disk.

Sizes are counted on the model built on torch's "meta" device, with shapes but no values. That takes about a
second for a model of any size and needs no weights. One multiply-accumulate (MAC) is two FLOPs. Only the
operations of the linears are counted; attention scores add a share that grows with the context.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.models.layers import LayeredModel

# Names of the same field in different model families, and of the layer types that have a KV cache.
_EXPERT_COUNT_FIELDS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_USED_FIELDS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_CACHED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "attention")


def build_on_meta(config: Any) -> nn.Module:
    """Builds the causal language model that a config describes, with shapes but no values.

    Raises:
        ModelError: If transformers has no causal language model for it.
    """
    # A copy: building fills in fields such as the attention implementation.
    text = copy.deepcopy(config.get_text_config(decoder=True))
    try:
        with torch.device("meta"):
            if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
                return cast(nn.Module, AutoModelForCausalLM.from_config(text))
            if not hasattr(text, "vocab_size"):
                raise ValueError("it has no vocabulary, so it predicts no tokens")
            return _Decoder(text)
    except ValueError as error:
        raise ModelError(
            f"Cannot size a model of type '{text.model_type}': {str(error).splitlines()[0]}",
            hint="Only decoder-only language models that transformers knows can be used.",
        ) from error


class _Decoder(nn.Module):
    """The decoder of a vision or audio model with a language head, for which transformers has no class."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.config = text
        self.model = AutoModel.from_config(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if getattr(text, "tie_word_embeddings", False):
            self.lm_head.weight = self.model.get_input_embeddings().weight

    @property
    def base_model(self) -> nn.Module:
        """The model below the head, as in transformers' own models."""
        return cast(nn.Module, self.model)

    def get_output_embeddings(self) -> nn.Linear:
        """Returns the head, as in transformers' own models."""
        return self.lm_head


def count_parameters(module: nn.Module) -> int:
    """Returns the number of parameters; tied embeddings count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def kv_bytes_per_token(
    config: Any, dtype: torch.dtype | None = None, *, keep: Sequence[int] | None = None
) -> int:
    """Returns by how many bytes the key-value cache grows with each token of context.

    Sliding-window layers count in full (they stop growing at the window); layers without a cache
    (linear attention, state space) count nothing; latent attention counts its compressed entry.

    Args:
        config: A transformers config.
        dtype: The dtype of the cache; None for the dtype of the checkpoint.
        keep: Layers to count; None for all.
    """
    text = config.get_text_config(decoder=True)
    layers = range(text.num_hidden_layers) if keep is None else keep
    entries = sum(_kv_entries(text, layer) for layer in layers)
    return entries * _dtype_of(text, dtype).itemsize


class ModelSizes:
    """The sizes of a model, counted on a model without values that is built when first needed.

    Args:
        counted: A transformers config of any decoder family, or a model. It must not change afterwards.

    Raises:
        ModelError: On first use, if transformers has no causal language model for the config.
    """

    def __init__(self, counted: Any) -> None:
        self._counted = counted
        self.config = counted.config if isinstance(counted, nn.Module) else counted

    @cached_property
    def model(self) -> Any:
        """The model with shapes but no values; do not change it."""
        return self._counted if isinstance(self._counted, nn.Module) else build_on_meta(self.config)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model; tied weights count once."""
        return count_parameters(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order; do not change them."""
        return LayeredModel(self.model).layers

    @cached_property
    def layer_parameters(self) -> list[int]:
        """Parameters of each decoder layer, in order."""
        return [count_parameters(layer) for layer in self.layers]

    @property
    def decoder_parameters(self) -> int:
        """Parameters in all decoder layers: everything but embeddings, last norm and head."""
        return sum(self.layer_parameters)

    @cached_property
    def layer_macs(self) -> list[int]:
        """Multiply-accumulates of each layer's linears for one token, in order.

        In a mixture of experts, only the experts that a token is routed to count.

        Source: GradPruner, Table 11 (128 tokens): 893.353 GMAC for the 32 layers of Llama-3.1-8B and 530.428
        GMAC for 19 of them.
        """
        return [_layer_macs(layer, self.model) for layer in self.layers]

    @cached_property
    def head_macs(self) -> int:
        """Multiply-accumulates of the projection to the vocabulary for one token."""
        head = self.model.get_output_embeddings()
        return 0 if head is None else int(head.weight.numel())

    @property
    def disk_bytes(self) -> int:
        """Bytes of the weights in a checkpoint with the dtype that the config names, else float32."""
        return self.parameters * _dtype_of(self.model.config, None).itemsize

    def savings(self, keep: Sequence[int]) -> dict[str, dict[str, int]]:
        """Returns what keeping only some layers saves; layers may differ in size.

        A layer that is merged into another costs nothing, so it counts as removed.

        Args:
            keep: Indices of the layers that stay, ascending, each in [0, num_layers).

        Returns:
            `{"before", "after"}` of "layers", "decoder_parameters", "parameters", "kv_bytes_per_token",
            "flops_per_token" and "disk_bytes".

        Raises:
            PlanError: If `keep` is empty, not ascending, repeats a layer or leaves the range.
        """
        num_layers = len(self.layer_parameters)
        _check_keep(keep, num_layers)
        return changes(self.counts(range(num_layers)), self.counts(keep))

    def counts(self, keep: Sequence[int]) -> dict[str, int]:
        """Returns the sizes with only these layers, in the units of `savings`."""
        decoder = sum(self.layer_parameters[layer] for layer in keep)
        parameters = self.parameters - self.decoder_parameters + decoder
        return {
            "layers": len(keep),
            "decoder_parameters": decoder,
            "parameters": parameters,
            "kv_bytes_per_token": kv_bytes_per_token(self.config, keep=keep),
            "flops_per_token": 2 * (sum(self.layer_macs[layer] for layer in keep) + self.head_macs),
            "disk_bytes": parameters * (self.disk_bytes // self.parameters),
        }


def changes(before: dict[str, int], after: dict[str, int]) -> dict[str, dict[str, int]]:
    """Returns unit -> `{"before", "after"}`."""
    return {unit: {"before": count, "after": after[unit]} for unit, count in before.items()}


def _check_keep(keep: Sequence[int], num_layers: int) -> None:
    """Raises PlanError if `keep` does not fit a model of `num_layers` layers."""
    if list(keep) != sorted(set(keep)) or not keep or keep[0] < 0 or keep[-1] >= num_layers:
        raise PlanError(
            f"Cannot keep the layers {list(keep)} of a model with {num_layers} layers.",
            hint=f"Give at least one index, ascending and without repeats, in 0..{num_layers - 1}.",
        )


def _dtype_of(config: Any, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the given dtype, else the one a config names, else float32."""
    named = dtype if dtype is not None else getattr(config, "dtype", None)
    if isinstance(named, str):
        named = getattr(torch, named.removeprefix("torch."), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def _first_field(config: Any, names: Sequence[str]) -> int | None:
    """Returns the value of the first of these fields that is an integer in the config, or None."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _layer_macs(layer: nn.Module, model: Any) -> int:
    """Returns the multiply-accumulates of one layer's linears for one token."""
    config = model.config.get_text_config(decoder=True)
    experts = _first_field(config, _EXPERT_COUNT_FIELDS)
    used = _first_field(config, _EXPERTS_USED_FIELDS) or 1
    own = (module for name, module in layer.named_modules() if ".lora_" not in name)  # without adapters
    return sum(_module_macs(module, experts, used) for module in own)


def _module_macs(module: nn.Module, experts: int | None, used: int) -> int:
    """Returns the multiply-accumulates of one module, without its children, for one token."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    macs = 0
    for parameter in module.parameters(recurse=False):
        if experts is None or parameter.ndim < 2 or parameter.shape[0] != experts:
            continue
        # transformers keeps all experts of a layer in one (experts, out, in) tensor, and their router in an
        # (experts, in) tensor. Neither is an nn.Linear.
        share = used if parameter.ndim == 3 else experts
        macs += parameter.numel() // experts * share
    return macs


def _kv_entries(config: Any, layer: int) -> int:
    """Returns how many numbers one layer caches per token."""
    types = getattr(config, "layer_types", None)
    if types and types[layer] not in _CACHED_LAYER_TYPES:
        return 0
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return int(latent) + int(getattr(config, "qk_rope_head_dim", 0))
    heads = _at_layer(config.num_attention_heads, layer)
    kv_heads = _at_layer(getattr(config, "num_key_value_heads", None), layer) or heads
    head_dim = _at_layer(getattr(config, "head_dim", None), layer) or config.hidden_size // heads
    return 2 * int(kv_heads) * int(head_dim)


def _at_layer(value: Any, layer: int) -> Any:
    """Returns a config value for one layer; some families have a list with one value per layer."""
    return value[layer] if isinstance(value, list | tuple) else value
