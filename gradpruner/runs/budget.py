"""What a recipe's budget comes to: plans made from scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gradpruner.gradients.scores import LayerScores
from gradpruner.models.config_patch import required_layers
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.selection import plan_pruning

if TYPE_CHECKING:
    from gradpruner.runs.inputs import Inputs

# Keys of the recipe's plan section that say nothing about which layers go.
REPAIR_KEYS = frozenset({"repair", "repair_rows", "repair_answers", "max_loss", "confidence"})


def placeholder_scores(num_layers: int) -> LayerScores:
    """Scores to work out a budget with: how many layers go does not depend on them."""
    return LayerScores("placeholder", tuple(map(float, range(num_layers))))


def plan_for(
    inputs: Inputs,
    scores: LayerScores,
    merging: bool,
    chosen_by_method: dict[str, Any] | None = None,
    num_prune: int | None = None,
) -> PruningPlan:
    """The recipe's budget, or `num_prune` layers, applied to scores; all are dropped without `merging`.

    Keys of the plan section that a method sets itself (`chosen_by_method`) come before the recipe's.
    """
    options = inputs.recipe.plan
    fractions: dict[str, Any] = {}
    if options.parameter_fraction is not None:
        fractions = {
            "layer_parameters": inputs.sizes.layer_parameters,
            "total_parameters": inputs.sizes.parameters,
        }
    chosen = options.model_dump(exclude={"file", "name", "portable_to", "unit", *REPAIR_KEYS}) | (
        {} if merging else {"num_merge": 0}
    )
    chosen |= chosen_by_method or {}
    if num_prune is not None:
        chosen |= {"num_prune": num_prune, "layer_fraction": None, "parameter_fraction": None, "layers": None}
        fractions = {}
    chosen["protect"] = sorted({*options.protect, *required_layers(inputs.text, inputs.family)})
    if merging:
        chosen["kinds"] = inputs.layer_kinds
    return plan_pruning(scores, **chosen, **fractions, fits=inputs.slots())
