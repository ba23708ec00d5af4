"""GradPruner: energy of the first LoRA gradients, summed per layer."""

from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.scores import LayerScores, score_layers


def score(context: MethodContext) -> LayerScores:
    """`sum_k sum_entries 1/t sum_i (gB_i gA_i)**2` per layer. Source: GradPruner, Eq. 2-4."""
    return score_layers(context.trace(), norm=context.norm, num_keep=context.num_keep, seed=context.seed)


METHODS.register("gradpruner")(
    Method("early LoRA gradient energy (IGIA), the paper's method", score, needs_trace=True)
)
