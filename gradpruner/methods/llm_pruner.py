"""LLM-Pruner: prunes the same share of KV heads and MLP channels in every layer of a middle range."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field

from gradpruner.common.errors import DataError, PlanError
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions
from gradpruner.methods.taylor import Batch, TaylorSalience
from gradpruner.methods.width_choice import UnitScores, budget_facts, descending, most_important, share_out
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import LayerWidths, WidthPlan


class LLMPrunerOptions(MethodOptions):
    """Options of LLM-Pruner."""

    taylor: Literal["param_first", "param_second", "param_mix"] = "param_first"
    """Salience of a weight: |w g|, |w a w| or |w g - 0.5 w a w|; g gradient, a mean squared gradient."""
    num_samples: int = Field(default=10, ge=1)
    """Training samples whose loss is differentiated."""
    max_tokens: int = Field(default=64, ge=2)
    """Tokens used of each sample, from its beginning."""
    first_layer: int | None = Field(default=None, ge=0)
    """First layer that may be pruned; null does not prune the first eighth."""
    last_layer: int | None = Field(default=None, ge=0)
    """Last layer that may be pruned; null does not prune the last sixteenth."""
    layers_at_once: int = Field(default=1, ge=1)
    """Layers whose mean squared gradients `param_mix` holds at a time; more is faster and takes memory."""


def plan(context: MethodContext) -> WidthPlan:
    """Removes the units with the smallest `sum |s|`, where s is the salience of a weight (`TaylorSalience`).

    Units are MLP channels, and KV heads with all query heads that share them (`unit_scores`). Only layers of
    a middle range that are not protected are pruned: all but the first L/8 and the last L/16 of L layers,
    halves rounded up, which is 4 to 29 of 32. Each loses the same share of its units (`share_out`): floor(p
    K) of K KV heads, and channels for the rest. If channels do not divide evenly among the layers, the layers
    whose next channel is least salient lose one more. The budget is met to half a channel.

    Memory: the model, the activations of one pass over `num_samples * max_tokens` tokens, and the gradient of
    one linear; with `param_mix` also 4 bytes per weight of `layers_at_once` layers.

    The layers of the result have different widths: it loads through this package, and no engine serves it.

    Raises:
        PlanError: If the layers that may be pruned do not have so many parameters to lose.
        DataError: If no sample has at least two tokens.
        ModelError: If heads and channels cannot be told apart.
        NonFiniteError: If a gradient is NaN or infinite.

    Source: LLM-Pruner (Ma et al., 2023), "block-wise" pruning; released code, `llama3.py` and `hf_prune.py`.
    """
    options: LLMPrunerOptions = context.options or LLMPrunerOptions()
    num_remove = context.budget()
    view = WidthView(context.floating_model())
    layers = layers_to_prune(view.shape.num_layers, options, context.protected)
    kv_heads, channels = share_out(view.shape, view.unit_parameters(), len(layers), num_remove)
    batch, singles = _batches(context, options, next(view.model.parameters()).device)
    found = TaylorSalience(view, options.taylor, options.layers_at_once).measure(layers, batch, singles)
    chosen = dict(zip(layers, _choose(view, found, kv_heads, channels), strict=True))
    whole = view.whole()
    result = replace(
        whole,
        layers=tuple(chosen.get(i, widths) for i, widths in enumerate(whole.layers)),
        method="llm_pruner",
    )
    evidence: dict[str, Any] = {
        **whole.evidence,
        **options.model_dump(),
        "samples": len(singles),
        "tokens": int(batch["attention_mask"].sum()),
        "pruned_layers": layers,
        **budget_facts(view, result, context),
        "removed_kv_heads": kv_heads,
        "removed_channels": [view.shape.intermediate_size - len(chosen[i].channels) for i in layers],
        "kv_head_scores": [one.kv_heads_K.tolist() for one in found],
    }
    return replace(result, evidence=evidence)


def layers_to_prune(num_layers: int, options: LLMPrunerOptions, protected: tuple[int, ...] = ()) -> list[int]:
    """Returns the layers to prune, ascending: 4 to 29 of 32, 2 to 14 of 16, without protected layers.

    Raises:
        PlanError: If there are none, or an end of the range is not a layer of the model.
    """
    first = (num_layers + 4) // 8 if options.first_layer is None else options.first_layer
    kept_last = (num_layers + 8) // 16
    last = num_layers - 1 - kept_last if options.last_layer is None else options.last_layer
    if max(first, last) >= num_layers:
        raise PlanError(
            f"LLM-Pruner was asked to prune layers {first} to {last}; the model has layers 0 to "
            f"{num_layers - 1}.",
            hint="Correct methods.llm_pruner.first_layer and last_layer.",
        )
    layers = [layer for layer in range(first, last + 1) if layer not in protected]
    if not layers:
        raise PlanError(
            f"No layer is left to prune: LLM-Pruner prunes layers {first} to {last} of {num_layers} that are "
            "not protected.",
            hint="Set methods.llm_pruner.first_layer and last_layer, or protect fewer layers.",
        )
    return layers


def _batches(
    context: MethodContext, options: LLMPrunerOptions, device: torch.device
) -> tuple[Batch, list[Batch]]:
    """Returns all calibration samples as one batch, and each as its own batch; all tokens are learned."""
    samples = []
    for index in range(min(options.num_samples, len(context.samples))):
        ids = list(context.samples[index]["input_ids"])[: options.max_tokens]
        if len(ids) > 1:  # a single token predicts nothing
            samples.append({"input_ids": ids, "labels": ids})
    if not samples:
        raise DataError(
            "LLM-Pruner differentiates the loss of training samples with two tokens, and there are none.",
            hint="Give rows with longer texts.",
        )

    def batch_of(some: list[dict[str, list[int]]]) -> Batch:
        return {name: tensor.to(device) for name, tensor in context.collator(some).items()}

    return batch_of(samples), [batch_of([sample]) for sample in samples]


def _choose(view: WidthView, found: list[UnitScores], kv_heads: int, channels: int) -> list[LayerWidths]:
    """Returns what the pruned layers keep when each loses `kv_heads`, and all together `channels`."""
    shape = view.shape
    each, over = divmod(channels, len(found))
    order = [descending(one.channels_C) for one in found]
    # Score of the channel each layer would lose next; of equal layers, the last one loses it.
    next_scores = [float(one.channels_C[units[-1 - each]]) for one, units in zip(found, order, strict=True)]
    more = set(sorted(range(len(found)), key=lambda i: (next_scores[i], -i))[:over])
    return [
        LayerWidths(
            shape.heads_of(most_important(one.kv_heads_K, shape.num_kv_heads - kv_heads)),
            most_important(one.channels_C, shape.intermediate_size - each - (i in more)),
        )
        for i, one in enumerate(found)
    ]


METHODS.register("llm_pruner")(
    Method(
        "LLM-Pruner: prunes KV heads and channels of least Taylor salience, layer by layer",
        plan=plan,
        options=LLMPrunerOptions,
        label="LLM-Pruner",
        uniform=False,
    )
)
