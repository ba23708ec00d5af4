"""Control: prunes random layers."""

import torch

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext


def score(context: MethodContext) -> LayerScores:
    """Returns independent uniform scores, drawn with the run's seed."""
    generator = torch.Generator().manual_seed(context.seed)
    values = torch.rand(context.num_layers, generator=generator, dtype=torch.float64)
    evidence = {"num_layers": context.num_layers, "seed": context.seed}
    return LayerScores("random", tuple(values.tolist()), evidence=evidence)


METHODS.register("random")(
    Method("control: random layers, drawn with the seed", score, label="Random layers dropped")
)
