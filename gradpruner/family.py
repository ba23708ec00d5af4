"""Architectures as data: where the decoder layers live and which config fields count them.

The only module that knows an architecture. A row says what naive layer deletion gets wrong: per-layer
lists that must be sliced and counters whose meaning depends on position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradpruner.errors import ModelError
from gradpruner.registry import suggest
from gradpruner.trace import QUANTISED


@dataclass(frozen=True)
class Family:
    """How one model type keeps its decoder layers.

    Attributes:
        layers_path: Attribute path from the causal LM to the ModuleList of decoder layers; also the
            prefix of their tensors on disk.
        per_layer_lists: Config fields with one entry per layer, sliced with the kept indices where the
            config has them.
        leading_counters: Config fields that count layers from the start (`max_window_layers`: the
            layers below it use full attention); recounted over the kept ones.
    """

    layers_path: str = "model.layers"
    per_layer_lists: tuple[str, ...] = ("layer_types", "mlp_layer_types")
    leading_counters: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(leading_counters=("max_window_layers",)),
    "qwen3": Family(leading_counters=("max_window_layers",)),
    "gemma2": Family(),
    "gemma3_text": Family(),
}


def find_family(config: Any) -> Family:
    """The row for a model config.

    Raises:
        ModelError: If the model type has no row; deleting layers by guesswork silently gives wrong
            attention or re-initialised weights, so it is not tried.
    """
    model_type = getattr(config, "model_type", None) or "unknown"
    if model_type not in FAMILIES:
        raise ModelError(
            f"Model type '{model_type}' is not supported.{suggest(model_type, FAMILIES)}",
            hint=f"Supported: {', '.join(FAMILIES)}.",
        )
    return FAMILIES[model_type]


def unwrap(model: nn.Module) -> nn.Module:
    """The causal LM inside PEFT, DDP or compile wrappers."""
    inner: Any = model
    while True:
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        else:
            module: nn.Module = inner
            return module


class LayeredModel:
    """A thin view of a causal LM: ordered decoder layers and the linears in each.

    Args:
        model: Any Hugging Face causal LM of a known family, also inside PEFT, DDP or compile wrappers.

    Raises:
        ModelError: If the family is unknown or its layers are not where the family keeps them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, unwrap(model))
        self.config: Any = self.model.config
        self.family = find_family(self.config)
        *parents, self._name = self.family.layers_path.split(".")
        try:
            self._parent = self.model.get_submodule(".".join(parents))
            layers: nn.ModuleList = getattr(self._parent, self._name)
        except AttributeError as error:
            raise ModelError(
                f"No decoder layers at '{self.family.layers_path}' in {type(self.model).__name__}.",
                hint="Load the model with AutoModelForCausalLM.",
            ) from error
        if len(layers) != self.config.num_hidden_layers:
            raise ModelError(
                f"The model has {len(layers)} layers but its config says {self.config.num_hidden_layers}."
            )
        if getattr(self.config, "is_heterogeneous", False):
            raise ModelError(
                "The config overrides fields layer by layer (per_layer_config); they cannot be renumbered.",
                hint=f"Supported are uniform models: {', '.join(FAMILIES)}.",
            )

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = getattr(self._parent, self._name)
        return layers

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def linears(self, layer: int) -> dict[str, nn.Module]:
        """Path inside the layer -> linear module, for every linear of one layer.

        LoRA-wrapped linears count once, under their own path.
        """
        found: dict[str, nn.Module] = {}
        for name, module in self.layers[layer].named_modules():
            if any(name.startswith(f"{outer}.") for outer in found):
                continue
            if isinstance(module, nn.Linear) or hasattr(module, "lora_A"):
                found[name] = module
        return found

    def lora_target_pattern(self) -> str:
        """Regular expression that matches every linear of every decoder layer and nothing else."""
        names = sorted({name for i in range(self.num_layers) for name in self.linears(i)})
        inner = "|".join(name.replace(".", r"\.") for name in names)
        prefix = self.family.layers_path.replace(".", r"\.")
        return rf"(.*\.)?{prefix}\.\d+\.({inner})"

    def keep_layers(self, keep: Sequence[int]) -> None:
        """Removes all other layers: module list, every `layer_idx`, and config, always all three."""
        kept = [self.layers[i] for i in keep]
        for index, layer in enumerate(kept):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    setattr(module, "layer_idx", index)  # noqa: B010 (modules declare no such attribute)
        updates = depth_updates(self.config, keep)
        setattr(self._parent, self._name, nn.ModuleList(kept))
        for config in self._configs():
            for name, value in updates.items():
                setattr(config, name, value)
            if hasattr(config, "validate"):  # fields are checked one against another here, not on assignment
                config.validate()

    def _configs(self) -> Iterator[Any]:
        """Every config object that modules of this model hold; usually one and the same."""
        held = (getattr(module, "config", None) for module in self.model.modules())
        configs = {id(config): config for config in held if hasattr(config, "num_hidden_layers")}
        yield from configs.values()


def depth_updates(config: Any, keep: Sequence[int]) -> dict[str, Any]:
    """Config fields that change when only the layers `keep` stay, with their new values."""
    family = find_family(config)
    updates: dict[str, Any] = {"num_hidden_layers": len(keep)}
    for name in family.per_layer_lists:
        values = getattr(config, name, None)
        if values is not None:
            updates[name] = [values[i] for i in keep]
    for name in family.leading_counters:
        value = getattr(config, name, None)
        if value is not None:
            updates[name] = sum(1 for i in keep if i < value)
    return updates


def fingerprint(model: nn.Module) -> str:
    """Short identity of a model's decoder weights: '<type>-<layers>x<hidden>-<hash>'.

    Hashes shapes and 64 entries of every linear in every layer, so that a trace or plan from another
    model, or from the same architecture with other weights, is recognised without reading it all. Entries
    are rounded to bfloat16 first: a checkpoint has one fingerprint whether it is loaded in bfloat16 or
    float32, with adapters or without. Quantised weights are not what the checkpoint holds; the hash of such
    a model is 'quantised' (see `trace.same_model`).
    """
    view = LayeredModel(model)
    digest = hashlib.sha256()
    identity = f"{view.config.model_type}-{view.num_layers}x{view.config.hidden_size}"
    for index in range(view.num_layers):
        for name, module in view.linears(index).items():
            linear: Any = getattr(module, "base_layer", module)
            weight: Tensor = linear.weight
            if not weight.is_floating_point():
                return identity + QUANTISED
            digest.update(f"{index}.{name}{tuple(weight.shape)}".encode())
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).float().cpu()
            digest.update(sample.numpy().tobytes())
    return f"{identity}-{digest.hexdigest()[:12]}"
