"""WidthView: finds, counts and masks the heads, MLP channels and hidden dimensions of a model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.common.registry import check_known
from gradpruner.models.layers import LayeredModel, fingerprint, refuse_adapters
from gradpruner.models.sizes import ModelSizes, changes, count_parameters
from gradpruner.plans.width_plan import LayerWidths, WidthPlan, WidthShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
HEAD_NORMS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
"""Norms along a head, not along the hidden state."""
UNITS = ("parameters", "decoder_parameters")
USE_LAYERS = "Use a method that prunes whole layers (`gradpruner ls methods`)."


@dataclass(frozen=True)
class LayerParts:
    """The seven linears of one layer.

    Query heads are rows of q_proj and columns of o_proj. KV heads are rows of k_proj and v_proj. Channels are
    rows of gate_proj and up_proj and columns of down_proj.
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
        model: A Hugging Face causal LM without adapters: Llama, Mistral, Qwen, Gemma, OLMo, SmolLM and others
            with the same names of linears.

    Raises:
        ModelError: If a layer has other linears than the seven, or other widths than the config says.
    """

    def __init__(self, model: nn.Module) -> None:
        refuse_adapters(model, "pruning under them would silently misplace them")
        self.layered = LayeredModel(model)
        self.model: Any = self.layered.model
        self._parts = [self._find_parts(i) for i in range(self.layered.num_layers)]
        self.shape = self._shape()

    def parts(self, layer: int) -> LayerParts:
        """Returns the linears of one layer."""
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
                hint=USE_LAYERS,
            )
        for name, module in self.layered.layers[layer].named_modules():
            weight: Any = getattr(module, "weight", None)
            one_head = weight is None or len(weight) == getattr(self.layered.config, "head_dim", None)
            if name.rpartition(".")[2] in HEAD_NORMS and not one_head:
                raise ModelError(
                    f"Heads of a '{self.layered.config.model_type}' model share their norm ({name}): "
                    "removing some heads would change the others.",
                    hint=USE_LAYERS,
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
                        hint=USE_LAYERS,
                    )
        return shape

    def whole(self) -> WidthPlan:
        """Returns the plan that keeps everything, to be narrowed with `dataclasses.replace`."""
        widths = LayerWidths(tuple(range(self.shape.num_heads)), tuple(range(self.shape.intermediate_size)))
        evidence = {"model": fingerprint(self.model), "num_layers": self.shape.num_layers}
        return WidthPlan(
            self.shape, (widths,) * self.shape.num_layers, tuple(range(self.shape.hidden_size)), "", evidence
        )

    @functools.cached_property
    def _counts(self) -> dict[str, int]:
        """Counts of vectors, biases and other parameters, from which the number of parameters is computed."""
        first = self._parts[0]
        embeddings = {id(p): p for p in self.embeddings()}
        layer_norms = sum(map(count_parameters, self.hidden_vectors(self.layered.layers[0])))
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
        """Returns the number of parameters of each unit of a layer, biases included.

        Args:
            hidden: Number of hidden dimensions; None for that of the dense model.

        Returns:
            For a "head" (query head: its rows of q_proj, its columns of o_proj), a "kv_head" (its rows of
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
        """Returns the number of parameters that a plan leaves, without building a model.

        `unit` is "parameters" for the whole model, or "decoder_parameters" without embeddings and head.
        """
        sizes = [(len(w.heads), len(plan.kv_heads(i)), len(w.channels)) for i, w in enumerate(plan.layers)]
        return self.parameters_of(sizes, len(plan.hidden), unit)

    def parameters_of(
        self, sizes: Sequence[tuple[int, int, int]], hidden: int, unit: str = "parameters"
    ) -> int:
        """Returns the parameters of a model with these query heads, KV heads and channels in each layer."""
        check_known("unit", unit, UNITS, PlanError)
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

    def savings(self, plan: WidthPlan) -> dict[str, dict[str, int]]:
        """Returns what a plan saves, in the format of `ModelSizes.savings`, without building a model."""
        sizes, shape, hidden = ModelSizes(self.model), self.shape, len(plan.hidden)
        before = sizes.counts(range(shape.num_layers))
        kv_heads = [len(plan.kv_heads(layer)) for layer in range(shape.num_layers)]
        rows = sum(
            2 * shape.head_dim * (len(widths.heads) + count) + 3 * len(widths.channels)
            for widths, count in zip(plan.layers, kv_heads, strict=True)
        )  # of the linears of all layers, those along the hidden state
        parameters = self.parameters(plan)
        after = {
            "layers": shape.num_layers,
            "decoder_parameters": self.parameters(plan, "decoder_parameters"),
            "parameters": parameters,
            "kv_bytes_per_token": before["kv_bytes_per_token"]
            * sum(kv_heads)
            // (shape.num_layers * shape.num_kv_heads),
            "flops_per_token": 2 * hidden * (rows + sizes.head_macs // shape.hidden_size),
            "disk_bytes": parameters * (before["disk_bytes"] // before["parameters"]),
        }
        return changes(before, after)

    def config_takes(self, hidden: int, heads: int, kv_heads: int) -> bool:
        """Whether a config of this type allows these widths: in Llama, heads must divide the hidden size."""
        config = copy.deepcopy(self.layered.config)
        config.head_dim, config.hidden_size = self.shape.head_dim, hidden
        config.num_attention_heads, config.num_key_value_heads = heads, kv_heads
        try:
            config.validate()  # as transformers does before it saves or loads a config
        except StrictDataclassError:
            return False
        return True

    def embeddings(self) -> list[nn.Parameter]:
        """Returns the weights of embedding and output head; if they are tied, the same tensor twice."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return [module.weight for module in modules if module is not None]

    def hidden_vectors(self, root: nn.Module) -> Iterator[Any]:
        """Yields the modules whose parameters are all vectors along the hidden state: the norms."""
        for module in root.modules():
            own = dict(module.named_parameters(recurse=False))
            vectors = all(tuple(p.shape) == (self.shape.hidden_size,) for p in own.values())
            if own and vectors and not isinstance(module, nn.Linear | nn.Embedding):
                yield module

    @contextmanager
    def masked(self, plan: WidthPlan) -> Iterator[None]:
        """Inside the block, heads and channels that a plan removes give zeros, as if they were pruned.

        Hidden dimensions are not masked: without some of them the norms change, which no mask can imitate.
        """
        with ExitStack() as hooks:
            for layer, widths in enumerate(plan.layers):
                parts = self._parts[layer]
                kept = {
                    parts.o_proj: head_entries(widths.heads, self.shape.head_dim),
                    parts.down_proj: torch.tensor(widths.channels),
                }
                for module, indices in kept.items():
                    mask = torch.zeros_like(module.weight[0])
                    mask[indices.to(mask.device)] = 1
                    hooks.enter_context(
                        module.register_forward_pre_hook(
                            lambda _, args, mask=mask: (args[0] * mask, *args[1:])
                        )
                    )
            yield


def _sizes(shape: WidthShape) -> dict[str, tuple[int, int]]:
    """Returns name -> (out_features, in_features) of the seven linears."""
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


def head_entries(heads: Sequence[int], head_dim: int) -> Tensor:
    """Returns the rows or columns of a linear that belong to some heads of `head_dim` entries."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
