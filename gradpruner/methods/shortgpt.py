"""ShortGPT: the layers that turn the hidden state least go."""

from dataclasses import replace

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.methods.block_influence import block_influence


def score(context: MethodContext) -> LayerScores:
    """Block influence, see `block_influence.block_influence`; the lowest go at once, neighbours or not.

    The released code reads states where transformers hands them out, the last one after the final norm,
    which favours the last layer; and takes windows of 256 tokens of PG19. Here states are read at the layers,
    on the first 256 training samples.

    Raises:
        DataError: If there are no samples.

    Source: ShortGPT (Men et al., 2025).
    """
    return replace(block_influence(context), method="shortgpt")


METHODS.register("shortgpt")(
    Method("ShortGPT's block influence: how much a layer turns the hidden state", score, label="ShortGPT")
)
