"""Reads and checks config.json as an untrusted file, before transformers acts on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.common.files import read_plain

CONFIG_FILE = "config.json"
CONFIG_BYTES = 32 << 20
# Implementations of attention and experts that come with torch and transformers. Any other name in a config
# is a kernel that transformers would fetch from the hub and run (CVE-2026-4372 and related ones).
ALLOWED_ATTENTION = (
    "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4",
)  # fmt: skip
ALLOWED_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation$")
# Fields that transformers sets while it builds a model and never writes to a file.
_INTERNAL = ("_attn_implementation_internal", "_experts_implementation_internal")
# Sections that say how weights are quantised, as transformers, compressed-tensors and MLX call them.
_QUANTISATION = ("quantization_config", "compression_config", "quantization")
# Fields that count layers behind the last one, which predict several tokens at once.
_BEYOND = re.compile(r"num_nextn_predict_layers$|.*mtp.*(layers|modules|depth)$|(num_)?mtp$")
# Tensors that the layers of such a predictor have and no other layer has.
BEYOND_SIGNS = (".eh_proj.weight", ".enorm.weight", ".hnorm.weight", ".shared_head.norm.weight")
# Largest value a field may have: far above that of any model, far below what would fill the memory.
_LIMITS = (
    (re.compile(r"(?:layers?|depth|blocks)$"), 2_000),
    (re.compile(r"(?:experts?|heads?|groups)$"), 1 << 16),
    (re.compile(r"(?:d_model|n_embd|n_inner|(?:size|dim|rank|channels))$"), 1 << 28),
    (re.compile(r"positions?(?:_embeddings)?$"), 1 << 40),
)
_DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def read_raw_config(path: Path) -> dict[str, Any]:
    """Returns the content of a config.json.

    Raises:
        ModelError: If it cannot be read, is larger than `CONFIG_BYTES`, or is not a JSON object.
    """
    try:
        config = json.loads(read_plain(path, CONFIG_BYTES).decode("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    return config


def fields_of(config: dict[str, Any], inside: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields (path, key, value) of every field of a config and of all objects nested in it, also in lists."""
    for key, value in config.items():
        where = f"{inside}{key}"
        yield where, key, value
        parts = value if isinstance(value, list) else [value]
        for part in parts:
            if isinstance(part, dict):
                yield from fields_of(part, f"{where}.")


def refuse_foreign_code(path: Path, config: dict[str, Any]) -> None:
    """Refuses fields, at any depth of the config, that make transformers fetch and run code.

    Raises:
        IntegrityError: If attention, experts or a kernel would come from the hub.
    """
    for where, key, value in fields_of(config):
        named = _IMPLEMENTATION.match(key)
        if key.startswith(_INTERNAL) and value is not None:
            raise _foreign_code(path, where, value, "No genuine checkpoint needs it: remove the field")
        if named:
            allowed = ALLOWED_ATTENTION if named[1] == "attn" else ALLOWED_EXPERTS
            strange = [name for name in _strings(value) if name.removeprefix("paged|") not in allowed]
            if strange:
                hint = f"Allowed are {', '.join(allowed)}: remove the field"
                raise _foreign_code(path, where, strange[0], hint)
        elif "kernel" in key:
            fetched = [name for name in _strings(value) if "/" in name]
            if fetched:
                hint = "No genuine checkpoint needs it: remove the field"
                raise _foreign_code(path, where, fetched[0], hint)


def _foreign_code(path: Path, where: str, value: Any, hint: str) -> IntegrityError:
    return IntegrityError(
        f"{path} sets '{where}' to {ascii(value)[:80]}, which makes transformers fetch and run code.",
        hint=f"{hint}, or do not use this model.",
    )


def _strings(value: Any) -> list[str]:
    """Returns all strings in a JSON value, except the keys of objects."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for part in value.values() for text in _strings(part)]
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return []


def refuse_absurd_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuses sizes that would fill the memory before any weight is read.

    Raises:
        IntegrityError: If a number of layers, heads, experts, channels or positions is larger than in any
            model, or the model would have no layers.
    """
    for where, key, value in fields_of(config):
        numbers = value if isinstance(value, list) else [value]
        numbers = [x for x in numbers if isinstance(x, int | float) and not isinstance(x, bool)]
        limit = next((most for pattern, most in _LIMITS if pattern.search(key)), None)
        if limit is not None and any(x > limit for x in numbers):
            raise IntegrityError(
                f"{path} sets '{where}' to {max(numbers):g}; at most {limit:,} is allowed.",
                hint="The file is damaged or malicious: download it again, or do not use this model.",
            )
        if key in _DEPTH_FIELDS and any(x < 1 for x in numbers):
            raise IntegrityError(
                f"{path} sets '{where}' to {min(numbers):g}; a model has at least 1 layer.",
                hint="Download config.json again.",
            )


def quantised_parts(config: dict[str, Any]) -> dict[str, Any]:
    """Returns path -> section of a config about quantised weights; null and empty sections are left out."""
    return {
        where: value
        for where, key, value in fields_of(config)
        if key in _QUANTISATION and value is not None and value != {} and value is not False
    }


def quantised_kind(section: Any) -> str:
    """Returns the method that a section on quantisation names."""
    if not isinstance(section, dict):
        return "unknown"
    method = section.get("quant_method")
    return str(method) if method else f"{section['bits']} bit" if "bits" in section else "unknown"


def wants_code(config: dict[str, Any]) -> bool:
    """Whether a model needs the code that comes with it because transformers does not know its type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    return bool(config.get("auto_map")) and not (isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES)


def beyond_fields(config: Any) -> dict[str, int]:
    """Returns field -> number of layers behind the last one (multi-token prediction), for any model type.

    `config` is the decoder's config as transformers reads it, or the decoder's part of a config.json.
    """
    values = config if isinstance(config, dict) else vars(config)
    return {
        name: value
        for name, value in values.items()
        if _BEYOND.match(name) and isinstance(value, int) and not isinstance(value, bool) and value > 0
    }


def is_beyond(name: str, depth: int) -> bool:
    """Whether a tensor belongs to multi-token prediction: by its name, or by a layer behind the last one."""
    numbered = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    if numbered is not None and int(numbered[1]) >= depth:
        return True
    return re.search(r"(?:^|\.)(?:mtp|mtp_[a-z]+|nextn[a-z_]*)\.", name) is not None
