"""Plans made from scores and the recipe's budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradpruner.gradients.scores import LayerScores
from gradpruner.models.config_patch import required_layers
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import BUDGETS
from gradpruner.plans.selection import plan_pruning

if TYPE_CHECKING:
    from gradpruner.runs.job.inputs import Inputs


def placeholder_scores(num_layers: int) -> LayerScores:
    """Returns scores for computing a budget: how many layers go does not depend on the scores."""
    return LayerScores("placeholder", tuple(map(float, range(num_layers))))


def plan_for(
    inputs: Inputs,
    scores: LayerScores,
    merging: bool,
    chosen_by_method: dict[str, Any] | None = None,
    num_prune: int | None = None,
) -> PruningPlan:
    """Returns the plan by these scores and the recipe's budget.

    Args:
        inputs: Holds the recipe and the model's structure.
        scores: One per layer.
        merging: Whether layers may be merged; if not, all pruned layers are dropped.
        chosen_by_method: Keys of the plan section that the method sets itself, instead of the recipe.
        num_prune: Layers to prune, instead of the recipe's budget.

    Raises:
        PlanError: If no such plan is possible.
    """
    options = inputs.recipe.plan
    changes = ({} if merging else {"num_merge": 0}) | (chosen_by_method or {})
    changes["protect"] = sorted({*options.protect, *required_layers(inputs.text, inputs.family)})
    if num_prune is not None:
        changes |= dict.fromkeys(BUDGETS) | {"num_prune": num_prune}
    by_size = num_prune is None and options.parameter_fraction is not None
    return plan_pruning(
        scores,
        options,
        layer_parameters=inputs.sizes.layer_parameters if by_size else None,
        total_parameters=inputs.sizes.parameters if by_size else None,
        fits=inputs.slots(),
        kinds=inputs.layer_kinds if merging else None,
        **changes,
    )
