"""What models compute on tokens that are always the same: what the export gate compares."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import IntegrityError
from gradpruner.models.config_patch import text_config
from gradpruner.models.headers import TensorRef
from gradpruner.models.layers import LayeredModel
from gradpruner.models.loading import load_config, load_model
from gradpruner.models.proof import probe_ids, probe_logits
from gradpruner.models.shards import open_shards
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.on_demand import Reader, Unmatched, on_demand
from gradpruner.pruning.pieces import TORCH_DTYPES
from gradpruner.pruning.writer import read_tensor, same_bytes

NEW_TOKENS = 8
FEW_NEW_TOKENS = 2
"""Where every pass reads all weights again: one token after the prompt, one after a step with a cache."""


def computing_dtype(folder: Path) -> torch.dtype:
    """The dtype most weights are stored in, so that loading rounds nothing; bfloat16 for 8-bit floats."""
    sizes: dict[str, int] = {}
    for ref in open_shards(folder).tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.num_bytes
    dtype = TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name], default="F32"), torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def is_tied(model: Any) -> bool | None:
    """Whether input and output embeddings are one tensor, where the config says so; None elsewhere."""
    if not getattr(text_config(model.config), "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def behaviour(model: nn.Module, new_tokens: int = NEW_TOKENS) -> dict[str, Tensor]:
    """Logits without a cache, and greedy tokens with their logits computed with one."""
    lm: Any = model
    ids = probe_ids(model)
    logits = probe_logits(model)
    out = lm.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = out.sequences[0, ids.shape[1] :]
    return {"logits": logits, "cached": torch.stack(out.logits), "tokens": tokens}


@dataclass(frozen=True)
class Both:
    """What a checkpoint and its source compute.

    Attributes:
        source: With the pruned layers passed through and the computed weights of the checkpoint; empty when
            it was not asked for.
        pruned: The checkpoint.
        dtype: What both computed in.
        tied: `is_tied` of the checkpoint.
    """

    source: dict[str, Tensor]
    pruned: dict[str, Tensor]
    dtype: torch.dtype
    tied: bool | None


_Cuts = Collection[tuple[int, str]]


def _copies(blueprint: Blueprint, repaired: _Cuts) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint that is one of the source, and which."""
    refitted = {blueprint.repaired_name(layer, name) for layer, name in repaired}
    pieces = (piece for piece in blueprint.pieces() if piece.name not in refitted)
    return {piece.name: piece.ref for piece in pieces if piece.ref is not None}


def check_copies(folder: Path, blueprint: Blueprint, repaired: _Cuts) -> None:
    """Compares every tensor that is one of the source with it, byte by byte.

    Raises:
        IntegrityError: If one differs.
    """
    here = open_shards(folder).tensors
    for name, ref in _copies(blueprint, repaired).items():
        if not same_bytes(here[name], ref):
            raise IntegrityError(f"'{name}' does not hold the bytes of '{ref.name}' in the source")


def run_on_demand(folder: Path, blueprint: Blueprint, repaired: _Cuts, *, with_source: bool) -> Both:
    """Both models, each weight read when it is used; 16 bits are computed in float32.

    With a source, kept tensors are read from there, and what both multiply with the same numbers is computed
    once; it counts only if `check_copies` finds them equal.

    Raises:
        Unmatched: If files hold weights in another form than they are computed with, or others use what a
            passed layer computes.
        Exception: Whatever a model raises that cannot run like this.
    """
    stored = computing_dtype(folder)
    dtype = stored if stored.itemsize >= torch.float32.itemsize else torch.float32
    here, expected, reader = open_shards(folder).tensors, {}, Reader(dtype)
    if with_source:
        taken = {
            blueprint.repaired_ref(layer, name).name: here[blueprint.repaired_name(layer, name)]
            for layer, name in _computed(blueprint, blueprint.view, repaired)
        }
        tensors = {**blueprint.shards.tensors, **taken}
        source = on_demand(blueprint.config, tensors, blueprint.prefix, reader, blueprint.plan.pruned)
        expected = behaviour(source, FEW_NEW_TOKENS)
        if not all(bool(torch.isfinite(numbers).all()) for numbers in expected.values()):
            raise Unmatched("a layer that is passed through is used by others, or NaN or Inf is computed")
        here = here | _copies(blueprint, repaired)
    pruned = on_demand(load_config(folder, native=True), here, blueprint.prefix, reader)
    return Both(expected, behaviour(pruned, FEW_NEW_TOKENS), dtype, is_tied(pruned))


def run_whole(folder: Path, blueprint: Blueprint, repaired: _Cuts, *, with_source: bool) -> Both:
    """Both models, loaded one after the other in the dtype they are stored in; else as `run_on_demand`."""
    dtype = computing_dtype(folder)
    expected: dict[str, Tensor] = {}
    if with_source:
        model = load_model(blueprint.source, dtype=dtype, device="cpu", native=True)
        view = LayeredModel(model)
        _take_computed(view, folder, blueprint, repaired)
        with view.passed_through(blueprint.plan.pruned):
            expected = behaviour(model)
        del model, view
        gc.collect()
    model = load_model(folder, dtype=dtype, device="cpu", native=True)
    return Both(expected, behaviour(model), dtype, is_tied(model))


def _computed(blueprint: Blueprint, view: LayeredModel, repaired: _Cuts) -> list[tuple[int, str]]:
    """Layer and name of every weight that is not the source's: merged or repaired."""
    targets = sorted(blueprint.plan.merged.keys() & set(blueprint.plan.keep))
    return list(dict.fromkeys([*((t, n) for t in targets for n in view.linears(t)), *repaired]))


@torch.no_grad()
def _take_computed(view: LayeredModel, folder: Path, blueprint: Blueprint, repaired: _Cuts) -> None:
    """Gives the source the merged and the repaired weights of the checkpoint."""
    here = open_shards(folder).tensors
    for layer, name in _computed(blueprint, view, repaired):
        weight = view.layers[layer].get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(read_tensor(here[blueprint.repaired_name(layer, name)]))
