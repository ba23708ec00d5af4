"""Decides what a pruned checkpoint contains before anything is written, without building the model.

A blueprint says which tensors stay and under which names, which tensors are computed, and what the new config
contains. What remains to do is mostly copying.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gradpruner.common.errors import IntegrityError, ModelError, PlanError
from gradpruner.gradients.trace import GradientTrace
from gradpruner.models.checking import check_config, is_quantised
from gradpruner.models.classes import model_class
from gradpruner.models.config_patch import (
    check_keep,
    layer_pattern,
    parts_of,
    patch_config,
    rename_modules,
)
from gradpruner.models.engines import layer_facts, portability_of_layers
from gradpruner.models.headers import TensorRef
from gradpruner.models.layers import (
    SAMPLES,
    LayeredModel,
    add_sample,
    identity_of,
    sample_step,
    skeleton,
    slice_layers,
)
from gradpruner.models.loading import load_config, load_structure, refuse_narrowed
from gradpruner.models.raw_config import is_beyond, quantised_parts
from gradpruner.models.shards import Shards, open_shards
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair
from gradpruner.pruning.disk_names import count_beyond, find_prefix
from gradpruner.pruning.in_memory import check_merging, merge_planned
from gradpruner.pruning.pieces import TORCH_DTYPES, Piece
from gradpruner.pruning.writer import read_tensor, sha256_tensor


@dataclass
class Blueprint:
    """The contents of a pruned checkpoint that is not written yet.

    Args:
        source: The model folder.
        plan: What happens to every layer.
        trace: The recorded gradients; needed if the plan merges by them.
        without_trace: Accept a missing trace, because only names, shapes and the config will be used.
        repair: The repair fitted for the plan; its weights replace those of the refitted layers.

    Attributes:
        shards: The tensors of the source.
        raw: The content of the source's config.json; `config` is the same as transformers reads it.
        view: The source's layers, without weights.
        prefix: Prefix of the layers' tensor names on disk.
        warnings: Warnings for the user.

    Raises:
        PlanError: If the plan is for another model or depth, merges layers that cannot be merged, or keeps
            layers that no config can describe.
        ModelError: If the folder is not a model that can be pruned.
        IntegrityError: If a file is damaged, unsafe, or contradicts the config.
    """

    source: Path
    plan: PruningPlan
    trace: GradientTrace | None = None
    without_trace: bool = False
    repair: Repair | None = None

    def __post_init__(self) -> None:
        self.raw = check_config(self.source, trust_remote_code=True, quantised=True)
        self.shards: Shards = open_shards(self.source)
        refuse_narrowed(self.source)
        self.quantised = is_quantised(self.source, self.raw, self.shards.tensors)
        self.config: Any = load_config(self.source, native=True, shards=self.shards)
        self.view = LayeredModel(self._structure())
        self.prefix = find_prefix(self.view, self.shards)
        self._pattern = layer_pattern(self.prefix)
        self.beyond = count_beyond(self.view, self.shards, self.prefix)
        self._in_memory = {name for name, _ in self.view.model.named_parameters()}
        self._place = {old: new for new, old in enumerate(self.plan.keep)}
        self.plan.check_model(self.view.num_layers, self.fingerprint)
        self.warnings = check_keep(self.view.config, self.view.family, self.plan)
        if self.plan.merged:
            self._check_merging()
        if self.repair is not None:
            self._check_repair(self.repair)
        self._check_layers()

    def _structure(self) -> nn.Module:
        """Returns the model without weights; transformers checks its parameters against the files."""
        if not self.quantised:
            return load_structure(self.source)
        config = copy.deepcopy(self.config)
        for part in parts_of(config):  # building a quantised model needs the hardware it is made for
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        return skeleton(model_class(self.config), config)

    def _beyond(self, name: str) -> bool:
        """Returns whether a tensor belongs to layers for multi-token prediction, which are left out."""
        return (
            bool(self.beyond) and is_beyond(name, self.view.num_layers) and name not in self._in_memory
        ) or self._layer_of(name) >= self.view.num_layers

    def _layer_of(self, name: str) -> int:
        """Returns the layer a tensor belongs to; -1 if it is outside the layers."""
        match = self._pattern.match(name)
        return int(match[1]) if match else -1

    def rename(self, name: str) -> str | None:
        """Returns the name of a tensor or module in the pruned checkpoint; None if it is removed."""
        match = self._pattern.match(name)
        if match is None:
            return None if self._beyond(name) else name
        new = self._place.get(int(match[1]))
        return None if new is None else f"{self.prefix}.{new}{match[2] or ''}"

    def _check_layers(self) -> None:
        """Refuses layers beyond those the config counts, and quantised layers that lack modules of others."""
        depth, family = self.view.num_layers, self.view.family
        extra = sorted({self._layer_of(name) for name in self.shards.tensors} - set(range(-1, depth)))
        if extra and (not self.beyond or extra[-1] >= depth + self.beyond):
            raise IntegrityError(
                f"{self.source} holds tensors of layer {extra[-1]}, but its config says {depth} layers"
                + (f" and {self.beyond} behind them." if self.beyond else "."),
                hint="Does its config.json belong to these weights?",
            )
        left = sum(self._beyond(name) for name in self.shards.tensors)
        if left:
            self.warnings.append(
                f"{left} tensors for predicting several tokens at once (MTP) are left out: they were "
                "trained on the output of all layers. Engines must not use them for speculative decoding."
            )
        if not self.quantised:
            return
        kinds = getattr(self.view.config, "layer_types", None) or [""] * depth
        modules: dict[int, set[str]] = {i: set() for i in range(depth)}
        for name in self.shards.tensors:
            match = self._pattern.match(name)
            if match and int(match[1]) < depth:  # a module may be unquantised in some layers
                modules[int(match[1])].add((match[2] or "").rpartition(".")[0])
        for layer in range(depth):
            first = kinds.index(kinds[layer])
            if modules[layer] != modules[first] and not family.no_merge:
                odd = sorted(modules[layer] ^ modules[first])[0]
                raise IntegrityError(
                    f"{self.source}: layers {first} and {layer} do not have the same modules ('{odd}').",
                    hint="Is the download complete?",
                )

    @cached_property
    def linears(self) -> dict[int, dict[str, TensorRef]]:
        """Layer -> linear -> its weight on disk; linears stored in another form are left out."""
        found: dict[int, dict[str, TensorRef]] = {}
        for layer in range(self.view.num_layers):
            found[layer] = {}
            for name, module in self.view.linears(layer).items():
                ref = self.shards.tensors.get(f"{self.prefix}.{layer}.{name}.weight")
                weight: Any = module.weight
                if ref is not None and ref.shape == tuple(weight.shape) and ref.dtype in TORCH_DTYPES:
                    found[layer][name] = ref
        return found

    @cached_property
    def fingerprint(self) -> str:
        """The model's `layers.fingerprint`, from 64 entries of every linear; "" if not all can be read."""
        if self.quantised:
            return ""
        digest = hashlib.sha256()
        for layer, linears in self.linears.items():
            if len(linears) != len(self.view.linears(layer)):
                return ""
            for name, ref in linears.items():
                add_sample(digest, layer, name, ref.shape, _sample(ref))
        return f"{identity_of(self.view.config)}-{digest.hexdigest()[:12]}"

    def _transposed(self, layer: int, name: str) -> bool:
        return isinstance(self.view.linears(layer).get(name), Conv1D)

    def _check_repair(self, repair: Repair) -> None:
        if self.quantised:
            raise PlanError(
                f"{self.source} is quantised; its weights cannot be repaired.",
                hint="Prune it without a repair, or prune the unquantised model.",
            )
        repair.check(self.plan, self.fingerprint)
        shapes: dict[int, dict[str, tuple[int, ...]]] = {}
        for layer, name in repair.linears.items():
            ref = self._repairable(layer, name)
            if ref is not None:
                turned = tuple(reversed(ref.shape)) if self._transposed(layer, name) else ref.shape
                shapes[layer] = {name: turned}
        repair.check_shapes(shapes)

    def _repairable(self, layer: int, name: str) -> TensorRef | None:
        """Returns the weight on disk of a linear or norm in a kept layer; None if there is none."""
        weight = self.view.weight(layer, name)
        if weight is None or layer not in self.plan.keep:
            return None
        if weight.ndim != 1:
            return self.linears[layer].get(name)
        ref = self.shards.tensors.get(f"{self.prefix}.{layer}.{name}.weight")
        return ref if ref is not None and ref.shape == tuple(weight.shape) else None

    def _linear_shapes(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """Returns layer -> linear on disk -> (out_features, in_features)."""
        return {
            layer: {
                name: tuple(reversed(ref.shape)) if self._transposed(layer, name) else ref.shape
                for name, ref in linears.items()
            }
            for layer, linears in self.linears.items()
        }

    def _check_merging(self) -> None:
        if self.quantised:
            raise PlanError(
                f"{self.source} is quantised; its layers can be dropped but not merged.",
                hint="Plan with num_merge: 0, or prune the unquantised model.",
            )
        for layer, linears in self.linears.items():
            involved = layer in self.plan.merged or any(layer in v for v in self.plan.merged.values())
            missing = sorted(self.view.linears(layer).keys() - linears.keys())
            if missing and involved:
                raise ModelError(
                    f"'{missing[0]}' of layer {layer} is stored in a different form than the model uses.",
                    hint="Merge in memory: prune_(model, plan, trace), then save_pretrained.",
                )
        if not self.plan.needs_trace or self.trace is not None or not self.without_trace:
            check_merging(self.plan, self.trace, self._linear_shapes(), self.fingerprint)

    def pieces(self) -> list[Piece]:
        """Returns the tensors of the pruned checkpoint, in the order of the source."""
        computed = {
            ref.name: partial(self._merge, target, name)
            for target in self.plan.merged
            for name, ref in self.linears[target].items()
        }
        for layer, path in (self.repair.linears if self.repair else {}).items():
            computed[self.repaired_ref(layer, path).name] = partial(self._repaired, layer, path)
        wide = self._wide_on_disk()
        pieces = []
        for ref in self.shards.tensors.values():
            name = self.rename(ref.name)
            if name is None:
                continue
            if ref.name in computed:
                pieces.append(Piece(name, ref.dtype, ref.shape, ref.num_bytes, make=computed[ref.name]))
            elif ref.name in wide:
                pieces.append(self._cut(ref, wide[ref.name]))
            else:
                pieces.append(Piece.copied(name, ref))
        return pieces

    def merged_names(self) -> set[str]:
        """Returns the names, in the pruned checkpoint, of the linears that others are merged into."""
        refs = (ref for target in self.plan.merged for ref in self.linears[target].values())
        return {name for ref in refs if (name := self.rename(ref.name)) is not None}

    def repaired_ref(self, layer: int, name: str) -> TensorRef:
        """Returns the source's weight of a linear or norm that a repair refits.

        Raises:
            IntegrityError: If no kept layer has such a weight.
        """
        ref = self._repairable(layer, name)
        if ref is None:
            raise IntegrityError(f"{self.source} has no '{name}' in layer {layer} that could be repaired.")
        return ref

    def repaired_name(self, layer: int, name: str) -> str:
        """Returns the name of that weight in the pruned checkpoint."""
        renamed = self.rename(self.repaired_ref(layer, name).name)
        assert renamed is not None  # its layer is kept
        return renamed

    def _wide_on_disk(self) -> dict[str, int]:
        """Returns the tensors that hold a slice per layer: name on disk -> axis of the layers."""
        parent = self.prefix.rpartition(".")[0]
        dot = "." if parent else ""
        return {f"{parent}{dot}{name}": axis for name, axis in self.view.family.wide_tensors.items()}

    def _cut(self, ref: TensorRef, axis: int) -> Piece:
        kept, depth = len(self.plan.keep), self.view.num_layers
        shape = tuple(n // depth * kept if i == axis else n for i, n in enumerate(ref.shape))
        size = ref.num_bytes // depth * kept
        return Piece(ref.name, ref.dtype, shape, size, make=partial(self._slice, ref, axis))

    def _slice(self, ref: TensorRef, axis: int) -> Tensor:
        return slice_layers(read_tensor(ref), axis, self.view.num_layers, self.plan.keep)

    @torch.no_grad()
    def _merge(self, target: int, name: str) -> Tensor:
        """Computes one merged linear, exactly as `in_memory.prune_` does."""
        assert self.trace is not None or not self.plan.needs_trace
        transposed = self._transposed(target, name)

        def weight(layer: int) -> Tensor:
            tensor = read_tensor(self.linears[layer][name], finite=True)
            return tensor.T if transposed else tensor

        merged = merge_planned(self.plan, self.trace, target, name, weight)
        return merged.T if transposed else merged

    def _repaired(self, layer: int, name: str) -> Tensor:
        """Returns a refitted weight in the source's dtype and layout, as `in_memory.prune_` sets it."""
        assert self.repair is not None
        weight = self.repair.weights[layer].to(TORCH_DTYPES[self.repaired_ref(layer, name).dtype])
        return weight.T if self._transposed(layer, name) else weight

    def repair_facts(self) -> dict[str, Any] | None:
        """Returns the repair's entry in `pruning.json`: how it was fitted, and the hashes of its tensors."""
        if self.repair is None:
            return None
        tensors = {}
        for layer, name in self.repair.linears.items():
            tensors[self.repaired_name(layer, name)] = sha256_tensor(self._repaired(layer, name))
        return self.repair.facts() | {"tensors": tensors}

    def new_config(self) -> dict[str, Any]:
        """Returns the content of the pruned model's config.json."""
        patched = patch_config(self.raw, self.config, self.view.family, self.plan.keep)
        if self.quantised:
            for where in quantised_parts(patched):
                _rename_listed(patched, where.split("."), self.rename)
        return patched

    def summary(self) -> dict[str, Any]:
        """Describes the pruned checkpoint in JSON values, for the dry run and `pruning.json`."""
        pieces = self.pieces()
        return {
            "layers": [self.view.num_layers, len(self.plan.keep)],
            "bytes": [self.shards.total_bytes, sum(piece.num_bytes for piece in pieces)],
            "tensors": [len(self.shards.tensors), len(pieces)],
            "merged_tensors": len(self.merged_names()),
            "model_type": self.view.config.model_type,
            "fingerprint": self.fingerprint,
            "portability": [vars(v) for v in portability_of_layers(layer_facts(self.config), self.plan.keep)],
            "warnings": self.warnings,
        }


def _rename_listed(config: dict[str, Any], where: list[str], rename: Callable[[str], str | None]) -> None:
    """Renames the modules listed in a nested section of a config; copies the sections it changes."""
    *above, last = where
    for name in above:
        config[name] = dict(config[name])
        config = config[name]
    config[last] = rename_modules(config[last], rename)


def _sample(ref: TensorRef) -> Tensor:
    """Reads the entries of a tensor that go into a fingerprint."""
    entries = math.prod(ref.shape)
    dtype = TORCH_DTYPES[ref.dtype]
    step, size = sample_step(entries), dtype.itemsize
    with ref.file.open("rb") as file:
        parts = []
        for index in range(0, entries, step)[:SAMPLES]:
            parts.append(os.pread(file.fileno(), size, ref.start + index * size))
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype) if parts else torch.empty(0, dtype=dtype)
