"""Loads configs, tokenizers and models from folders, after checking the folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, ModelError
from gradpruner.common.registry import suggest
from gradpruner.models.checking import (
    check_config,
    check_model_folder,
    check_weights,
    refuse_embedding_model,
    refuse_untied,
)
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import parts_of, text_config
from gradpruner.models.dtypes import majority_dtype, refuse_non_finite
from gradpruner.models.families import FAMILIES
from gradpruner.models.folder import PRUNING_FILE, read_pruning
from gradpruner.models.narrowing import resized_class
from gradpruner.models.raw_config import BEYOND_SIGNS, CONFIG_FILE, beyond_fields, is_beyond, read_raw_config
from gradpruner.models.shards import Shards
from gradpruner.plans.width_plan import WidthPlan


def load_config(
    folder: Path,
    trust_remote_code: bool = False,
    *,
    native: bool = False,
    weights: bool = True,
    shards: Shards | None = None,
) -> Any:
    """Checks a model folder and returns its transformers config.

    Args:
        folder: The model folder.
        trust_remote_code: Run config code that comes with the folder.
        native: Allow quantised weights, and code that comes with the folder but is not run because
            transformers knows the model type. For callers that read tensors and build no model.
        weights: The folder must hold weights, which are checked too; otherwise its config.json is enough.
        shards: Its tensors, if they have been read.
    """
    check_config(folder, trust_remote_code or native, quantised=native)
    if weights:
        shards = check_weights(folder, shards, quantised=native)
    refuse_embedding_model(folder)
    config = _read_config(folder, trust_remote_code)
    if not trust_remote_code:
        model_class(config)
    if shards is not None and (stored := majority_dtype(shards)) is not None:
        for part in (config, text_config(config)):
            part.dtype = stored
    return config


def check_loadable(folder: Path, trust_remote_code: bool = False) -> tuple[Any, nn.Module | None]:
    """Checks that `load_model` will load a model folder, without reading any weight.

    With `trust_remote_code`, names and shapes of the weights are checked only when they are loaded.

    Returns:
        The config, and the model without weights; None with `trust_remote_code`.

    Raises:
        ModelError: If the model cannot be used (see `load_config`).
        IntegrityError: If tensors are missing, left over, or of another shape than the config says.
    """
    config = load_config(folder, trust_remote_code)
    return config, None if trust_remote_code else load_structure(folder, config)


def _read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns a folder's config as transformers reads it, without settings for its author's machine.

    A flash attention that the config names is removed, because transformers would fetch it as a kernel from
    the hub if it is not installed; the caller chooses how attention is computed. An empty or null
    `quantization_config` is removed too, because it means that nothing is quantised.

    Raises:
        ModelError: If transformers rejects the config.
    """
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # strict config classes raise their own types
        kind = read_raw_config(folder / CONFIG_FILE).get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
            raise ModelError(
                f"{folder / 'config.json'}: transformers {transformers.__version__} knows no model type "
                f"{kind!r}.{suggest(str(kind), FAMILIES)}",
                hint="Upgrade transformers if the model is newer than it; `gradpruner ls families` lists "
                "the model types that are known to work.",
            ) from error
        raise ModelError(f"transformers rejects {folder / 'config.json'}: {error}") from error
    if isinstance(text_config(config), dict):
        raise ModelError(
            f"{folder / 'config.json'} holds a text_config that models of type '{config.model_type}' do "
            "not have.",
            hint="Does this config.json belong to the model? Download it again.",
        )
    for part in parts_of(config):
        if str(getattr(part, "_attn_implementation", None)).removeprefix("paged|").startswith("flash"):
            part._attn_implementation = None
        if not getattr(part, "quantization_config", True):
            del part.quantization_config
    return config


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Returns the tokenizer of a model folder.

    Raises:
        ModelError: If the folder has no tokenizer that loads.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"No usable tokenizer in {folder}: {str(error).splitlines()[0]}",
            hint="Put a tokenizer.json (or tokenizer.model) beside config.json.",
        ) from error


def load_structure(folder: Path, config: Any = None) -> nn.Module:
    """Returns the model of a checked folder without weights, after checking its parameters by the files.

    transformers itself matches the names, including conversions between the stored and the computed form,
    which it calls loading. Only tied tensors that are stored twice are read.

    Raises:
        ModelError: If transformers cannot load the folder.
        IntegrityError: If tensors are missing, left over, or of another shape than the config says, or if
            the config ties tensors that are stored with different values.
    """
    check_config(folder, trust_remote_code=True)
    config = _read_config(folder)
    options = {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            model, report = _class_for(folder, config).from_pretrained(folder, config=config, **options)
    except GradPrunerError:
        raise
    except Exception as error:  # conversions raise types of their own
        raise IntegrityError(
            f"{folder}: the weights do not fit its config: {type(error).__name__}: {str(error).strip()}"
        ) from error
    _refuse_gaps(folder, report, model.config)
    refuse_untied(folder, model.all_tied_weights_keys)
    module: nn.Module = model.eval()
    return module


@contextmanager
def quietly() -> Iterator[None]:
    """Inside the block, transformers shows no bar and warns of nothing: what it finds is in its report."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    if bars:
        theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _class_for(folder: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """Returns the class that loads a folder; if its layers have different widths, one with such layers."""
    from transformers import AutoModelForCausalLM

    plan = narrowed_plan(folder)
    if plan is not None:
        return resized_class(model_class(config), plan)
    return AutoModelForCausalLM if trust_remote_code else model_class(config)


# Entry in the loading report of transformers -> hint on what may have happened.
_GAPS = {
    "missing_keys": "Is the download complete? A file of weights may be missing.",
    "unexpected_keys": "Does its config.json belong to these weights? It describes less than they hold.",
    "mismatched_keys": "Does its config.json belong to these weights?",
}


def _refuse_gaps(folder: Path, report: Any, config: Any) -> None:
    """Raises IntegrityError if transformers would fill missing weights with random numbers or leave some out.

    Layers behind the last one, which predict several tokens, are left out on purpose.
    """
    text = text_config(config)
    counted = beyond_fields(text) or beyond_fields(config)
    for what, hint in _GAPS.items():
        names = sorted(map(_key_name, report.get(what, ())))
        if what == "unexpected_keys" and (counted or any(name.endswith(BEYOND_SIGNS) for name in names)):
            names = [name for name in names if not is_beyond(name, text.num_hidden_layers)]
        if names:
            raise IntegrityError(
                f"{folder}: {len(names)} {what.replace('_', ' ')} compared with its config, for example "
                f"{', '.join(names[:3])}.",
                hint=hint,
            )


def _key_name(entry: Any) -> str:
    """Returns the name of a tensor in a loading report, with both shapes if they differ."""
    if isinstance(entry, tuple) and len(entry) == 3:
        name, stored, wanted = entry
        return f"{name} ({tuple(stored)} in the file, {tuple(wanted)} by the config)"
    return str(entry)


def narrowed_plan(folder: Path) -> WidthPlan | None:
    """Returns the plan of a folder whose layers have different widths, which no config can state; else None.

    Raises:
        PlanError: If `pruning.json` holds a width plan that cannot be read.
        IntegrityError: If it is not a JSON object.
    """
    plan = read_pruning(folder).get("plan")
    if not isinstance(plan, dict) or plan.get("kind") != "width":
        return None
    read = WidthPlan.from_dict(plan, str(folder / PRUNING_FILE))
    return None if read.uniform else read


def refuse_narrowed(folder: Path) -> None:
    """Raises ModelError if the layers of a folder have different widths, because its config states one."""
    if narrowed_plan(folder) is not None:
        raise ModelError(
            f"The layers of {folder} have different widths, which its config does not say.",
            hint="It can be loaded (`gradpruner.load_model`), trained and evaluated (`gradpruner evaluate`), "
            "but not pruned or sized again; start from the model before pruning.",
        )


def load_model(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    native: bool = False,
    quantise: bool = False,
) -> nn.Module:
    """Checks a folder and loads its causal LM, in evaluation mode, on the device.

    It also loads a model whose layers have different widths (listed in `pruning.json`), which plain
    transformers refuses.

    Args:
        folder: The model folder.
        dtype: A torch dtype, its name, or "auto": bfloat16 on CUDA devices that support it, else float32.
        device: "auto" (an accelerator if there is one) or a torch device.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None leaves it to transformers.
        trust_remote_code: Run model code that comes with the folder.
        native: Ignore model code that comes with the folder instead of refusing the model.
        quantise: Load in 4 bits with bitsandbytes as in the QLoRA paper: NF4, with quantised scales,
            computing in `dtype`.

    Raises:
        ModelError: If the model cannot be used or does not load.
        IntegrityError: If weights are missing, left over or of the wrong shape (transformers would fill
            missing weights with random numbers and only warn), or if one is NaN or Inf. One that no row uses,
            such as that of a rare token, would else be found hours later, when the trained model is saved.
    """
    from transformers import BitsAndBytesConfig

    if quantise:
        check_bitsandbytes("quantise=True")
    folder = Path(folder)
    check_model_folder(folder, trust_remote_code or native)
    config = _read_config(folder, trust_remote_code)
    target = resolve_device(device)
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype, target),
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported below, by name
    }
    if quantise:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
        # Without a device map, transformers silently uses the GPU even if the CPU is asked for.
        options["device_map"] = {"": "cpu"} if target.type == "cpu" else None
    try:
        with quietly():
            of = _class_for(folder, config, trust_remote_code)
            model, report = of.from_pretrained(folder, config=config, **options)
    except GradPrunerError:
        raise
    except Exception as error:
        raise ModelError(f"{folder} does not load: {type(error).__name__}: {str(error).strip()}") from error
    _refuse_gaps(folder, report, model.config)
    refuse_non_finite(model, folder)
    if quantise:
        for part in model.modules():
            # On some CPUs, bitsandbytes 0.50 rearranges the weights in the first pass in evaluation mode (the
            # check of packed rows is one), and from then on gradients through them are wrong.
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = False
    else:
        model = model.to(target)
    module: nn.Module = model.eval()
    return module


def check_bitsandbytes(what: str) -> None:
    """Raises ConfigError if bitsandbytes, which `what` needs, is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{what} needs bitsandbytes, which is not installed.", hint="pip install 'gradpruner[quant]'"
        )


def load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    """Returns the model with the adapters of a folder merged into it.

    Raises:
        ModelError: If the folder holds no adapters for this model.
    """
    from peft import PeftModel

    try:
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # wrong shapes, names or files: errors of many types
        raise ModelError(f"The adapters in {folder} do not fit the model: {error}") from error
    merged: nn.Module = adapted.merge_and_unload().eval()
    return merged


def resolve_device(device: str) -> torch.device:
    """Returns the device of this name; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ConfigError: If torch does not know the device or does not find it.
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


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the dtype of this name; "auto" is bfloat16 on CUDA devices that support it, else float32."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ConfigError(f"Unknown dtype '{dtype}'; float32, bfloat16 or float16 is needed.")
        return named
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32
