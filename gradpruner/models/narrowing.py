"""Carries out a width plan in memory: removes heads, MLP channels and hidden dimensions of a model."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.models.config_patch import text_config
from gradpruner.models.layers import fingerprint, skeleton
from gradpruner.models.proof import probe_logits, relative_error, tolerance
from gradpruner.models.widths import HEAD_NORMS, USE_LAYERS, WidthView, head_entries
from gradpruner.plans.width_plan import WidthPlan


def prune_width_(model: nn.Module, plan: WidthPlan) -> nn.Module:
    """Removes heads, channels and hidden dimensions of a model in place (see `narrow_`) and returns it."""
    narrow_(model, plan)
    return model


@torch.no_grad()
def narrow_(model: nn.Module, plan: WidthPlan) -> float | None:
    """Removes heads, channels and hidden dimensions of a model in place, and returns the error of the proof.

    If all hidden dimensions stay, the result is proved: it must compute what the model computed with the
    removed heads and channels set to zero. Besides the model, this takes the memory of one linear.

    If the plan is uniform, the config of the narrower model states its widths. Otherwise the model can be
    saved, but only this package can load it (`loading.load_model`).

    Args:
        model: A Hugging Face causal LM without adapters.
        plan: What stays.

    Returns:
        Relative error of the proof; None if hidden dimensions are removed or the model has no weights.

    Raises:
        PlanError: If the plan is for another model, or transformers cannot load its widths.
        ModelError: If heads and channels of the model cannot be told apart, or the proof fails.
    """
    view = WidthView(model)
    plan.check_model(view.shape, fingerprint(model))
    check_widths(view, plan)
    whole_hidden = len(plan.hidden) == plan.shape.hidden_size
    on_meta = next(model.parameters()).device.type == "meta"
    expected = None
    if whole_hidden and not on_meta:
        with view.masked(plan):
            expected = probe_logits(view.model)
    if not whole_hidden:
        _cut_hidden_(view, plan)
    _cut_layers_(view, plan)
    for name, value in _config_values(plan).items():
        setattr(view.layered.config, name, value)
    if expected is None:
        return None
    error = relative_error(probe_logits(view.model), expected)
    if not error <= tolerance(next(model.parameters()).dtype, reordered=True):
        raise ModelError(
            f"After the cut, the outputs of the '{view.layered.config.model_type}' model differ from the "
            f"uncut model's with those parts set to zero (relative error {error:.2g}).",
            hint=USE_LAYERS,
        )
    return error


def _cut_layers_(view: WidthView, plan: WidthPlan) -> None:
    """Cuts the seven linears of each layer to the heads and channels of the plan."""
    dim = view.shape.head_dim
    for layer, widths in enumerate(plan.layers):
        parts = view.parts(layer)
        queries, keys = head_entries(widths.heads, dim), head_entries(plan.kv_heads(layer), dim)
        channels = torch.tensor(widths.channels)
        _cut_(parts.q_proj, rows=queries)
        _cut_(parts.k_proj, rows=keys)
        _cut_(parts.v_proj, rows=keys)
        _cut_(parts.o_proj, columns=queries)
        _cut_(parts.gate_proj, rows=channels)
        _cut_(parts.up_proj, rows=channels)
        _cut_(parts.down_proj, columns=channels)
        numbers = {
            "num_heads": len(widths.heads),
            "num_attention_heads": len(widths.heads),
            "num_key_value_heads": len(plan.kv_heads(layer)),
            "num_key_value_groups": len(widths.heads) // len(plan.kv_heads(layer)),
            "intermediate_size": len(widths.channels),
        }
        for module in view.layered.layers[layer].modules():
            for name, value in numbers.items():
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, value)


def _cut_hidden_(view: WidthView, plan: WidthPlan) -> None:
    """Cuts all parameters along the hidden state."""
    model, kept = view.model, torch.tensor(plan.hidden)
    norms = list(view.hidden_vectors(model))
    for layer in range(plan.num_layers):
        parts = view.parts(layer)
        for module in (parts.q_proj, parts.k_proj, parts.v_proj, parts.gate_proj, parts.up_proj):
            _cut_(module, columns=kept)
        for module in (parts.o_proj, parts.down_proj):
            _cut_(module, rows=kept)
    for norm in norms:
        for name, vector in list(norm.named_parameters(recurse=False)):
            setattr(norm, name, _parameter(vector, vector[kept.to(vector.device)]))
    for module in model.modules():  # also norms without parameters, like OLMo's
        if getattr(module, "normalized_shape", None) == (plan.shape.hidden_size,):
            module.normalized_shape = (len(kept),)
    _cut_embeddings_(model, kept)


def _cut_embeddings_(model: Any, kept: Tensor) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, whole = head is not None and head.weight is embedding.weight, embedding.embedding_dim
    embedding.weight = _parameter(embedding.weight, embedding.weight[:, kept.to(embedding.weight.device)])
    embedding.embedding_dim = len(kept)
    if math.isclose(getattr(embedding, "scalar_embed_scale", 0.0), math.sqrt(whole)):
        # Gemma scales embeddings so. A loaded model takes the scale from the config, so this one must match.
        embedding.scalar_embed_scale = math.sqrt(len(kept))
        embedding.embed_scale = torch.full_like(embedding.embed_scale, math.sqrt(len(kept)))
    if head is not None:
        weight = head.weight[:, kept.to(head.weight.device)] if not tied else None
        head.weight = embedding.weight if weight is None else _parameter(head.weight, weight)
        head.in_features = len(kept)


def _config_values(plan: WidthPlan) -> dict[str, int]:
    """Returns the new widths, as far as a config can state them."""
    # head_dim is stated because the hidden size no longer gives it.
    values = {"head_dim": plan.shape.head_dim, "hidden_size": len(plan.hidden)}
    if plan.uniform:
        values["num_attention_heads"] = plan.widths.num_heads
        values["num_key_value_heads"] = plan.widths.num_kv_heads
        values["intermediate_size"] = plan.widths.intermediate_size
    return values


def check_widths(view: WidthView, plan: WidthPlan) -> None:
    """Refuses widths that transformers would not load: for many types, heads must divide the hidden size.

    Raises:
        PlanError: If no config of this model type can state the widths, or its models ignore what it states.
        ModelError: If hidden dimensions are removed, and it is unclear how a parameter depends on them.
    """
    if len(plan.hidden) < plan.shape.hidden_size:
        _check_hidden(view)
    config, values = view.layered.config, _config_values(plan)
    try:
        type(config).from_dict(config.to_dict() | values)
    except Exception as error:  # strict config classes raise their own types
        raise PlanError(
            f"No '{config.model_type}' model can have these widths ({values}): {error}",
            hint="Keep another number of heads or hidden dimensions.",
        ) from error
    if not plan.uniform:
        return
    # Some types derive the head size from other sizes and ignore the one in the config.
    whole = copy.deepcopy(view.model.config)
    for name, value in values.items():
        setattr(text_config(whole), name, value)
    try:
        WidthView(skeleton(type(view.model), whole))
    except ModelError as error:
        raise PlanError(
            f"transformers would not build these widths ({values}) from the config: {error.message}",
            hint="Keep hidden size / heads as it is, or prune channels only.",
        ) from error


def _check_hidden(view: WidthView) -> None:
    """Refuses a model if it is unclear how one of its parameters depends on the hidden state."""
    model = view.model
    linears = [m for i in range(view.shape.num_layers) for m in vars(view.parts(i)).values()]
    norms = list(view.hidden_vectors(model))
    known = {id(p) for m in [*linears, *norms] for p in m.parameters()}
    known |= {id(p) for p in view.embeddings()}
    others = [name for name, p in model.named_parameters() if id(p) not in known and p.ndim > 0]
    odd = [name for name in others if not any(part in HEAD_NORMS for part in name.split("."))]
    odd += [n for n, m in model.named_modules() if n.rpartition(".")[2] in HEAD_NORMS and m in norms]
    if odd:
        raise ModelError(
            f"Hidden dimensions of a '{view.layered.config.model_type}' model cannot be pruned: it is not "
            f"known how '{odd[0]}' depends on them.",
            hint="Prune heads, channels or layers instead.",
        )


def _cut_(linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    weight = linear.weight
    if rows is not None and len(rows) != linear.out_features:
        linear.weight = _parameter(weight, weight[rows.to(weight.device)])
        if linear.bias is not None:
            linear.bias = _parameter(linear.bias, linear.bias[rows.to(weight.device)])
        linear.out_features = len(rows)
    if columns is not None and len(columns) != linear.in_features:
        linear.weight = _parameter(linear.weight, linear.weight[:, columns.to(weight.device)])
        linear.in_features = len(columns)


def _parameter(old: Tensor, values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad)


def resized_class(base: Any, plan: WidthPlan) -> Any:
    """Returns a class like `base` with layers as narrow as a plan of different widths says.

    It is for `from_pretrained`. The hidden size of the plan is in the folder's config already.
    """

    class Resized(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            with torch.no_grad():
                _cut_layers_(WidthView(self), plan)

    # A saved config records the name of the class.
    Resized.__name__, Resized.__qualname__ = base.__name__, base.__qualname__
    Resized.__module__ = base.__module__
    return Resized
