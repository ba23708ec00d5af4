"""Prunes the last layers before the final one: a control for tuned models, and what effort `fast` removes."""

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext


def score(context: MethodContext) -> LayerScores:
    """Returns scores that fall with depth; the final layer, which feeds the head, has the highest."""
    top = float(context.num_layers)
    values = [top - layer for layer in range(context.num_layers)]
    values[-1] = top + 1
    return LayerScores("last", tuple(values), evidence={"num_layers": context.num_layers})


METHODS.register("last")(
    Method(
        "the last layers before the final one; what effort fast removes", score, label="Last layers dropped"
    )
)
