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
    from gradpruner.checkpoint import load_model
    from gradpruner.config import Recipe, load_recipe
    from gradpruner.costing.comparison import measure_cost
    from gradpruner.costing.workload import Workload
    from gradpruner.data import Example, load_examples
    from gradpruner.delta import diff_checkpoint, rebuild_checkpoint
    from gradpruner.encoding import encode_all
    from gradpruner.errors import GradPrunerError
    from gradpruner.evaluation import evaluate
    from gradpruner.importance import element_importance
    from gradpruner.merging import merge_linear
    from gradpruner.methods.gate import score_gates
    from gradpruner.narrowing import prune_width_
    from gradpruner.pipeline import run
    from gradpruner.plan import PruningPlan
    from gradpruner.recording import GradientRecorder, record_gradients
    from gradpruner.refitting import fit_repair
    from gradpruner.repair import Repair
    from gradpruner.scores import LayerScores, score_layers
    from gradpruner.selection import plan_pruning
    from gradpruner.streaming import prune_checkpoint
    from gradpruner.surgery import prune_
    from gradpruner.trace import GradientTrace
    from gradpruner.training import finetune
    from gradpruner.verify import verify_checkpoint
    from gradpruner.width_plan import WidthPlan

_HOMES = {
    "Example": "data",
    "GradPrunerError": "errors",
    "GradientRecorder": "recording",
    "GradientTrace": "trace",
    "LayerScores": "scores",
    "PruningPlan": "plan",
    "Recipe": "config",
    "Repair": "repair",
    "WidthPlan": "width_plan",
    "Workload": "costing.workload",
    "diff_checkpoint": "delta",
    "element_importance": "importance",
    "encode_all": "encoding",
    "evaluate": "evaluation",
    "finetune": "training",
    "fit_repair": "refitting",
    "load_examples": "data",
    "load_model": "checkpoint",
    "load_recipe": "config",
    "measure_cost": "costing.comparison",
    "merge_linear": "merging",
    "plan_pruning": "selection",
    "prune_": "surgery",
    "prune_checkpoint": "streaming",
    "prune_width_": "narrowing",
    "rebuild_checkpoint": "delta",
    "record_gradients": "recording",
    "run": "pipeline",
    "score_gates": "methods.gate",
    "score_layers": "scores",
    "verify_checkpoint": "verify",
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
