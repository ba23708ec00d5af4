"""Reading and writing model folders: what may be loaded, and what we leave behind."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner._version import __version__
from gradpruner.errors import ConfigError, IntegrityError, ModelError
from gradpruner.family import find_family
from gradpruner.files import (
    is_write_failure,
    make_durable,
    sync_folder,
    write_failure,
    write_json,
    write_text,
)
from gradpruner.plan import PruningPlan, runs_of

PRUNING_FILE = "pruning.json"
# Fields that make transformers fetch and run code (CVE-2026-4372 and its sibling).
_CODE_FIELDS = ("_attn_implementation_internal", "_experts_implementation_internal")
# Everything a model folder needs besides weights; weights are asked for by pattern.
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
ADAPTER_FILE = "adapter_config.json"
# The lock that a run directory holds while its first file is not yet written.
LOCK_FILE = ".lock"


def locate_model(model: str | Path) -> Path:
    """The local folder of a model given as a folder or a hub id.

    Raises:
        ModelError: If it is neither a folder nor to be had from the hub; the message lists what was tried.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    name = str(model)
    if folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise ModelError(
            f"There is no model folder at {folder}.",
            hint="Give a folder with config.json and *.safetensors, or a hub id such as org/name.",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, unknown, gated: many types, one meaning here
        raise ModelError(
            f"'{name}' is neither a folder ({folder.resolve()}) nor a model the hub could give: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            hint="Check the name, the network, HF_HUB_OFFLINE and, for gated models, your token.",
        ) from error


def check_model_folder(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Looks at a model folder before anything is loaded; returns its raw config.

    Raises:
        ModelError: If config.json is missing or invalid, weights are not safetensors, the checkpoint
            is quantised, wants remote code, or its family is unknown.
        IntegrityError: If the config carries a field that makes transformers run foreign code, or the
            weight index names shards that are missing or outside the folder.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        raise ModelError(
            f"{folder} has no config.json.", hint="Give the folder of a Hugging Face model."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    for key in config:
        if key.startswith(_CODE_FIELDS):
            raise IntegrityError(
                f"{path} sets '{key}', which makes transformers fetch and run code.",
                hint="No genuine checkpoint needs it: remove the field, or do not use this model.",
            )
    if "auto_map" in config and not trust_remote_code:
        raise ModelError(
            f"{path} asks for remote code (auto_map).",
            hint="If you trust its author, pass --trust-remote-code.",
        )
    if "quantization_config" in config:
        section = config["quantization_config"]
        kind = section.get("quant_method", "unknown") if isinstance(section, dict) else "unknown"
        raise ModelError(
            f"{folder} is quantised ({kind}); merging and fine-tuning need the real weights.",
            hint="Use the unquantised model; adapter: qlora quantises it on the fly for recording.",
        )
    _check_weights(folder)
    find_family(_Raw(config))
    return config


class _Raw:
    def __init__(self, config: dict[str, Any]) -> None:
        self.model_type = config.get("model_type")


def _check_weights(folder: Path) -> None:
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index)
    if any(folder.glob("*.safetensors")):
        return
    others = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5"))
    if others:
        raise ModelError(
            f"{folder} holds its weights as {', '.join(others[:3])}; only safetensors are read, because "
            "pickled files can run code and gguf is a one-way format.",
            hint="Convert once, where you trust the file: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder).",
        )
    raise ModelError(f"{folder} has no *.safetensors weights.", hint="Is the download complete?")


def _check_index(index: Path) -> None:
    """Refuses shards outside the folder, which transformers would load, and shards that are missing."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index} is not a weight index: {error!r}.") from error
    for shard in sorted(map(str, shards)):
        if Path(shard).name != shard:
            raise IntegrityError(f"{index} names the shard '{shard}', which is outside the model folder.")
        if not (index.parent / shard).exists():
            raise IntegrityError(
                f"{index} names {shard}, which is missing.", hint="Is the download complete?"
            )


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checked model folder."""
    from transformers import AutoConfig

    check_model_folder(folder, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # strict config classes raise their own types
        raise ModelError(f"transformers rejects {folder / 'config.json'}: {error}") from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: If there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"No usable tokenizer in {folder}: {str(error).splitlines()[0]}",
            hint="A tokenizer.json (or tokenizer.model) must stand beside config.json.",
        ) from error


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantise: bool = False,
) -> nn.Module:
    """Loads a causal LM from a checked folder, in evaluation mode, on the device.

    Args:
        folder: The model folder.
        dtype: "float32", "bfloat16", "float16", or "auto": bfloat16 on accelerators that have it,
            float32 elsewhere.
        device: "auto" (an accelerator when there is one) or a torch device.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None leaves it to transformers.
        trust_remote_code: Run model code that comes with the folder.
        quantise: Load in 4 bit (bitsandbytes), for QLoRA recording.

    Raises:
        ModelError: If weights are missing, unexpected or of the wrong shape: transformers would fill
            the gaps with random numbers and only warn.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    check_model_folder(folder, trust_remote_code)
    target = resolve_device(device)
    options: dict[str, Any] = {}
    if quantise:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=resolve_dtype(dtype, target),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except Exception as error:
        raise ModelError(f"{folder} does not load: {type(error).__name__}: {str(error).strip()}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(what, ())))
        if names:
            raise IntegrityError(
                f"{folder}: {len(names)} {what.replace('_', ' ')} against its config, such as "
                f"{', '.join(names[:3])}.",
                hint="The weights do not belong to this config.json.",
            )
    if not quantise:
        model = model.to(target)
    module: nn.Module = model.eval()
    return module


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of a folder merged in.

    Raises:
        ModelError: If the folder holds no adapters for this model.
    """
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # shapes, names, safetensors: many types, one meaning here
        raise ModelError(f"The adapters in {folder} do not fit the model: {error}") from error
    merged: nn.Module = adapted.merge_and_unload().eval()
    return merged


def resolve_device(device: str) -> torch.device:
    """Turns "auto" into the accelerator when there is one, else the CPU.

    Raises:
        ConfigError: If torch does not know the device or it is not there.
    """
    if device != "auto":
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise ConfigError(f"Unknown device '{device}'.", hint="Use auto, cpu or cuda.") from None
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise ConfigError(f"device is '{device}' but torch sees no CUDA device.", hint="Use auto or cpu.")
        return chosen
    if torch.accelerator.is_available():
        current = torch.accelerator.current_accelerator()
        assert current is not None
        return current
    return torch.device("cpu")


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turns "auto" into bfloat16 on CUDA devices that have it, else float32."""
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ConfigError(f"Unknown dtype '{dtype}'; float32, bfloat16 or float16 is needed.")
        return named
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype a checkpoint is stored in, from its config (float32 when it does not say)."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = getattr(torch, str(raw.get("dtype") or raw.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else torch.float32


def check_output(folder: Path, *, inputs: tuple[Path, ...] = (), marker: str) -> None:
    """Refuses an output folder that holds something we did not put there.

    Args:
        folder: Where output is to go.
        inputs: Folders that must not be written to or into.
        marker: The file that shows a folder is ours.

    Raises:
        ConfigError: If the folder is not empty and not ours, is an input, or lies inside one.
    """
    resolved = folder.resolve()
    for source in inputs:
        if resolved == source.resolve() or source.resolve() in resolved.parents:
            raise ConfigError(
                f"The output {folder} is the input {source} or lies inside it.",
                hint="Choose another --out.",
            )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"The output {folder} is a file.", hint="Choose another --out.")
    entries = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    if entries - {LOCK_FILE} and marker not in entries:
        raise ConfigError(
            f"The output folder {folder} is not empty and was not made by gradpruner.",
            hint="Nothing is ever overwritten: choose another --out, or empty it yourself.",
        )


def save_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    plan: PruningPlan | None,
    source: str,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Writes a model folder that plain transformers loads: all of it, or nothing.

    Weights, config, tokenizer, chat template, `pruning.json` and a model card are written to a staged
    folder beside the target, made durable, and renamed. `dtype` is that of the source checkpoint.

    Args:
        model: The causal LM (its weights are cast in place).
        tokenizer: Saved beside it.
        folder: The target; replaced if it is ours.
        dtype: Stored dtype.
        plan: What was pruned; None for a dense model.
        source: Where the model came from, for the card.
        facts: Further lines for `pruning.json`.

    Raises:
        ConfigError: If the target holds something that is not ours.
        ResourceError: If the disk is full; the staged folder is removed, the old one untouched.
    """
    check_output(folder, marker=PRUNING_FILE)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        model = model.to(dtype)
        model.config.dtype = dtype
        model.config.use_cache = True  # gradient checkpointing turns it off
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        kind = "adapter" if hasattr(model, "peft_config") else "model"
        write_json(
            staged / PRUNING_FILE,
            {
                "gradpruner_version": __version__,
                "source": source,
                "kind": kind,
                "plan": plan.to_dict() if plan else None,
                **(facts or {}),
            },
        )
        write_text(staged / "README.md", _model_card(plan, source))
        for path in staged.rglob("*"):
            if path.is_file():
                make_durable(path)
        sync_folder(staged)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(staged, folder)
        sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if is_write_failure(error):
            raise write_failure(folder, error) from error
        raise
    return folder


def _model_card(plan: PruningPlan | None, source: str) -> str:
    lines = [
        "---",
        "library_name: transformers",
        "tags: [gradpruner, pruning]",
        f"base_model: {json.dumps(source)}",
        "---",
        "",
        f"# {Path(source).name}, {'depth-pruned' if plan else 'fine-tuned'} with GradPruner",
        "",
    ]
    if plan is None:
        return "\n".join([*lines, "All layers are kept.", ""])
    lines += [
        f"{len(plan.pruned)} of {plan.num_layers} decoder layers are gone: {runs_of(plan.pruned)}.",
        f"Method: {plan.method}. Kept: {runs_of(plan.keep)}.",
    ]
    for target, layers in plan.merged.items():
        lines.append(
            f"Layers {runs_of(layers)} were merged into layer {target} "
            f"(rule {plan.rule}, density {plan.density:g})."
        )
    lines += [
        "",
        "It loads with `AutoModelForCausalLM.from_pretrained`, without custom code. `pruning.json` holds",
        "the complete plan. Depth pruning keeps classification and short answers well; multi-step",
        "reasoning suffers far more, and fine-tuning does not bring all of it back.",
        "",
    ]
    return "\n".join(lines)
