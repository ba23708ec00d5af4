"""GradPruner: make an open LLM about 40 % smaller for your own task.

    result = gradpruner.prune("my-tuned-model", rows)     # rows: [{"prompt": ..., "completion": ...}, ...]
    print(result)                                         # the layers removed, and what that saves
    result.save("smaller")                                # a plain Hugging Face folder

The whole job
    prune                prunes a tuned model for the task given by rows
    Pruned               the result of prune: the pruned model, its plan, scores and repair
    load_recipe          reads a recipe from a file, from values, or both
    Recipe               everything a run depends on
    dry_run              shows what a run would do, without loading weights
    run                  records, scores, plans, prunes, fine-tunes, evaluates, reports
    compare              runs several methods at the same budget over several seeds, in one table

Choosing layers
    record_gradients     records the LoRA gradients of the first fine-tuning steps
    GradientRecorder     records them inside your own Trainer, as a callback
    GradientTrace        the recorded gradients
    score_layers         scores the importance of every layer from a trace
    score_gates          scores layers by how leaving each one out changes the loss
    LayerScores          one number per layer, with its interval
    plan_pruning         makes a plan from scores and a budget
    PruningPlan          keep, drop or merge, for every layer
    WidthPlan            which heads, channels and hidden dimensions stay

Pruning and repair
    fit_repair           refits linears after the cut, in closed form, on rows of the task
    Repair               the refitted weights
    prune_               prunes layers of a model in memory, in place
    prune_width_         prunes widths of a model in memory, in place
    prune_checkpoint     prunes a model folder into a new one, by streaming
    verify_checkpoint    checks that a pruned folder is what its plan says
    diff_checkpoint      stores a pruned folder as a small difference from the dense one
    rebuild_checkpoint   rebuilds the pruned folder from the dense one and the difference, to the bit

Training and measuring
    finetune             fine-tunes a model on encoded rows
    evaluate             scores the answers of a model to rows
    measure_cost         measures time and memory of a dense and a pruned model, side by side
    Workload             what measure_cost runs

Rows and models
    load_examples        loads the rows of a file, folder or hub dataset as examples
    Example              a prompt and its answer
    encode_all           encodes examples as token ids and labels
    load_model           loads a causal LM from a checked folder

Pieces of the method
    element_importance   importance of every entry of a linear, from its recorded gradients
    merge_linear         merges linears of removed layers into the same linear of a kept layer

Errors
    GradPrunerError      base class of every error raised on purpose

Each name is loaded when it is first used. Importing the package loads nothing else.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradpruner.common.version import __version__

if TYPE_CHECKING:
    from gradpruner.common.errors import GradPrunerError
    from gradpruner.data.encoding import encode_all
    from gradpruner.data.examples import Example
    from gradpruner.data.loading import load_examples
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
    from gradpruner.pruning.repair.refitting import fit_repair
    from gradpruner.pruning.verification import verify_checkpoint
    from gradpruner.runs.before.preview import dry_run
    from gradpruner.runs.pipeline import run
    from gradpruner.runs.recipe.recipe import Recipe, load_recipe
    from gradpruner.runs.shrinking import Pruned, prune
    from gradpruner.runs.study.comparing import compare
    from gradpruner.training.finetuning import finetune
    from gradpruner.training.recording import GradientRecorder, record_gradients

# Importing peft imports bitsandbytes, which warns about a missing 4-bit kernel that only QLoRA would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "Example": "data.examples",
    "GradPrunerError": "common.errors",
    "GradientRecorder": "training.recording",
    "GradientTrace": "gradients.trace",
    "LayerScores": "gradients.scores",
    "Pruned": "runs.shrinking",
    "PruningPlan": "plans.layer_plan",
    "Recipe": "runs.recipe.recipe",
    "Repair": "plans.repair",
    "WidthPlan": "plans.width_plan",
    "Workload": "evaluation.costing.workload",
    "compare": "runs.study.comparing",
    "diff_checkpoint": "pruning.delta",
    "dry_run": "runs.before.preview",
    "element_importance": "gradients.importance",
    "encode_all": "data.encoding",
    "evaluate": "evaluation.quality",
    "finetune": "training.finetuning",
    "fit_repair": "pruning.repair.refitting",
    "load_examples": "data.loading",
    "load_model": "models.loading",
    "load_recipe": "runs.recipe.recipe",
    "measure_cost": "evaluation.costing.comparison",
    "merge_linear": "plans.merging",
    "plan_pruning": "plans.selection",
    "prune": "runs.shrinking",
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
    "Pruned",
    "PruningPlan",
    "Recipe",
    "Repair",
    "WidthPlan",
    "Workload",
    "__version__",
    "compare",
    "diff_checkpoint",
    "dry_run",
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
    "prune",
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
