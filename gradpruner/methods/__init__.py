"""Pruning methods, one file each. A new one is one file and one line here."""

from gradpruner.methods import (
    angular,
    apt,
    gate,
    gradpruner,
    gradpruner_width,
    laco,
    last,
    llm_pruner,
    magnitude,
    minitron_depth,
    minitron_width,
    random_layers,
    sat,
    shortgpt,
    sleb,
    task_loss,
)
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions

__all__ = [
    "METHODS",
    "Method",
    "MethodContext",
    "MethodOptions",
    "angular",
    "apt",
    "gate",
    "gradpruner",
    "gradpruner_width",
    "laco",
    "last",
    "llm_pruner",
    "magnitude",
    "minitron_depth",
    "minitron_width",
    "random_layers",
    "sat",
    "shortgpt",
    "sleb",
    "task_loss",
]
