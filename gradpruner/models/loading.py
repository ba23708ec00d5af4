"""Models from folders and back: loading what has been checked, saving all of it or nothing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, ModelError
from gradpruner.common.registry import suggest
from gradpruner.models.checking import check_config, check_model_folder, refuse_embedding_model
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import parts_of, text_config
from gradpruner.models.dtypes import majority_dtype
from gradpruner.models.families import FAMILIES
from gradpruner.models.folder import PRUNING_FILE, read_pruning
from gradpruner.models.narrowing import resized_class
from gradpruner.models.raw_config import BEYOND_SIGNS, CONFIG_FILE, beyond_fields, is_beyond, read_raw_config
from gradpruner.plans.width_plan import WidthPlan


def load_config(
    folder: Path, trust_remote_code: bool = False, *, native: bool = False, weights: bool = True
) -> Any:
    """The transformers config of a checked model folder.

    Args:
        folder: The model folder.
        trust_remote_code: Run config code that comes with the folder.
        native: The caller reads tensors, not a model: quantised weights, and code that comes with the folder
            but is not run because transformers knows the model type, are no obstacle.
        weights: The folder must hold weights, and they are checked; else its config.json is enough.
    """
    check = check_model_folder if weights else check_config
    check(folder, trust_remote_code or native, quantised=native)
    refuse_embedding_model(folder)
    config = _read_config(folder, trust_remote_code)
    if not trust_remote_code:
        model_class(config)
    if weights and (stored := majority_dtype(folder)) is not None:
        for part in (config, text_config(config)):
            part.dtype = stored
    return config


def check_loadable(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of a model folder that `load_model` will load: everything it checks, but no weight is read.

    With `trust_remote_code`, names and shapes of the weights are checked only when they are loaded.

    Raises:
        ModelError: If it is not a model that can be used, as `load_config` says.
        IntegrityError: If tensors are missing, left over, or of another shape than the config says.
    """
    config = load_config(folder, trust_remote_code)
    if not trust_remote_code:
        load_structure(folder)
    return config


def _read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The config of a folder as transformers reads it, without what only its author's machine needed.

    How attention is computed is for the caller to choose: a flash attention that the config names would be
    fetched as a kernel from the hub where it is not installed. A `quantization_config` that is null or empty
    says that nothing is quantised.

    Raises:
        ModelError: If transformers rejects it.
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
                "what is known to work.",
            ) from error
        raise ModelError(f"transformers rejects {folder / 'config.json'}: {error}") from error
    if isinstance(text_config(config), dict):
        raise ModelError(
            f"{folder / 'config.json'} holds a text_config that models of type '{config.model_type}' do "
            "not have.",
            hint="Does this config.json belong to the model? Take it from where the weights came from.",
        )
    for part in parts_of(config):
        if str(getattr(part, "_attn_implementation", None)).removeprefix("paged|").startswith("flash"):
            part._attn_implementation = None
        if not getattr(part, "quantization_config", True):
            del part.quantization_config
    return config


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


def load_structure(folder: Path) -> nn.Module:
    """The model of a checked folder without its weights, its parameters checked against the files.

    transformers itself matches the names, conversions between stored and computed forms included; no tensor
    is read.

    Raises:
        ModelError: If transformers cannot load the folder.
        IntegrityError: If tensors are missing, left over, or of another shape than the config says.
    """
    check_config(folder, trust_remote_code=True)
    config = _read_config(folder)
    try:
        model, report = _class_for(folder, config).from_pretrained(
            folder, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except GradPrunerError:
        raise
    except Exception as error:  # conversions raise types of their own
        raise IntegrityError(
            f"{folder}: the weights do not fit its config: {type(error).__name__}: {str(error).strip()}"
        ) from error
    _refuse_gaps(folder, report, model.config)
    module: nn.Module = model.eval()
    return module


def _class_for(folder: Path, config: Any, trust_remote_code: bool = False) -> Any:
    """What loads a folder: the class its config names, with layers of its widths where they differ."""
    from transformers import AutoModelForCausalLM

    plan = narrowed_plan(folder)
    if plan is not None:
        return resized_class(model_class(config), plan)
    return AutoModelForCausalLM if trust_remote_code else model_class(config)


# What transformers reports -> what may have happened.
_GAPS = {
    "missing_keys": "Is the download complete? A file of weights may not have come along.",
    "unexpected_keys": "Does its config.json belong to these weights? It describes less than they hold.",
    "mismatched_keys": "Does its config.json belong to these weights?",
}


def _refuse_gaps(folder: Path, report: Any, config: Any) -> None:
    """IntegrityError when transformers would fill gaps with random numbers, or leave tensors out.

    Layers behind the last one, for predicting several tokens, are left out on purpose.
    """
    text = text_config(config)
    counted = beyond_fields(text) or beyond_fields(config)
    for what, hint in _GAPS.items():
        names = sorted(map(_key_name, report.get(what, ())))
        if what == "unexpected_keys":
            signs = any(name.endswith(BEYOND_SIGNS) for name in names)
            if counted or signs:
                names = [name for name in names if not is_beyond(name, text.num_hidden_layers)]
        if names:
            raise IntegrityError(
                f"{folder}: {len(names)} {what.replace('_', ' ')} against its config, such as "
                f"{', '.join(names[:3])}.",
                hint=hint,
            )


def _key_name(entry: Any) -> str:
    """The name of a tensor in a loading report, with both shapes if these are what is wrong."""
    if isinstance(entry, tuple) and len(entry) == 3:
        name, stored, wanted = entry
        return f"{name} ({tuple(stored)} in the file, {tuple(wanted)} by the config)"
    return str(entry)


def narrowed_plan(folder: Path) -> WidthPlan | None:
    """The plan of a folder whose layers have different widths, which no config can say; None for others.

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
    """Raises ModelError for a folder whose layers have different widths: sizes are read from its config."""
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
    """Loads a causal LM from a checked folder, in evaluation mode, on the device.

    Also one whose layers have different widths (`pruning.json` says which), which plain transformers refuses.

    Args:
        folder: The model folder.
        dtype: torch's, its name, or "auto": bfloat16 on accelerators that have it,
            float32 elsewhere.
        device: "auto" (an accelerator when there is one) or a torch device.
        attn_implementation: "sdpa", "eager", "flash_attention_2"; None leaves it to transformers.
        trust_remote_code: Run model code that comes with the folder.
        native: Ignore model code that comes with the folder instead of refusing it.
        quantise: Load in 4 bits for QLoRA, as its paper does: NF4, the scales quantised too, computing in
            `dtype` (bitsandbytes).

    Raises:
        ModelError: If weights are missing, unexpected or of the wrong shape: transformers would fill
            the gaps with random numbers and only warn.
    """
    from transformers import BitsAndBytesConfig

    if quantise:
        check_bitsandbytes("quantise=True")
    folder = Path(folder)
    check_model_folder(folder, trust_remote_code or native)
    config = _read_config(folder, trust_remote_code)
    target = resolve_device(device)
    options: dict[str, Any] = {}
    if quantise:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=resolve_dtype(dtype, target),
        )
        # transformers would silently take the GPU, even where the CPU is asked for.
        options["device_map"] = {"": "cpu"} if target.type == "cpu" else None
    try:
        model, report = _class_for(folder, config, trust_remote_code).from_pretrained(
            folder,
            config=config,
            dtype=resolve_dtype(dtype, target),
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    except GradPrunerError:
        raise
    except Exception as error:
        raise ModelError(f"{folder} does not load: {type(error).__name__}: {str(error).strip()}") from error
    _refuse_gaps(folder, report, model.config)
    if quantise:
        for part in model.modules():
            # On some CPUs bitsandbytes 0.50 lays weights out anew at the first pass in evaluation mode, as in
            # the trial of packed rows; gradients through them are wrong from then on.
            if hasattr(part, "support_avx512bf16_for_cpu"):
                part.support_avx512bf16_for_cpu = False
    else:
        model = model.to(target)
    module: nn.Module = model.eval()
    return module


def check_bitsandbytes(what: str) -> None:
    """Raises ConfigError where bitsandbytes is not installed, which `what` needs."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{what} needs bitsandbytes, which is not installed.", hint="pip install 'gradpruner[quant]'"
        )


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


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Turns a name into a dtype; "auto" is bfloat16 on CUDA devices that have it, else float32."""
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
