"""Pruning methods, one file each. To add one, write its file and add its name to the list below."""

from importlib import import_module

from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions

__all__ = ["METHODS", "Method", "MethodContext", "MethodOptions"]

for _name in (
    "angular", "apt", "auto", "gate", "gradpruner", "gradpruner_width", "laco", "last", "llm_pruner",
    "longer", "magnitude", "minitron_depth", "minitron_width", "random_layers", "sat", "shortgpt", "sleb",
    "task_loss",
):  # fmt: skip
    import_module(f"{__name__}.{_name}")  # registers itself in METHODS
