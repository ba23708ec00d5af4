"""Checks whether a model folder can be used at all. Every command asks here before it loads anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from gradpruner.common.errors import IntegrityError, ModelError
from gradpruner.models.headers import TensorRef, check_inside
from gradpruner.models.raw_config import (
    CONFIG_FILE,
    quantised_kind,
    quantised_parts,
    read_raw_config,
    refuse_absurd_sizes,
    refuse_foreign_code,
    wants_code,
)
from gradpruner.models.shards import Shards, open_shards

ADAPTER_FILE = "adapter_config.json"
# Files beside config.json that say the weights are quantised (ModelOpt, GPTQ, AWQ).
_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# Names of tensors that only quantised weights have: GPTQ and AWQ, compressed-tensors, bitsandbytes, FP8.
_PACKED = (".qweight", ".qzeros", ".weight_packed", ".weight.absmax", ".SCB", ".weight_scale_inv")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Checks a model folder before anything is loaded and returns its raw config.

    `trust_remote_code` allows a config that needs code from its folder.

    Raises:
        ModelError: If config.json is missing or invalid, the folder holds adapters, the weights are not
            safetensors or are quantised, or the model needs remote code.
        IntegrityError: If the config has a field that makes transformers run foreign code, or sizes that no
            model has, or if weight files are damaged, missing, outside the folder or contradict each other.
    """
    config = check_config(folder, trust_remote_code)
    check_weights(folder)
    return config


def check_weights(folder: Path, shards: Shards | None = None, quantised: bool = False) -> Shards:
    """Checks a folder's weights and returns their headers; `shards` are these headers, if they were read."""
    shards = shards or open_shards(folder)
    packed = [name for name in shards.tensors if name.endswith(_PACKED)]
    if packed and not quantised:
        raise _quantised(folder, f"it has the tensor '{packed[0]}'")
    return shards


def check_config(folder: Path, trust_remote_code: bool = False, quantised: bool = False) -> dict[str, Any]:
    """Checks a folder like `check_model_folder`, except its weights, which may be missing."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise _no_config(folder)
    if (folder / ADAPTER_FILE).is_file():  # transformers would also load the adapters and the base they name
        raise _adapters(folder)
    config = read_raw_config(check_inside(folder, path))
    refuse_foreign_code(path, config)
    refuse_absurd_sizes(path, config)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ModelError(
            f"{path}: architectures is {names!r}; it must be a list of class names.",
            hint="Download config.json again.",
        )
    if wants_code(config) and not trust_remote_code:
        raise ModelError(
            f"{path} asks for remote code (auto_map): transformers itself does not know the model type "
            f"{config.get('model_type')!r}.",
            hint="If you trust the author of the model, pass --trust-remote-code.",
        )
    parts = quantised_parts(config)
    beside = next((name for name in _QUANTISATION_FILES if (folder / name).is_file()), None)
    if (parts or beside) and not quantised:
        raise _quantised(folder, quantised_kind(next(iter(parts.values()))) if parts else f"see {beside}")
    return config


def refuse_embedding_model(folder: Path) -> None:
    """Raises ModelError for a folder of sentence-transformers, even if its config names a causal LM."""
    if (folder / "modules.json").is_file() and (folder / "config_sentence_transformers.json").is_file():
        raise ModelError(
            f"{folder} is an embedding model (sentence-transformers).",
            hint="Only language models that generate text can be used: give the model it was made from.",
        )


def refuse_untied(folder: Path, ties: Mapping[str, str]) -> None:
    """Raises IntegrityError if tensors that the config ties are both stored, with different values.

    `ties` maps the name of a tied tensor to that of its source. Some checkpoints store both, and they agree.
    """
    stored = open_shards(folder).tensors if ties else {}
    for tied, source in ties.items():
        if tied not in stored or source not in stored or stored[tied].dtype != stored[source].dtype:
            continue
        if not torch.equal(*(_raw(stored[name]) for name in (tied, source))):
            raise IntegrityError(
                f"{folder} stores '{tied}' and '{source}' with different values, but its config "
                "says that they are one tensor (tie_word_embeddings: true).",
                hint=f'If both are meant, set "tie_word_embeddings": false in {folder / CONFIG_FILE}; '
                f"otherwise save the model again without '{tied}'.",
            )


def _raw(ref: TensorRef) -> torch.Tensor:
    """The bytes of a tensor on disk, mapped and not copied."""
    with safe_open(ref.file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(ref.name)
    return tensor.reshape(-1).view(torch.uint8)


def is_quantised(folder: Path, config: dict[str, Any], tensors: Iterable[str]) -> bool:
    """Whether a model's weights are quantised, judging by its config, a file beside it, or its tensors."""
    beside = any((folder / name).is_file() for name in _QUANTISATION_FILES)
    return bool(quantised_parts(config)) or beside or any(name.endswith(_PACKED) for name in tensors)


def is_model_folder(path: str | Path) -> bool:
    """Whether a folder looks like a model, usable or not: it holds a config, adapters or weights."""
    folder = Path(path).expanduser()
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return any(name in (CONFIG_FILE, ADAPTER_FILE) or name.endswith(_WEIGHT_SUFFIXES) for name in names)


def _quantised(folder: Path, how: str) -> ModelError:
    return ModelError(
        f"{folder} is quantised ({how}); merging and fine-tuning need unquantised weights.",
        hint="Use the unquantised model; with adapter: qlora it is quantised on the fly for recording.",
    )


def _no_config(folder: Path) -> ModelError:
    """Returns the error that says why a folder without config.json is no model folder, and what to do."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if ADAPTER_FILE in names:
        return _adapters(folder)
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return ModelError(
            f"{folder} holds a model for llama.cpp ({gguf[0]}) and no config.json; GGUF cannot be pruned.",
            hint="Use the Hugging Face folder the file was made from; `gradpruner export` makes a GGUF file "
            "from the pruned model.",
        )
    return ModelError(f"{folder} has no config.json.", hint="Give the folder of a Hugging Face model.")


def _adapters(folder: Path) -> ModelError:
    """Returns the error for a folder that holds adapters, alone or beside weights."""
    try:
        named = read_raw_config(folder / ADAPTER_FILE).get("base_model_name_or_path")
    except ModelError:
        named = None
    of = f" for {named!a}" if isinstance(named, str) and named else ""
    whole = any(
        path.name.endswith(".safetensors") and not path.name.startswith("adapter")
        for path in folder.iterdir()
    )
    if whole:
        return ModelError(
            f"{folder} holds adapters{of} beside its weights.",
            hint=f"Merge them into the weights, or move {ADAPTER_FILE} out of the folder.",
        )
    return ModelError(
        f"{folder} holds a PEFT adapter{of}, not a model.",
        hint="Merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()"
        ".save_pretrained(new_folder), copy the tokenizer files beside it, and give new_folder.",
    )
