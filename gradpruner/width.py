"""Carrying out a width plan: heads, MLP channels and hidden dimensions of a model in memory."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from gradpruner.cost import count_parameters, disk_bytes, flops_per_token
from gradpruner.errors import ModelError, PlanError
from gradpruner.layered import LayeredModel, fingerprint
from gradpruner.width_plan import LayerWidths, WidthPlan, WidthShape

log = logging.getLogger("gradpruner.width")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
PROOF_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative error allowed between a pruned model and its source with what goes set to zero, by dtype."""
_PROOF_TOLERANCE_16_BIT = 5e-2
_PROOF_TOKENS = 12
UNITS = ("parameters", "decoder_parameters")


@dataclass(frozen=True)
class LayerParts:
    """The seven linears of one layer, by role.

    Attributes:
        q_proj: Its output is the query heads, one after the other.
        k_proj: Its output is the KV heads.
        v_proj: Likewise.
        o_proj: Its input is the query heads.
        gate_proj: Its output is the MLP channels.
        up_proj: Likewise.
        down_proj: Its input is the MLP channels.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear


class WidthView:
    """A causal LM whose layers have attention heads and MLP channels that can be told apart.

    Args:
        model: A Hugging Face causal LM without adapters; Llama, Mistral, Qwen, Gemma, OLMo, SmolLM and others
            that name their linears alike.

    Attributes:
        layered: Its decoder layers.
        shape: Its widths.

    Raises:
        ModelError: If a layer has other linears than the seven, or widths that differ between layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(hasattr(module, "base_layer") for module in model.modules()):
            raise PlanError(
                "The model carries adapters; pruning under them would silently misplace them.",
                hint="Call merge_and_unload() or unload() first.",
            )
        self.layered = LayeredModel(model)
        self.model: Any = self.layered.model
        self._parts = [self._find_parts(i) for i in range(self.layered.num_layers)]
        self.shape = self._shape()

    def parts(self, layer: int) -> LayerParts:
        """The linears of one layer."""
        return self._parts[layer]

    def _find_parts(self, layer: int) -> LayerParts:
        linears = self.layered.linears(layer)
        found = {name.rpartition(".")[2]: module for name, module in linears.items()}
        odd = sorted(set(found) ^ {*ATTENTION, *MLP})
        if odd or len(found) != len(linears) or not all(isinstance(m, nn.Linear) for m in found.values()):
            kind = self.layered.config.model_type
            raise ModelError(
                f"Heads and channels of a '{kind}' model cannot be told apart: layer {layer} has the linears "
                f"{', '.join(linears)}; {', '.join([*ATTENTION, *MLP])} are needed.",
                hint="Use a method that prunes whole layers (`gradpruner ls methods`).",
            )
        for name, module in self.layered.layers[layer].named_modules():
            weight: Any = getattr(module, "weight", None)
            one_head = weight is None or len(weight) == getattr(self.layered.config, "head_dim", None)
            if name.rpartition(".")[2] in ("q_norm", "k_norm") and not one_head:
                raise ModelError(
                    f"Heads of a '{self.layered.config.model_type}' model share their norm ({name}): "
                    "without some of them the others would change.",
                    hint="Use a method that prunes whole layers (`gradpruner ls methods`).",
                )
        return LayerParts(**found)  # type: ignore[arg-type]

    def _shape(self) -> WidthShape:
        config = self.layered.config
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        hidden = int(config.hidden_size)
        head_dim = int(getattr(config, "head_dim", None) or hidden // heads)
        first = self._parts[0]
        shape = WidthShape(
            self.layered.num_layers, hidden, heads, kv_heads, head_dim, first.down_proj.in_features
        )
        for layer, parts in enumerate(self._parts):
            for name, (rows, columns) in _sizes(shape).items():
                linear: nn.Linear = getattr(parts, name)
                if (linear.out_features, linear.in_features) != (rows, columns):
                    raise ModelError(
                        f"{name} of layer {layer} is {linear.out_features} x {linear.in_features}; by the "
                        f"config of this '{config.model_type}' model it would be {rows} x {columns}.",
                        hint="Use a method that prunes whole layers (`gradpruner ls methods`).",
                    )
        return shape

    def whole(self) -> WidthPlan:
        """The plan that keeps everything: a start to take away from (`dataclasses.replace`)."""
        widths = LayerWidths(tuple(range(self.shape.num_heads)), tuple(range(self.shape.intermediate_size)))
        evidence = {"model": fingerprint(self.model), "num_layers": self.shape.num_layers}
        return WidthPlan(
            self.shape, (widths,) * self.shape.num_layers, tuple(range(self.shape.hidden_size)), "", evidence
        )

    @functools.cached_property
    def _counts(self) -> dict[str, int]:
        """What the number of parameters is made of."""
        first = self._parts[0]
        embeddings = {id(p): p for p in self._embeddings()}
        layer_norms = sum(len(vector.weight) for vector in self.hidden_vectors(self.layered.layers[0]))
        seven = sum(count_parameters(module) for module in vars(first).values())
        decoder = sum(count_parameters(layer) for layer in self.layered.layers)
        outside = count_parameters(self.model) - decoder - sum(p.numel() for p in embeddings.values())
        return {
            "embedding_columns": sum(p.numel() for p in embeddings.values()) // self.shape.hidden_size,
            "layer_vectors": layer_norms // self.shape.hidden_size,
            "layer_rest": count_parameters(self.layered.layers[0]) - seven - layer_norms,
            "outside_vectors": outside // self.shape.hidden_size,
            "outside_rest": outside % self.shape.hidden_size,
            "q_bias": int(first.q_proj.bias is not None),
            "k_bias": int(first.k_proj.bias is not None),
            "v_bias": int(first.v_proj.bias is not None),
            "o_bias": int(first.o_proj.bias is not None),
            "channel_biases": sum(m.bias is not None for m in (first.gate_proj, first.up_proj)),
            "down_bias": int(first.down_proj.bias is not None),
        }

    def unit_parameters(self, hidden: int | None = None) -> dict[str, int]:
        """Parameters of one unit of one layer, biases included.

        Args:
            hidden: Hidden dimensions there are; None for those of the dense model.

        Returns:
            Of a "head" (query head: its rows of q_proj, its columns of o_proj), a "kv_head" (its rows of
            k_proj and v_proj, without query heads), a "group" (a KV head with all its query heads) and a
            "channel".
        """
        hidden = self.shape.hidden_size if hidden is None else hidden
        counts, dim = self._counts, self.shape.head_dim
        head = dim * (2 * hidden + counts["q_bias"])
        kv_head = dim * (2 * hidden + counts["k_bias"] + counts["v_bias"])
        return {
            "head": head,
            "kv_head": kv_head,
            "group": kv_head + self.shape.group_size * head,
            "channel": 3 * hidden + counts["channel_biases"],
        }

    def parameters(self, plan: WidthPlan, unit: str = "parameters") -> int:
        """Parameters that remain, without building anything.

        Args:
            plan: What stays.
            unit: "parameters" of the whole model, or "decoder_parameters" without embeddings and head.
        """
        sizes = [(len(w.heads), len(plan.kv_heads(i)), len(w.channels)) for i, w in enumerate(plan.layers)]
        return self.parameters_of(sizes, len(plan.hidden), unit)

    def parameters_of(
        self, sizes: Sequence[tuple[int, int, int]], hidden: int, unit: str = "parameters"
    ) -> int:
        """Parameters of a model of these widths.

        Args:
            sizes: Query heads, KV heads and channels of every layer.
            hidden: Hidden dimensions.
            unit: As for `parameters`.
        """
        if unit not in UNITS:
            raise PlanError(f"unit is '{unit}'; one of {', '.join(UNITS)} is needed.")
        units, counts = self.unit_parameters(hidden), self._counts
        fixed = counts["layer_vectors"] + counts["o_bias"] + counts["down_bias"]
        decoder = sum(
            heads * units["head"]
            + kv_heads * units["kv_head"]
            + channels * units["channel"]
            + fixed * hidden
            + counts["layer_rest"]
            for heads, kv_heads, channels in sizes
        )
        if unit == "decoder_parameters":
            return decoder
        vectors = counts["embedding_columns"] + counts["outside_vectors"]
        return decoder + vectors * hidden + counts["outside_rest"]

    def config_takes(self, hidden: int, heads: int, kv_heads: int) -> bool:
        """Whether a config of the family can say so; that of a Llama wants hidden to be a multiple of heads.

        Args:
            hidden: Hidden dimensions.
            heads: Query heads of every layer.
            kv_heads: KV heads of every layer.
        """
        config = copy.deepcopy(self.layered.config)
        config.head_dim, config.hidden_size = self.shape.head_dim, hidden
        config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
        try:
            config.validate()  # what transformers does before it saves or loads one
        except StrictDataclassError:
            return False
        return True

    def _embeddings(self) -> list[nn.Parameter]:
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return [module.weight for module in modules if module is not None]

    def hidden_vectors(self, root: nn.Module) -> Iterator[Any]:
        """Modules of which every parameter is a vector along the hidden state: the norms."""
        for module in root.modules():
            own = dict(module.named_parameters(recurse=False))
            vectors = all(tuple(p.shape) == (self.shape.hidden_size,) for p in own.values())
            if own and vectors and not isinstance(module, nn.Linear | nn.Embedding):
                yield module

    @contextmanager
    def masked(self, plan: WidthPlan) -> Iterator[None]:
        """While it lasts, heads and channels that a plan removes hand on zeros: what pruning must amount to.

        Hidden dimensions are left as they are; without them the norms change, and no mask is the same.
        """
        hooks = []
        for layer, widths in enumerate(plan.layers):
            parts = self._parts[layer]
            kept = {
                parts.o_proj: _entries(widths.heads, self.shape.head_dim),
                parts.down_proj: torch.tensor(widths.channels),
            }
            for module, indices in kept.items():
                mask = torch.zeros(module.in_features, device=module.weight.device, dtype=module.weight.dtype)
                mask[indices.to(mask.device)] = 1
                hooks.append(module.register_forward_pre_hook(_masking(mask)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _masking(mask: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask, *args[1:])

    return hook


def _sizes(shape: WidthShape) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the seven linears."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


@torch.no_grad()
def prune_width_(model: nn.Module, plan: WidthPlan) -> nn.Module:
    """Removes heads, channels and hidden dimensions of a model in place.

    See `narrow_`; this one returns the model.
    """
    narrow_(model, plan)
    return model


@torch.no_grad()
def narrow_(model: nn.Module, plan: WidthPlan) -> float | None:
    """Removes heads, channels and hidden dimensions of a model in place, and says how well that went.

    Where no hidden dimension goes, the result is proved: it must compute what the model computed with the
    removed heads and channels set to zero. Memory beyond the model: one linear.

    Args:
        model: A Hugging Face causal LM without adapters.
        plan: What stays.

    Returns:
        Relative error of the proof; None when hidden dimensions go, or the model has no weights. The model
        has narrower linears. Its config says so if the plan is uniform; else it can be saved, and loaded
        through this package only (`checkpoint.load_model`).

    Raises:
        PlanError: If the plan is for another model.
        ModelError: If heads and channels of the model cannot be told apart, or the proof fails.
    """
    view = WidthView(model)
    plan.check_model(view.shape, fingerprint(model))
    _check_config(view, plan)
    whole_hidden = len(plan.hidden) == plan.shape.hidden_size
    on_meta = next(model.parameters()).device.type == "meta"
    expected = None
    if whole_hidden and not on_meta:
        with view.masked(plan):
            expected = _logits(view.model)
    if not whole_hidden:
        _cut_hidden_(view, plan)
    _cut_layers_(view, plan)
    _describe_(view, plan)
    if expected is None:
        return None
    error = float((_logits(view.model) - expected).norm() / expected.norm())
    if not error <= PROOF_TOLERANCE.get(next(model.parameters()).dtype, _PROOF_TOLERANCE_16_BIT):
        raise ModelError(
            f"The pruned '{view.layered.config.model_type}' model does not compute what it did with the "
            f"removed parts set to zero (relative error {error:.2g}).",
            hint="Use a method that prunes whole layers (`gradpruner ls methods`).",
        )
    return error


def _logits(model: Any) -> Tensor:
    config = model.get_input_embeddings()
    ids = torch.arange(_PROOF_TOKENS, device=config.weight.device)[None] % config.weight.shape[0]
    logits: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return logits


def _cut_layers_(view: WidthView, plan: WidthPlan) -> None:
    """Cuts the seven linears of every layer to the plan's heads and channels."""
    dim = view.shape.head_dim
    for layer, widths in enumerate(plan.layers):
        parts = view.parts(layer)
        queries, keys = _entries(widths.heads, dim), _entries(plan.kv_heads(layer), dim)
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
    """Cuts everything along the hidden state; refuses a model with parameters it cannot place."""
    model, kept = view.model, torch.tensor(plan.hidden)
    linears = [m for i in range(plan.num_layers) for m in vars(view.parts(i)).values()]
    norms = list(view.hidden_vectors(model))
    known = {id(p) for m in [*linears, *norms] for p in m.parameters()}
    known |= {id(p) for p in view._embeddings()}
    along_head = ("q_norm", "k_norm")
    others = [name for name, p in model.named_parameters() if id(p) not in known and p.ndim > 0]
    odd = [name for name in others if not any(part in along_head for part in name.split("."))]
    odd += [n for n, m in model.named_modules() if n.rpartition(".")[2] in along_head and m in norms]
    if odd:
        raise ModelError(
            f"Hidden dimensions of a '{view.layered.config.model_type}' model cannot be pruned: it is not "
            f"known how '{odd[0]}' depends on them.",
            hint="Prune heads, channels or layers instead.",
        )
    for layer in range(plan.num_layers):
        parts = view.parts(layer)
        for module in (parts.q_proj, parts.k_proj, parts.v_proj, parts.gate_proj, parts.up_proj):
            _cut_(module, columns=kept)
        for module in (parts.o_proj, parts.down_proj):
            _cut_(module, rows=kept)
    for norm in norms:
        for name, vector in list(norm.named_parameters(recurse=False)):
            setattr(norm, name, _parameter(vector, vector[kept.to(vector.device)]))
        if hasattr(norm, "normalized_shape"):
            norm.normalized_shape = (len(kept),)
    _cut_embeddings_(model, kept)


def _cut_embeddings_(model: Any, kept: Tensor) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied, whole = head is not None and head.weight is embedding.weight, embedding.embedding_dim
    embedding.weight = _parameter(embedding.weight, embedding.weight[:, kept.to(embedding.weight.device)])
    embedding.embedding_dim = len(kept)
    if math.isclose(getattr(embedding, "scalar_embed_scale", 0.0), math.sqrt(whole)):
        # Gemma's. A model that is loaded takes it from the config, so this one must do the same.
        embedding.scalar_embed_scale = math.sqrt(len(kept))
        embedding.embed_scale = torch.full_like(embedding.embed_scale, math.sqrt(len(kept)))
    if head is not None:
        weight = head.weight[:, kept.to(head.weight.device)] if not tied else None
        head.weight = embedding.weight if weight is None else _parameter(head.weight, weight)
        head.in_features = len(kept)


def _describe_(view: WidthView, plan: WidthPlan) -> None:
    """Brings the config to the new widths, as far as a config can say them."""
    for name, value in _config_values(plan).items():
        setattr(view.layered.config, name, value)


def _config_values(plan: WidthPlan) -> dict[str, int]:
    values = {
        "head_dim": plan.shape.head_dim,
        "hidden_size": len(plan.hidden),
    }  # one no longer gives the other
    if plan.uniform:
        values["num_attention_heads"] = plan.widths.num_heads
        values["num_key_value_heads"] = plan.widths.num_kv_heads
        values["intermediate_size"] = plan.widths.intermediate_size
    return values


def _check_config(view: WidthView, plan: WidthPlan) -> None:
    """Refuses what transformers would refuse on load: for many types heads must divide the hidden size."""
    config = view.layered.config
    try:
        type(config).from_dict(config.to_dict() | _config_values(plan))
    except Exception as error:  # strict config classes raise their own types
        raise PlanError(
            f"No '{config.model_type}' model can have these widths ({_config_values(plan)}): {error}",
            hint="Keep another number of heads or hidden dimensions.",
        ) from error


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


def _entries(heads: Sequence[int], head_dim: int) -> Tensor:
    """The rows or columns that belong to heads."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)


def resized_class(base: Any, plan: WidthPlan) -> Any:
    """The model class `base` with the layers of a plan of differing widths, as `from_pretrained` needs it.

    Args:
        base: The class the config names.
        plan: What the folder was pruned to; its hidden dimensions are in the config already.
    """

    class Resized(base):
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            with torch.no_grad():
                _cut_layers_(WidthView(self), plan)

    # The saved config names the class.
    Resized.__name__, Resized.__qualname__ = base.__name__, base.__qualname__
    Resized.__module__ = base.__module__
    return Resized


def width_savings(model: nn.Module, plan: WidthPlan) -> dict[str, dict[str, int]]:
    """What a width plan saves, in the units of `cost.savings`.

    Args:
        model: The dense model without weights (`layered.skeleton`); pruned in place.
        plan: What stays.
    """
    before = _figures(WidthView(model), plan.shape.num_layers * [plan.shape.num_kv_heads])
    view = WidthView(model)
    if len(plan.hidden) < plan.shape.hidden_size:
        _cut_hidden_(view, plan)
    _cut_layers_(view, plan)
    after = _figures(view, [len(plan.kv_heads(i)) for i in plan.keep])
    return {name: {"before": before[name], "after": after[name]} for name in before}


def _figures(view: WidthView, kv_heads: Sequence[int]) -> dict[str, int]:
    parameters, on_disk = count_parameters(view.model), disk_bytes(view.model)
    itemsize = on_disk // parameters
    return {
        "layers": view.shape.num_layers,
        "decoder_parameters": sum(count_parameters(layer) for layer in view.layered.layers),
        "parameters": parameters,
        "kv_bytes_per_token": 2 * sum(kv_heads) * view.shape.head_dim * itemsize,
        "flops_per_token": flops_per_token(view.model),
        "disk_bytes": on_disk,
    }
