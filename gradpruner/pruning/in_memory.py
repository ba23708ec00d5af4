"""Applies a plan to a model in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.gradients.importance import Factors
from gradpruner.gradients.trace import QUANTISED, GradientTrace
from gradpruner.models.config_patch import check_keep
from gradpruner.models.layers import LayeredModel, fingerprint, refuse_adapters
from gradpruner.models.proof import probe_logits, relative_error, tolerance
from gradpruner.models.restoring import modes_kept
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.merging import Source, merge_linear
from gradpruner.plans.repair import Repair

log = logging.getLogger("gradpruner.pruning.in_memory")


def prune_(
    model: nn.Module,
    plan: PruningPlan,
    trace: GradientTrace | None = None,
    progress: Callable[[str], None] | None = None,
    repair: Repair | None = None,
) -> nn.Module:
    """Merges, repairs and removes layers of a model in place.

    Only linears are merged; biases, layer norms and q/k norms of the kept layer stay as they are.
    Memory beyond the model: about 1.5 times the largest linear in float32, see `merge_linear`.

    Args:
        model: A Hugging Face causal LM of a known family, without adapters.
        plan: What to do with every layer.
        trace: The recorded gradients; needed if the plan merges by them.
        progress: Called with the name of each linear as it is merged.
        repair: The repair fitted for this plan (`fit_repair`); its weights replace those of the refitted
            layers.

    Returns:
        The same model object, with fewer layers and a matching config.

    Raises:
        PlanError: If the plan is for another model or depth, if it needs a trace that is missing or of
            another model, if the repair was fitted for another plan or model, or if the model has adapters.
        IntegrityError: If a file of the trace is missing or damaged. Both are raised before the first weight
            changes.
        ModelError: If the model type is unknown and pruning changes what the kept layers compute; the model
            is unusable then.

    Source: GradPruner, section 3.2; released code `process_important.py`.
    """
    refuse_adapters(model, "pruning under them would silently misplace them")
    view = LayeredModel(model)
    identity = fingerprint(model)
    plan.check_model(view.num_layers, identity)
    for warning in check_keep(view.config, view.family, plan):
        log.warning("%s", warning)
    shapes = shapes_of(view)
    if repair is not None:
        repair.check(plan, identity)
        found = {layer: (name, view.weight(layer, name)) for layer, name in repair.linears.items()}
        repair.check_shapes({i: {n: tuple(w.shape)} for i, (n, w) in found.items() if w is not None})
    if plan.merged:
        if identity.endswith(QUANTISED):
            raise PlanError(
                "The model is quantised; its layers can be dropped but not merged.",
                hint="Plan with num_merge: 0, or prune the unquantised model.",
            )
        check_merging(plan, trace, shapes, identity)
        _merge_layers_(view, plan, trace, progress)
    if repair is not None:
        _repair_(view, repair)
    if view.family.proven:
        view.keep_layers(plan)
    else:
        _keep_proven(view, plan)
    return model


@torch.no_grad()
def _merge_layers_(
    view: LayeredModel,
    plan: PruningPlan,
    trace: GradientTrace | None,
    progress: Callable[[str], None] | None,
) -> None:
    """Merges pruned layers into the kept ones in place; removes nothing."""
    linears = {layer: view.weights(layer) for layer in range(view.num_layers)}
    for target in sorted(plan.merged.keys() & set(plan.keep), reverse=True):
        for name, weight in linears[target].items():
            if progress is not None:
                progress(f"layer {target} {name}")
            originals = {layer: found[name] for layer, found in linears.items() if name in found}
            weight.copy_(merge_planned(plan, trace, target, name, originals.__getitem__))


@contextmanager
def as_pruned(model: nn.Module, plan: PruningPlan, repair: Repair | None = None) -> Iterator[None]:
    """Inside the block, a model computes what it would after `prune_`; afterwards it is as before.

    Memory: a copy of the weights that the repair replaces.

    Args:
        model: A Hugging Face causal LM of a known family, without adapters.
        plan: Which layers are left out; it must not merge any.
        repair: The repair fitted for this plan (`fit_repair`), or None.

    Raises:
        PlanError: If the plan merges layers, or if plan or repair belong to another model.
    """
    if plan.merged:
        raise PlanError("A model cannot act as if layers were merged.", hint="Use prune_ on a copy.")
    view, identity = LayeredModel(model), fingerprint(model)
    plan.check_model(view.num_layers, identity)
    saved: list[tuple[Tensor, Tensor]] = []
    if repair is not None:
        repair.check(plan, identity)
        found = [view.weight(layer, name) for layer, name in repair.linears.items()]
        saved = [(weight, weight.detach().clone()) for weight in found if weight is not None]
    try:
        if repair is not None:
            _repair_(view, repair)
        with view.passed_through(plan.pruned):
            yield
    finally:
        with torch.no_grad():
            for weight, before in saved:
                weight.copy_(before)


def shapes_of(view: LayeredModel) -> dict[int, dict[str, tuple[int, ...]]]:
    """Returns layer -> path of a linear -> (out_features, in_features)."""
    return {i: {n: tuple(w.shape) for n, w in view.weights(i).items()} for i in range(view.num_layers)}


@torch.no_grad()
def _repair_(view: LayeredModel, repair: Repair) -> None:
    """Sets the refitted weights."""
    for layer, name in repair.linears.items():
        weight = view.weight(layer, name)
        assert weight is not None  # its shape was checked
        weight.copy_(repair.weights[layer])


@torch.no_grad()
def _keep_proven(view: LayeredModel, plan: PruningPlan) -> None:
    """Removes layers of an unknown model type; proves that the kept ones compute the same as before."""
    with modes_kept(view.model):
        view.model.eval()
        with view.passed_through(plan.pruned):
            expected = probe_logits(view.model)
        view.keep_layers(plan)
        error = relative_error(probe_logits(view.model), expected)
    if not error <= tolerance(next(view.model.parameters()).dtype):
        raise ModelError(
            f"Model type '{view.config.model_type}' is not known, and pruning it by the general rule changes "
            f"what the kept layers compute (relative error {error:.1e}). The model in memory is unusable.",
            hint="Add a row to gradpruner/models/families.py that names the config fields which depend on "
            "position.",
        )
    log.info("Model type '%s' has no row; pruning it was checked: %.1e.", view.config.model_type, error)


def check_merging(
    plan: PruningPlan,
    trace: GradientTrace | None,
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]],
    identity: str,
) -> None:
    """Checks everything that could make merging fail, before the first weight changes.

    Args:
        plan: A plan that merges layers.
        trace: The recorded gradients, if the plan's rule needs them.
        shapes: Layer -> linear -> (out_features, in_features).
        identity: Fingerprint of the model; "" if it is unknown.

    Raises:
        PlanError: If merged layers have different linears, or a trace is needed that is missing or of another
            model.
        IntegrityError: If a file of the trace is missing or damaged.
    """
    if not plan.needs_trace:
        check_same_linears(plan, shapes)
        return
    if trace is None:
        count = sum(map(len, plan.merged.values()))
        raise PlanError(
            f"The plan merges {count} layers, which needs the recorded gradients.",
            hint="Pass the trace, or plan with num_merge=0.",
        )
    trace.check_model(len(shapes), identity)
    if not trace.has_factors:
        raise PlanError(
            "The plan merges layers but this trace holds layer energies only.",
            hint="Record again with keep_factors=True, or plan with num_merge=0.",
        )
    check_same_linears(plan, shapes)
    for target, layers in plan.merged.items():
        for layer in (*layers, target) if plan.rule == "fisher" else layers:
            _check_recorded(shapes, layer, trace)
    trace.check_factors()


def check_same_linears(plan: PruningPlan, shapes: Mapping[int, Mapping[str, tuple[int, ...]]]) -> None:
    """Raises PlanError unless every merged layer has the same linears as its target."""
    for target, layers in plan.merged.items():
        for layer in layers:
            if shapes[layer] != shapes[target]:
                raise PlanError(
                    f"Layers {layer} and {target} do not have the same linears and cannot be merged.",
                    hint="Drop the layer instead (action: drop).",
                )


def _check_recorded(
    shapes: Mapping[int, Mapping[str, tuple[int, ...]]], layer: int, trace: GradientTrace
) -> None:
    """Raises PlanError unless every linear of a layer was recorded."""
    recorded = {
        ref.name: (ref.out_features, ref.in_features) for ref in trace.info.linears if ref.layer == layer
    }
    for name, shape in shapes[layer].items():
        if recorded.get(name) != shape:
            raise PlanError(
                f"The model's '{name}' of layer {layer} has shape {shape}; the trace holds gradients for "
                f"{recorded.get(name, 'no such linear')}.",
                hint="Record on this model with LoRA on every linear (target_modules='all-linear'), or plan "
                "with num_merge=0.",
            )


def merge_planned(
    plan: PruningPlan,
    trace: GradientTrace | None,
    target: int,
    name: str,
    weight: Callable[[int], Tensor],
) -> Tensor:
    """Computes one linear of a merge target; a merged layer may itself be a target of others.

    `weight` returns that linear of a layer as it was before merging.
    """

    def factors(layer: int) -> Factors | None:
        return trace.factors(layer, name) if trace is not None and plan.needs_trace else None

    def merged_weight(layer: int) -> Tensor:
        merged_itself = layer in plan.merged
        return merge_planned(plan, trace, layer, name, weight) if merged_itself else weight(layer)

    return merge_linear(
        weight(target),
        [Source(merged_weight(layer), factors(layer)) for layer in plan.merged[target]],
        rule=plan.rule,
        density=plan.density,
        target_factors=factors(target) if plan.rule == "fisher" else None,
    )
