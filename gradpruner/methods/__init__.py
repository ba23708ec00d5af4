"""Layer-importance methods, one file each. A new one is one file and one line here."""

from gradpruner.methods import (
    angular,
    apt,
    block_influence,
    gradpruner,
    last,
    magnitude,
    random_layers,
    sat,
    sleb,
)
from gradpruner.methods.base import METHODS, Method, MethodContext

__all__ = [
    "METHODS",
    "Method",
    "MethodContext",
    "angular",
    "apt",
    "block_influence",
    "gradpruner",
    "last",
    "magnitude",
    "random_layers",
    "sat",
    "sleb",
]
