"""LayeredModel: a thin view of the decoder layers of a causal LM and the linears in each."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.gradients.trace import QUANTISED
from gradpruner.models.config_patch import check_keep, patch_config, text_config
from gradpruner.models.families import Family, find_family, generic_family, nested_family
from gradpruner.models.restoring import forwards_set
from gradpruner.plans.layer_plan import PruningPlan

# Set by whoever loaded the model and independent of its depth; a rebuilt config must keep them.
_CHOSEN = (
    "_attn_implementation_internal",
    "_experts_implementation_internal",
    "_name_or_path",
    "_commit_hash",
)
_PLAIN_VALUES = (bool, int, float, str, type(None))


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the causal LM inside PEFT, DDP or compile wrappers."""
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


def refuse_adapters(model: nn.Module, why: str) -> None:
    """Raises PlanError if a model carries adapters."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise PlanError(
            f"The model carries adapters; {why}.",
            hint="Call unload() first, which removes them. merge_and_unload() changes the model: what was "
            "planned, recorded or fitted before no longer fits it.",
        )


def skeleton(model_class: Any, config: Any) -> nn.Module:
    """Builds a model with shapes but no values, on torch's meta device; takes a second at any size."""
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(copy.deepcopy(config))
    return model


class LayeredModel:
    """A thin view of the decoder layers of a causal LM, in order, and the linears in each.

    Args:
        model: Any Hugging Face causal LM; PEFT, DDP and compile wrappers are removed.

    Raises:
        ModelError: If its decoder layers cannot be found.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Any, unwrap(model))
        self.config: Any = text_config(self.model.config)
        self.family = self._find_family()
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

    def _find_family(self) -> Family:
        """Returns the row of the decoder's type; in a larger model, with the path of the layers there."""
        whole = self.model.config
        row = find_family(self.config)
        if row is not None and whole is self.config:
            return row
        parts = [name for name, value in vars(whole).items() if value is self.config]
        path = self._layers_path()
        if whole is self.config:
            return replace(generic_family(self.config), layers_path=path)
        if not parts:
            raise ModelError(
                f"The decoder's config is not a direct part of the config of a '{whole.model_type}' model.",
                hint="Prune the language model on its own.",
            )
        return nested_family(row or generic_family(self.config), path, parts[0])

    def _layers_path(self) -> str:
        """Returns the path of the list with as many layers as the decoder, not in vision or audio towers."""
        depth = getattr(self.config, "num_hidden_layers", None)
        modules: list[tuple[str, nn.Module]] = list(self.model.named_modules())
        lists = [name for name, m in modules if isinstance(m, nn.ModuleList) and len(m) == depth]
        found = [name for name in lists if "language_model." in name] or lists
        if len(found) != 1 or not depth:
            lists_found = f"the model has {len(found)} lists of {depth} layers"
            what = lists_found if depth else "the config has no num_hidden_layers"
            raise ModelError(
                f"The decoder layers of a '{self.model.config.model_type}' model were not found: {what}.",
                hint="Add a row to gradpruner/models/families.py that says where they are.",
            )
        return found[0]

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
        """Returns path inside the layer -> linear module, for every linear of one layer.

        A LoRA-wrapped linear counts once, under its own path.
        """
        found: dict[str, nn.Module] = {}
        for name, module in self.layers[layer].named_modules():
            if any(name.startswith(f"{outer}.") for outer in found):
                continue
            if isinstance(module, nn.Linear | Conv1D) or hasattr(module, "lora_A"):
                found[name] = module
        return found

    def weights(self, layer: int) -> dict[str, Tensor]:
        """Returns path inside the layer -> weight, shape (out_features, in_features), for its linears.

        GPT-2 keeps its weights transposed; for it, transposed views are returned.
        """
        found: dict[str, Tensor] = {}
        for name, module in self.linears(layer).items():
            assert isinstance(module.weight, Tensor)
            found[name] = module.weight.T if isinstance(module, Conv1D) else module.weight
        return found

    def weight(self, layer: int, name: str) -> Tensor | None:
        """Returns the weight of a linear, (out_features, in_features), or norm, (features,), of a layer.

        Returns None if there is no such layer or module.
        """
        if not 0 <= layer < self.num_layers:
            return None
        linears = self.weights(layer)
        if name in linears:
            return linears[name]
        try:
            weight = getattr(self.layers[layer].get_submodule(name), "weight", None)
        except AttributeError:
            return None
        return weight if isinstance(weight, Tensor) and weight.ndim == 1 else None

    def lora_target_pattern(self, only: Sequence[str] = ()) -> str:
        """Returns a regular expression that matches the linears of all decoder layers and nothing else.

        Args:
            only: Last parts of the paths of the linears to match; empty for all.
        """
        names = sorted({name for i in range(self.num_layers) for name in self.linears(i)})
        names = [name for name in names if not only or name.rpartition(".")[2] in only]
        inner = "|".join(name.replace(".", r"\.") for name in names)
        prefix = self.family.layers_path.replace(".", r"\.")
        return rf"(.*\.)?{prefix}\.\d+\.({inner})"

    def wide_tensors(self) -> dict[str, int]:
        """Returns name -> axis of the tensors outside the layers that hold one slice per layer."""
        parent = self.family.layers_path.rpartition(".")[0]
        present = {name for name, _ in self.model.named_parameters()}
        full = {f"{parent}.{name}": axis for name, axis in self.family.wide_tensors.items()}
        return {name: axis for name, axis in full.items() if name in present}

    @contextmanager
    def passed_through(self, layers: Sequence[int]) -> Iterator[None]:
        """Inside the block, these layers return their input, as if they were pruned."""
        modules = [self.layers[i] for i in layers]
        with forwards_set(modules, [returning_input(module.forward) for module in modules]):
            yield

    def keep_layers(self, plan: PruningPlan) -> None:
        """Removes all layers that a plan does not keep, from the modules, their numbering and the config.

        A skeleton built from the new config, without weights, decides what the model becomes. The kept layers
        must have the same parameters as the skeleton, by name and shape. They take over from it every plain
        attribute that depends on depth (`layer_idx`, the kind of attention, which layers share keys).

        Raises:
            ModelError: If the config cannot describe the kept layers; the model is then unchanged.
        """
        check_keep(self.config, self.family, plan)
        whole = self.model.config
        old = skeleton(type(self.model), whole)
        config = type(whole).from_dict(patch_config(whole.to_dict(), whole, self.family, plan.keep))
        new = skeleton(type(self.model), config)
        self._check_same_parameters(old, new, plan.keep)
        self._keep_modules(plan.keep)
        for name, axis in self.wide_tensors().items():
            self._cut(name, axis, plan)
        self._take_over(old, new, plan.keep)
        self._replace_configs(config)

    def shorten(self, keep: Sequence[int]) -> nn.Module:
        """Keeps only some layers of a model that is to be sized, and returns the model.

        In the config, only the number of layers changes; to prune a model, use `keep_layers`.
        """
        self._keep_modules(keep)
        self.config.num_hidden_layers = len(keep)
        model: nn.Module = self.model
        return model

    def _keep_modules(self, keep: Sequence[int]) -> None:
        setattr(self._parent, self._name, nn.ModuleList([self.layers[i] for i in keep]))

    def _check_same_parameters(self, old: nn.Module, new: nn.Module, keep: Sequence[int]) -> None:
        shapes = {name: tuple(p.shape) for name, p in new.named_parameters()}
        expected = {
            renamed: tuple(p.shape)
            for name, p in old.named_parameters()
            if (renamed := self._renamed(name, keep)) is not None
        }
        for name in self.wide_tensors():
            expected[name] = shapes.get(name, ())
        wrong = sorted(
            name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name)
        )
        if wrong:
            raise ModelError(
                f"With the config of a {self.config.model_type} model that keeps layers {list(keep)}, "
                f"transformers would build '{wrong[0]}' with shape {shapes.get(wrong[0], 'missing')}; the "
                f"kept layer has {expected.get(wrong[0], 'missing')}.",
                hint="If the family is new, add a row to gradpruner/models/families.py.",
            )

    def _renamed(self, name: str, keep: Sequence[int]) -> str | None:
        """Returns the name of a parameter or module after pruning; None if it is removed."""
        prefix = self.family.layers_path + "."
        if not name.startswith(prefix):
            return name
        number, dot, rest = name[len(prefix) :].partition(".")
        return f"{prefix}{keep.index(int(number))}{dot}{rest}" if int(number) in keep else None

    def _cut(self, name: str, axis: int, plan: PruningPlan) -> None:
        path, _, attribute = name.rpartition(".")
        module: Any = self.model.get_submodule(path)
        old: nn.Parameter = getattr(module, attribute)
        cut = slice_layers(old.detach(), axis, plan.num_layers, plan.keep)
        setattr(module, attribute, nn.Parameter(cut, requires_grad=old.requires_grad))

    def _take_over(self, old: nn.Module, new: nn.Module, keep: Sequence[int]) -> None:
        """Gives the kept modules the plain attributes in which the two skeletons differ, and no others."""
        before = {
            renamed: module
            for name, module in old.named_modules()
            if (renamed := self._renamed(name, keep)) is not None
        }
        for name, module in new.named_modules():
            if name not in before:
                continue
            present = self.model.get_submodule(name)
            for key, value in vars(module).items():
                if isinstance(value, _PLAIN_VALUES) and vars(before[name]).get(key, module) != value:
                    setattr(present, key, value)

    def _replace_configs(self, config: Any) -> None:
        """Gives the configs of the model and its decoder the new depth.

        They are changed in place because every module holds a reference to one of them.
        """
        parts = {type(config): config, type(text_config(config)): text_config(config)}
        held = {id(c): c for m in self.model.modules() if (c := getattr(m, "config", None)) is not None}
        for old in held.values():
            if type(old) not in parts:
                continue
            stay = {k: v for k, v in vars(old).items() if k in _CHOSEN or isinstance(v, PreTrainedConfig)}
            vars(old).clear()
            vars(old).update(copy.deepcopy(vars(parts[type(old)])) | stay)
        self.config = text_config(self.model.config)


def returning_input(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a layer's forward to return its input. The layer still runs, so the KV cache keeps its entry."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    return wrapped


def slice_layers(tensor: Tensor, axis: int, num_layers: int, keep: Sequence[int]) -> Tensor:
    """Returns the slices of the kept layers from a tensor of `num_layers` equal slices along `axis`."""
    parts = tensor.chunk(num_layers, dim=axis)
    return torch.cat([parts[i] for i in keep], dim=axis)


def fingerprint(model: nn.Module) -> str:
    """Returns a short identity of a model's decoder weights: '<type>-<layers>x<hidden>-<hash>'.

    It hashes the shape and 64 entries of every linear in every layer. That is enough to recognise a trace or
    plan from another model, or from the same architecture with other weights, without reading all weights.
    Entries are rounded to bfloat16 first, so a checkpoint has the same fingerprint in bfloat16 and float32,
    with and without adapters. Quantised weights differ from those of the checkpoint, so the hash of a
    quantised model is 'quantised' (see `trace.same_model`).
    """
    view = LayeredModel(model)
    identity = identity_of(view.config)
    digest = hashlib.sha256()
    for layer in range(view.num_layers):
        for name, module in view.linears(layer).items():
            weight: Any = getattr(module, "base_layer", module).weight  # without adapters
            if not weight.is_floating_point():
                return identity + QUANTISED
            # FSDP2 spreads weights over processes; all of them must take part in gathering one.
            whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            flat = whole.detach().reshape(-1)
            sample = flat[:: sample_step(flat.numel())][:SAMPLES]
            add_sample(digest, layer, name, tuple(weight.shape), sample)
    return f"{identity}-{digest.hexdigest()[:12]}"


SAMPLES = 64
"""Entries of every linear that go into a fingerprint."""


def identity_of(config: Any) -> str:
    """Returns the readable part of a fingerprint, from the decoder's config."""
    return f"{config.model_type}-{config.num_hidden_layers}x{config.hidden_size}"


def sample_step(entries: int) -> int:
    """Returns the distance between the entries of a weight that go into a fingerprint."""
    return max(1, entries // SAMPLES)


def add_sample(digest: Any, layer: int, name: str, shape: tuple[int, ...], sample: Tensor) -> None:
    """Adds one linear to the hash of a fingerprint."""
    digest.update(f"{layer}.{name}{shape}".encode())
    digest.update(sample.to(torch.bfloat16).float().cpu().numpy().tobytes())
