"""Pruning methods, one file or folder each. To add one, write its file and add its name to the list below.

base           Method, its options, and what it is given to decide by
Choosing layers
    gradpruner, gate, either, task_loss, auto, shortgpt, angular, sleb, magnitude, last, random_layers
    candidates     the pool of plans that `auto` compares
Merging layers
    laco
Narrowing layers
    gradpruner_width, llm_pruner, minitron_width
    taylor         the salience of heads and channels that llm_pruner uses
    width_choice   from scores of rows and columns to heads and channels
Training differently
    minitron_depth, apt, sat, longer
calibration    calibration batches, and running the model on them
"""

from importlib import import_module

from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions

__all__ = ["METHODS", "Method", "MethodContext", "MethodOptions"]

for _name in (
    "angular", "apt.apt", "auto", "either", "gate", "gradpruner", "gradpruner_width", "laco", "last",
    "llm_pruner", "longer", "magnitude", "minitron_depth", "minitron_width", "random_layers", "sat.sat",
    "shortgpt", "sleb", "task_loss",
):  # fmt: skip
    import_module(f"{__name__}.{_name}")  # registers itself in METHODS
