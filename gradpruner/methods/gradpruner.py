"""GradPruner: scores layers by the energy of their first LoRA gradients."""

from dataclasses import replace

from gradpruner.gradients.scores import LayerScores, score_layers
from gradpruner.methods.base import METHODS, Method, MethodContext


def score(context: MethodContext) -> LayerScores:
    """Returns `sum_k sum_entries 1/t sum_i (gB_i gA_i)**2` per layer. Source: GradPruner, Eq. 2-4."""
    return score_layers(context.trace(), norm=context.norm, num_keep=context.num_keep, seed=context.seed)


def score_released(context: MethodContext) -> LayerScores:
    """Returns `sum_k sum_i ||gB_i gA_i||_F` per layer: norms are not squared, unlike in the paper.

    Together with its plan options, this is the part of the released code that follows a rule: it prunes one
    block of neighbouring layers, keeps the final layer, and merges the highest-scored layers of the block
    into the layer before it, by summing the entries that agree in sign.

    Source: GradPruner, released code `layer_important.py` and `process_important.py`.
    """
    trace = context.trace()
    scores = score_layers(trace, norm="frobenius", num_keep=context.num_keep, seed=context.seed)
    return replace(scores, method="gradpruner_released")


METHODS.register("gradpruner")(
    Method(
        "early LoRA gradient energy (IGIA), the paper's method", score, needs_trace=True, label="GradPruner"
    )
)
METHODS.register("gradpruner_released")(
    Method(
        "GradPruner's released code: Frobenius norms, one block, final layer kept",
        score_released,
        needs_trace=True,
        merges=True,
        plan_options={"contiguous": True, "protect_last": 1, "target": "preceding", "rule": "sum"},
        label="GradPruner, released code",
    )
)
