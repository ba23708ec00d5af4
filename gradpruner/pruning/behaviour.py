"""Runs a pruned checkpoint and its source on fixed tokens; verification compares their outputs."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import IntegrityError
from gradpruner.models.config_patch import text_config
from gradpruner.models.headers import TensorRef
from gradpruner.models.layers import LayeredModel
from gradpruner.models.loading import load_config, load_model
from gradpruner.models.proof import probe_ids, probe_logits
from gradpruner.models.shards import Shards
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.on_demand import Reader, Unmatched, on_demand
from gradpruner.pruning.pieces import TORCH_DTYPES
from gradpruner.pruning.writer import read_tensor, same_bytes

NEW_TOKENS = 8
FEW_NEW_TOKENS = 2
"""For models that read all weights in every pass: one token after the prompt, one step with the cache."""


def computing_dtype(shards: Shards) -> torch.dtype:
    """Returns the dtype of most stored bytes, so that loading rounds nothing; bfloat16 for 8-bit weights."""
    sizes: dict[str, int] = {}
    for ref in shards.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.num_bytes
    dtype = TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name], default="F32"), torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.bfloat16


def is_tied(model: Any) -> bool | None:
    """Returns whether the embeddings are tied, as the config says; None if the config does not tie them."""
    if not getattr(text_config(model.config), "tie_word_embeddings", False):
        return None
    head = model.get_output_embeddings()
    return head is None or head.weight is model.get_input_embeddings().weight


@torch.no_grad()
def behaviour(model: nn.Module, new_tokens: int = NEW_TOKENS) -> dict[str, Tensor]:
    """Returns logits computed without a cache, and greedy tokens with logits computed with a cache."""
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
class Outputs:
    """What a checkpoint and its source compute, each as `behaviour` returns it.

    Attributes:
        source: Outputs of the source, with its pruned layers passed through and with the merged and repaired
            weights of the checkpoint; empty if the source was not run.
        pruned: Outputs of the checkpoint.
        dtype: The dtype both were computed in.
        tied: `is_tied` of the checkpoint.
    """

    source: dict[str, Tensor]
    pruned: dict[str, Tensor]
    dtype: torch.dtype
    tied: bool | None


_Weights = Collection[tuple[int, str]]
"""Weights by layer and path inside the layer."""


def _copies(blueprint: Blueprint, repaired: _Weights) -> dict[str, TensorRef]:
    """Returns the tensors that are copied: name in the checkpoint -> tensor of the source."""
    refitted = {blueprint.repaired_name(layer, name) for layer, name in repaired}
    pieces = (piece for piece in blueprint.pieces() if piece.name not in refitted)
    return {piece.name: piece.ref for piece in pieces if piece.ref is not None}


def check_copies(shards: Shards, blueprint: Blueprint, repaired: _Weights) -> None:
    """Compares every copied tensor with the source, byte by byte.

    Raises:
        IntegrityError: If a tensor differs.
    """
    for name, ref in _copies(blueprint, repaired).items():
        if not same_bytes(shards.tensors[name], ref):
            raise IntegrityError(f"'{name}' does not hold the bytes of '{ref.name}' in the source")


def run_on_demand(shards: Shards, blueprint: Blueprint, repaired: _Weights, *, with_source: bool) -> Outputs:
    """Runs both models, reading each weight from its file when it is used; 16 bits are computed in float32.

    With the source, copied tensors are read from the source's files for both models, and a product of the
    same weight and the same numbers is computed once. The result is valid only if `check_copies` passes.

    Raises:
        Unmatched: If weights are stored in a different form than the model uses, or other layers use what a
            passed-through layer computes.
        Exception: Whatever the model raises if it cannot run like this.
    """
    stored = computing_dtype(shards)
    dtype = stored if stored.itemsize >= torch.float32.itemsize else torch.float32
    here, expected, reader = shards.tensors, {}, Reader(dtype)
    if with_source:
        taken = {
            blueprint.repaired_ref(layer, name).name: here[blueprint.repaired_name(layer, name)]
            for layer, name in _computed(blueprint, blueprint.view, repaired)
        }
        tensors = {**blueprint.shards.tensors, **taken}
        source = on_demand(blueprint.config, tensors, blueprint.prefix, reader, blueprint.plan.pruned)
        expected = behaviour(source, FEW_NEW_TOKENS)
        if not all(bool(torch.isfinite(numbers).all()) for numbers in expected.values()):
            raise Unmatched("other layers use a passed-through layer, or the model computes NaN or Inf")
        here = here | _copies(blueprint, repaired)
    config = load_config(shards.folder, native=True, shards=shards)
    pruned = on_demand(config, here, blueprint.prefix, reader)
    return Outputs(expected, behaviour(pruned, FEW_NEW_TOKENS), dtype, is_tied(pruned))


def run_whole(shards: Shards, blueprint: Blueprint, repaired: _Weights, *, with_source: bool) -> Outputs:
    """Runs both models as `run_on_demand`, but loads each one whole in turn, in its stored dtype."""
    dtype = computing_dtype(shards)
    expected: dict[str, Tensor] = {}
    if with_source:
        model = load_model(blueprint.source, dtype=dtype, device="cpu", native=True)
        view = LayeredModel(model)
        _set_computed(view, shards, blueprint, repaired)
        with view.passed_through(blueprint.plan.pruned):
            expected = behaviour(model)
        del model, view
        gc.collect()
    model = load_model(shards.folder, dtype=dtype, device="cpu", native=True)
    return Outputs(expected, behaviour(model), dtype, is_tied(model))


def _computed(blueprint: Blueprint, view: LayeredModel, repaired: _Weights) -> list[tuple[int, str]]:
    """Returns layer and path of every weight that is not copied from the source: merged or repaired."""
    targets = sorted(blueprint.plan.merged.keys() & set(blueprint.plan.keep))
    return list(dict.fromkeys([*((t, n) for t in targets for n in view.linears(t)), *repaired]))


@torch.no_grad()
def _set_computed(view: LayeredModel, shards: Shards, blueprint: Blueprint, repaired: _Weights) -> None:
    """Copies the merged and repaired weights of the checkpoint into the source model."""
    for layer, name in _computed(blueprint, view, repaired):
        weight = view.layers[layer].get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(read_tensor(shards.tensors[blueprint.repaired_name(layer, name)]))
