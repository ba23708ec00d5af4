"""Layer-importance methods, one file each. A new one is one file and one line here."""

from gradpruner.methods import (
    angular,
    block_influence,
    gradpruner,
    laco,
    last,
    magnitude,
    random_layers,
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
    "block_influence",
    "gradpruner",
    "laco",
    "last",
    "magnitude",
    "random_layers",
    "shortgpt",
    "sleb",
]
