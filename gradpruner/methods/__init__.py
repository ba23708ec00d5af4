"""Layer-importance methods, one file each. A new one is one file and one line here."""

from gradpruner.methods import (
    angular,
    block_influence,
    gradpruner,
    gradpruner_width,
    last,
    llm_pruner,
    magnitude,
    random_layers,
    sleb,
)
from gradpruner.methods.base import METHODS, Method, MethodContext

__all__ = [
    "METHODS",
    "Method",
    "MethodContext",
    "angular",
    "block_influence",
    "gradpruner",
    "gradpruner_width",
    "last",
    "llm_pruner",
    "magnitude",
    "random_layers",
    "sleb",
]
