"""GradPruner: make an open LLM about 40 % smaller for your own task.

    trace = gradpruner.record_gradients(model, dataset, steps=40)   # or GradientRecorder() in any Trainer
    scores = gradpruner.score_layers(trace)
    plan = gradpruner.plan_pruning(scores, num_prune=13, num_merge=3)
    repair = gradpruner.fit_repair(model, plan, dataset, collator)   # the linears before the cuts, refitted
    gradpruner.prune_(model, plan, trace, repair=repair)             # in memory, in place
    gradpruner.prune_checkpoint("src", "dst", plan, trace)           # streaming, on disk

Names are loaded when first used; importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradpruner._version import __version__

if TYPE_CHECKING:
    from gradpruner.data.encoding import encode_all
    from gradpruner.data.examples import Example, load_examples
    from gradpruner.errors import GradPrunerError
    from gradpruner.evaluation.costing.comparison import measure_cost
    from gradpruner.evaluation.costing.workload import Workload
    from gradpruner.evaluation.quality import evaluate
    from gradpruner.gradients.importance import element_importance
    from gradpruner.gradients.scores import LayerScores, score_layers
    from gradpruner.gradients.trace import GradientTrace
    from gradpruner.methods.gate import score_gates
    from gradpruner.models.loading import load_model
    from gradpruner.models.narrowing import prune_width_
    from gradpruner.plans.layer_plan import PruningPlan
    from gradpruner.plans.merging import merge_linear
    from gradpruner.plans.repair import Repair
    from gradpruner.plans.selection import plan_pruning
    from gradpruner.plans.width_plan import WidthPlan
    from gradpruner.pruning.delta import diff_checkpoint
    from gradpruner.pruning.in_memory import prune_
    from gradpruner.pruning.on_disk import prune_checkpoint
    from gradpruner.pruning.rebuilding import rebuild_checkpoint
    from gradpruner.pruning.refitting import fit_repair
    from gradpruner.pruning.verification import verify_checkpoint
    from gradpruner.runs.pipeline import run
    from gradpruner.runs.recipe import Recipe, load_recipe
    from gradpruner.training.finetuning import finetune
    from gradpruner.training.recording import GradientRecorder, record_gradients

_HOMES = {
    "Example": "data.examples",
    "GradPrunerError": "errors",
    "GradientRecorder": "training.recording",
    "GradientTrace": "gradients.trace",
    "LayerScores": "gradients.scores",
    "PruningPlan": "plans.layer_plan",
    "Recipe": "runs.recipe",
    "Repair": "plans.repair",
    "WidthPlan": "plans.width_plan",
    "Workload": "evaluation.costing.workload",
    "diff_checkpoint": "pruning.delta",
    "element_importance": "gradients.importance",
    "encode_all": "data.encoding",
    "evaluate": "evaluation.quality",
    "finetune": "training.finetuning",
    "fit_repair": "pruning.refitting",
    "load_examples": "data.examples",
    "load_model": "models.loading",
    "load_recipe": "runs.recipe",
    "measure_cost": "evaluation.costing.comparison",
    "merge_linear": "plans.merging",
    "plan_pruning": "plans.selection",
    "prune_": "pruning.in_memory",
    "prune_checkpoint": "pruning.on_disk",
    "prune_width_": "models.narrowing",
    "rebuild_checkpoint": "pruning.rebuilding",
    "record_gradients": "training.recording",
    "run": "runs.pipeline",
    "score_gates": "methods.gate",
    "score_layers": "gradients.scores",
    "verify_checkpoint": "pruning.verification",
}

__all__ = [
    "Example",
    "GradPrunerError",
    "GradientRecorder",
    "GradientTrace",
    "LayerScores",
    "PruningPlan",
    "Recipe",
    "Repair",
    "WidthPlan",
    "Workload",
    "__version__",
    "diff_checkpoint",
    "element_importance",
    "encode_all",
    "evaluate",
    "finetune",
    "fit_repair",
    "load_examples",
    "load_model",
    "load_recipe",
    "measure_cost",
    "merge_linear",
    "plan_pruning",
    "prune_",
    "prune_checkpoint",
    "prune_width_",
    "rebuild_checkpoint",
    "record_gradients",
    "run",
    "score_gates",
    "score_layers",
    "verify_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradpruner' has no attribute '{name}'")
    return getattr(import_module(f"gradpruner.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
