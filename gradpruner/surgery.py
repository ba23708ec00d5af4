"""Carrying out a plan on a model in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gradpruner.errors import PlanError
from gradpruner.family import LayeredModel, fingerprint
from gradpruner.merging import Source, merge_linear
from gradpruner.plan import PruningPlan
from gradpruner.trace import GradientTrace


def prune_(
    model: nn.Module,
    plan: PruningPlan,
    trace: GradientTrace | None = None,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Merges and removes layers of a model in place.

    Only linears are merged; biases, layer norms and q/k norms of the retained layer stay as they are.
    Memory beyond the model: about 1.5 times the largest linear in float32, see `merge_linear`.

    Args:
        model: A Hugging Face causal LM of a known family, without adapters.
        plan: What to do with every layer.
        trace: The recorded gradients; needed when the plan merges.
        progress: Called with the name of each linear as it is merged.

    Returns:
        The same model object, with fewer layers and a config that says so.

    Raises:
        PlanError: If the plan is for another model or depth, or merges without a fitting trace. The
            model is untouched then.

    Source: GradPruner, section 3.2; released code `process_important.py`.
    """
    if hasattr(model, "peft_config"):
        raise PlanError(
            "The model carries adapters; pruning under them would silently misplace them.",
            hint="Call merge_and_unload() or unload() first.",
        )
    view = LayeredModel(model)
    identity = fingerprint(model)
    plan.check_model(view.num_layers, identity)
    if plan.merged:
        _check_trace(plan, trace, view, identity)
    if trace is not None:
        for target, layers in plan.merged.items():
            _merge_layers_(view, target, layers, plan, trace, progress)
    view.keep_layers(plan.keep)
    return model


def _check_trace(
    plan: PruningPlan, trace: GradientTrace | None, view: LayeredModel, identity: str
) -> None:
    """Everything that could fail while merging, before the first weight changes."""
    if trace is None:
        raise PlanError(
            f"The plan merges {sum(map(len, plan.merged.values()))} layers, which needs the recorded "
            "gradients.",
            hint="Pass the trace, or plan with num_merge=0.",
        )
    check_trace_model(trace, view, identity)
    if not trace.has_factors:
        raise PlanError(
            "The plan merges layers but this trace holds layer energies only.",
            hint="Record again with keep_factors=True, or plan with num_merge=0.",
        )
    for target, layers in plan.merged.items():
        for layer in layers:
            if set(view.linears(layer)) != set(view.linears(target)):
                raise PlanError(
                    f"Layers {layer} and {target} do not have the same linears and cannot be merged.",
                    hint="Drop the layer instead (action: drop).",
                )


def check_trace_model(trace: GradientTrace, view: LayeredModel, identity: str) -> None:
    """Raises PlanError unless the trace was recorded on this model."""
    if trace.info.num_layers != view.num_layers:
        raise PlanError(
            f"The trace was recorded on {trace.info.num_layers} layers; this model has "
            f"{view.num_layers}.",
            hint="Record on this model.",
        )
    if trace.info.model and trace.info.model != identity:
        raise PlanError(
            f"The trace was recorded on model {trace.info.model}; this is {identity}.",
            hint="Record on this model.",
        )
    for layer in range(view.num_layers):
        for name, module in view.linears(layer).items():
            weight = module.weight
            recorded = [r for r in trace.info.linears if r.layer == layer and r.name == name]
            shape = (weight.shape[0], weight.shape[1])  # type: ignore[index]
            if not recorded or (recorded[0].out_features, recorded[0].in_features) != shape:
                raise PlanError(
                    f"The trace holds no gradients for '{name}' of layer {layer} with shape {shape}.",
                    hint="Record on this model with LoRA on every linear of every layer.",
                )


@torch.no_grad()
def _merge_layers_(
    view: LayeredModel,
    target: int,
    layers: tuple[int, ...],
    plan: PruningPlan,
    trace: GradientTrace,
    progress: Callable[[str], None] | None,
) -> None:
    """Adds the linears of `layers` into those of `target`; sign tests use the original target."""
    sources = {layer: view.linears(layer) for layer in layers}
    for name, module in view.linears(target).items():
        if progress is not None:
            progress(f"layer {target} {name}")
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        merged = merge_linear(
            weight,
            [_source(sources[layer][name], trace, layer, name) for layer in layers],
            rule=plan.rule,
            density=plan.density,
            target_factors=trace.factors(target, name) if plan.rule == "fisher" else None,
        )
        weight.copy_(merged)


def _source(module: nn.Module, trace: GradientTrace, layer: int, name: str) -> Source:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return Source(weight, trace.factors(layer, name))
