"""Pruning methods, one file each. A new one is one file and one line here."""

from gradpruner.methods import (
    angular,
    apt,
    gradpruner,
    laco,
    last,
    magnitude,
    minitron_depth,
    minitron_width,
    random_layers,
    sat,
    shortgpt,
    sleb,
)
from gradpruner.methods.base import METHODS, Method, MethodContext, MethodOptions

__all__ = [
    "METHODS",
    "Method",
    "MethodContext",
    "MethodOptions",
    "angular",
    "apt",
    "gradpruner",
    "laco",
    "last",
    "magnitude",
    "minitron_depth",
    "minitron_width",
    "random_layers",
    "sat",
    "shortgpt",
    "sleb",
]
