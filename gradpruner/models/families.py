"""Architectures as data: where a model keeps its decoder layers, and which config fields depend on them.

Only this module and the two that read its table, config_patch.py and layers.py, know architectures. A row
lists what would go wrong if layers were just deleted. A model type without a row is pruned by
`generic_family`, and the result is proved before it is used.

To add a row, name the config fields that have one entry per layer (`lists`), list layers by number
(`indices`), or count layers from one end (`leading`, `trailing`). Then add a line to tests/families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_EXPERTS = "experts are permuted differently in every layer, so adding them entry by entry has no meaning"
_TEXT_TOWER = ("model.language_model.layers", "language_model.model.layers")


@dataclass(frozen=True)
class Family:
    """Where one model type keeps its decoder layers, and what in its config depends on them.

    Attributes:
        layers_path: Attribute path from the model to the ModuleList of decoder layers.
        disk_paths: Further prefixes that checkpoints of this type use for these layers.
        lists: Config fields with one entry per layer; reduced to the kept layers where present.
        indices: Config fields that list layers by number; removed layers are left out, the rest renumbered.
        keyed: Config fields whose keys are layer numbers; handled like `indices`.
        leading: Config fields that count layers from the first (`max_window_layers`); recounted.
        trailing: Config fields that count layers from the last (`num_kv_shared_layers`); recounted.
        fixed: Config field -> the value it must have because a list now says what a modulo rule said before.
        periodic: Pairs of config fields (period, offset) for which no list exists: at its new position, a
            kept layer must match each pair if, and only if, it did before.
        dense_layers: Gives the layers without experts, from the config; they go to `mlp_only_layers`.
        wide_tensors: Name, relative to the parent of the layers, -> axis, for tensors that hold one slice
            per layer.
        shared_kv: Whether the trailing field counts layers that reuse keys and values of earlier layers;
            these earlier layers must stay.
        last_type: Type that the last layer must have because transformers forces it; "" if there is none.
        no_merge: Why layers of this type can be dropped but not merged; "" if they can be merged.
        refused: Config flag -> why a model that sets it cannot be pruned.
        nested: Name of the part of the config that describes the decoder (`text_config` of vision-language
            models); "" if it is the config itself.
        proven: Whether the row is tested; a generic row is proved on the model at hand.
    """

    layers_path: str = "model.layers"
    disk_paths: tuple[str, ...] = ()
    lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    indices: tuple[str, ...] = ()
    keyed: tuple[str, ...] = ()
    leading: tuple[str, ...] = ()
    trailing: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    periodic: tuple[tuple[str, str], ...] = ()
    dense_layers: Callable[[Any], list[int]] | None = None
    wide_tensors: dict[str, int] = field(default_factory=dict)
    shared_kv: bool = False
    last_type: str = ""
    no_merge: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    nested: str = ""
    proven: bool = True


def _dense_by_step(config: Any) -> list[int]:
    """Returns the layers without experts by Qwen's rule: those that are listed or fall between the steps."""
    step = getattr(config, "decoder_sparse_step", 1) or 1
    listed = set(getattr(config, "mlp_only_layers", None) or ())
    return [i for i in range(config.num_hidden_layers) if i in listed or (i + 1) % step]


_PLAIN = Family()
_MOE = Family(no_merge=_EXPERTS)
_QWEN = Family(leading=("max_window_layers",))
_QWEN_MOE = Family(
    leading=("max_window_layers",),
    fixed={"decoder_sparse_step": 1},
    dense_layers=_dense_by_step,
    no_merge=_EXPERTS,
)
_DEEPSEEK = Family(leading=("first_k_dense_replace",), no_merge=_EXPERTS)
_GEMMA3N = Family(
    lists=("layer_types", "intermediate_size", "activation_sparsity_pattern"),
    trailing=("num_kv_shared_layers",),
    wide_tensors={"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0},
    shared_kv=True,
)
_GEMMA4 = Family(
    keyed=("per_layer_config",),
    trailing=("num_kv_shared_layers",),
    wide_tensors=_GEMMA3N.wide_tensors,
    shared_kv=True,
    last_type="full_attention",
)
_GPT2 = Family(
    "transformer.h",
    refused={
        "scale_attn_by_inverse_layer_idx": "attention is divided by the layer's number, which pruning changes"
    },
)

FAMILIES: dict[str, Family] = {
    "apertus": _PLAIN,
    "arcee": _PLAIN,
    "bloom": Family("transformer.h"),
    "codegen": Family("transformer.h"),
    "cohere": _PLAIN,
    "cohere2": _PLAIN,
    "cwm": _PLAIN,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "ernie4_5": _PLAIN,
    "exaone4": _PLAIN,
    "falcon": Family("transformer.h"),
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "gemma3_text": _PLAIN,
    "gemma3n_text": _GEMMA3N,
    "gemma4_text": _GEMMA4,
    "glm": _PLAIN,
    "glm4": _PLAIN,
    "gpt2": _GPT2,
    "gpt_bigcode": Family("transformer.h"),
    "gpt_neox": Family("gpt_neox.layers"),
    "gpt_oss": _MOE,
    "gptj": Family("transformer.h"),
    "granite": _PLAIN,
    "granitemoe": _MOE,
    "helium": _PLAIN,
    "hunyuan_v1_dense": _PLAIN,
    "jamba": Family(
        periodic=(
            ("attn_layer_period", "attn_layer_offset"),
            ("expert_layer_period", "expert_layer_offset"),
        ),
        no_merge=_EXPERTS,
    ),
    "lfm2": Family(indices=("full_attn_idxs",)),
    "llama": _PLAIN,
    "llama4_text": Family(
        lists=("layer_types", "no_rope_layers"), indices=("moe_layers",), no_merge=_EXPERTS
    ),
    "minimax": _MOE,
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _MOE,
    "mpt": Family("transformer.blocks"),
    "nemotron": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": _PLAIN,
    "olmoe": _MOE,
    "opt": Family("model.decoder.layers"),
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "phimoe": _MOE,
    "qwen2": _QWEN,
    "qwen2_moe": _QWEN_MOE,
    "qwen3": _QWEN,
    "qwen3_5_text": _PLAIN,
    "qwen3_moe": _QWEN_MOE,
    "qwen3_next": _QWEN_MOE,
    "seed_oss": _PLAIN,
    "smollm3": Family(lists=("layer_types", "no_rope_layers")),
    "stablelm": _PLAIN,
    "starcoder2": _PLAIN,
    "vaultgemma": _PLAIN,
    "xglm": _PLAIN,
}


def find_family(config: Any) -> Family | None:
    """Returns the row for a decoder's config; None for a type without a row (see `generic_family`)."""
    return FAMILIES.get(getattr(config, "model_type", ""))


def generic_family(config: Any) -> Family:
    """Returns a row for an unknown type: a list with as many entries as layers has one entry per layer."""
    depth = config.num_hidden_layers
    values = config.to_dict()
    sequences = {n: v for n, v in values.items() if isinstance(v, Sequence) and not isinstance(v, str)}
    lists = tuple(name for name, value in sequences.items() if len(value) == depth)
    return Family(lists=lists, proven=False)


def nested_family(row: Family, layers_path: str, part: str) -> Family:
    """Returns the row of a larger model that contains a decoder.

    The decoder's layers are at `layers_path` of the larger model, its config is the part called `part`.
    """
    return replace(row, layers_path=layers_path, disk_paths=_TEXT_TOWER, nested=part)
