"""Carrying out a plan on a model in memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gradpruner.errors import PlanError
from gradpruner.family import LayeredModel, fingerprint
from gradpruner.merging import Source, merge_linear
from gradpruner.plan import PruningPlan
from gradpruner.trace import GradientTrace, same_model


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
        PlanError: If the plan is for another model or depth, or merges without a fitting trace.
        IntegrityError: If a file of the trace is missing or damaged. Either is raised before the
            first weight changes.

    Source: GradPruner, section 3.2; released code `process_important.py`.
    """
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise PlanError(
            "The model carries adapters; pruning under them would silently misplace them.",
            hint="Call merge_and_unload() or unload() first.",
        )
    view = LayeredModel(model)
    identity = fingerprint(model)
    plan.check_model(view.num_layers, identity)
    if plan.merged:
        checked = _checked_trace(plan, trace, view, identity)
        for target, layers in plan.merged.items():
            _merge_layers_(view, target, layers, plan, checked, progress)
    view.keep_layers(plan.keep)
    return model


def _checked_trace(
    plan: PruningPlan, trace: GradientTrace | None, view: LayeredModel, identity: str
) -> GradientTrace:
    """Everything that could fail while merging, before the first weight changes."""
    if trace is None:
        count = sum(map(len, plan.merged.values()))
        raise PlanError(
            f"The plan merges {count} layers, which needs the recorded gradients.",
            hint="Pass the trace, or plan with num_merge=0.",
        )
    if trace.info.num_layers != view.num_layers:
        raise PlanError(
            f"The trace was recorded on {trace.info.num_layers} layers; this model has {view.num_layers}.",
            hint="Record on this model.",
        )
    if trace.info.model and not same_model(trace.info.model, identity):
        raise PlanError(
            f"The trace was recorded on model {trace.info.model}; this is {identity}.",
            hint="Record on this model.",
        )
    if not trace.has_factors:
        raise PlanError(
            "The plan merges layers but this trace holds layer energies only.",
            hint="Record again with keep_factors=True, or plan with num_merge=0.",
        )
    for target, layers in plan.merged.items():
        for layer in layers:
            _check_linears(view, target, layer, trace)
        if plan.rule == "fisher":
            _check_linears(view, target, target, trace)
    trace.check_factors()
    return trace


def _check_linears(view: LayeredModel, target: int, layer: int, trace: GradientTrace) -> None:
    """Raises PlanError unless every linear of `layer` fits that of `target` and was recorded."""
    shapes = {name: tuple(weight.shape) for name, weight in _weights(view, layer).items()}
    if shapes != {name: tuple(weight.shape) for name, weight in _weights(view, target).items()}:
        raise PlanError(
            f"Layers {layer} and {target} do not have the same linears and cannot be merged.",
            hint="Drop the layer instead (action: drop).",
        )
    recorded = {
        ref.name: (ref.out_features, ref.in_features) for ref in trace.info.linears if ref.layer == layer
    }
    for name, shape in shapes.items():
        if recorded.get(name) != shape:
            raise PlanError(
                f"The model's '{name}' of layer {layer} has shape {shape}; the trace holds gradients for "
                f"{recorded.get(name, 'no such linear')}.",
                hint="Record on this model with LoRA on every linear of every layer.",
            )


def _weights(view: LayeredModel, layer: int) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for name, module in view.linears(layer).items():
        assert isinstance(module.weight, Tensor)
        weights[name] = module.weight
    return weights


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
    sources = {layer: _weights(view, layer) for layer in layers}
    for name, weight in _weights(view, target).items():
        if progress is not None:
            progress(f"layer {target} {name}")
        merged = merge_linear(
            weight,
            [Source(sources[layer][name], trace.factors(layer, name)) for layer in layers],
            rule=plan.rule,
            density=plan.density,
            target_factors=trace.factors(target, name) if plan.rule == "fisher" else None,
        )
        weight.copy_(merged)
