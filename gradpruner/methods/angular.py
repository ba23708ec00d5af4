"""Angular distance (Gromov et al.): the block of layers that turns the last token's state least goes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gradpruner.gradients.scores import LayerScores
from gradpruner.methods.base import METHODS, Method, MethodContext
from gradpruner.methods.calibration import calibration_batches, run, watched
from gradpruner.models.layers import LayeredModel


@torch.inference_mode()
def score(context: MethodContext) -> LayerScores:
    """`d(l, n) = mean over samples of arccos(cos(x_l, x_{l+n})) / pi`; the block with the smallest d goes.

    `x_l` is what layer l is given, at a sample's last token, and n the number of layers to prune. `evidence`
    holds d of every block of n layers, `distances[l]` for layers l to l+n-1. A layer's score is the smallest
    d of the candidates it is part of. So the n lowest scores are the best block and nothing else; of blocks
    that turn equally little it is the later one (see `layer_values`).

    A block that touches a protected layer is not a candidate. Layers outside all candidates come after the
    others, protected ones last: 1 or 2 is added to their smallest d, which is at most 1. So where protected
    layers leave no room for a block, and in a plan that prunes another number of layers than n, the pruned
    layers may not be a block (the plan option `contiguous` makes them one). When n is 0, blocks of 1 are
    measured.

    Measured on the first 256 training samples, whose last token is the one that ends the answer.

    Source: The Unreasonable Ineffectiveness of the Deeper Layers (Gromov et al., 2025).
    """
    view = LayeredModel(context.model())
    size = max(1, view.num_layers - context.kept())
    totals = torch.zeros(view.num_layers - size + 1, dtype=torch.float64)
    num_samples = 0
    for batch in calibration_batches(context, view.model):
        states = _last_states(view, batch)
        cosines = cosine_similarity(states[:-size], states[size:], dim=-1).clamp(-1, 1)
        totals += (torch.arccos(cosines) / math.pi).sum(dim=1)
        num_samples += cosines.shape[1]
    distances: list[float] = (totals / num_samples).tolist()
    evidence = {
        "num_layers": view.num_layers,
        "samples": num_samples,
        "block_size": size,
        "distances": distances,
    }
    return LayerScores("angular", tuple(layer_values(distances, size, context.protected)), evidence=evidence)


def layer_values(distances: Sequence[float], size: int, protected: Collection[int] = ()) -> list[float]:
    """The smallest distance of the candidates a layer is part of, for every layer; see `score`.

    The `size` least important layers are then one block with the smallest distance, the last of equal ones:
    its layers have that value, and of layers with equal values `LayerScores.ascending` takes the later first.

    Args:
        distances: Of the blocks that begin at layer 0, 1, ...
        size: Layers in a block, >= 1.
        protected: Layers that no candidate touches.
    """
    last = len(distances) - 1
    free = [not any(layer in protected for layer in range(i, i + size)) for i in range(len(distances))]
    values = []
    for layer in range(len(distances) + size - 1):
        blocks = range(max(0, layer - size + 1), min(layer, last) + 1)
        candidates = [distances[block] for block in blocks if free[block]]
        behind = 0 if candidates else 2 if layer in protected else 1
        values.append(behind + min(candidates or [distances[block] for block in blocks]))
    return values


def _last_states(view: LayeredModel, batch: dict[str, Tensor]) -> Tensor:
    """States at every sample's last token, shape (layers + 1, samples, hidden_size), on the CPU.

    In fp64: near 1 an arccos takes the square root of the rounding of its cosine, 3e-4 in fp32.
    """
    real = batch["attention_mask"].cpu()
    last = real.shape[1] - 1 - real.flip(1).argmax(dim=1)  # wherever the padding is
    rows = torch.arange(len(last))
    states = [torch.empty(0)] * (view.num_layers + 1)

    def see(index: int, before: Tensor, after: Tensor) -> None:
        for place, x in ((index, before), (index + 1, after)):
            states[place] = x[rows, last].cpu().double()

    with watched(view, see):
        run(view.model, batch)
    return torch.stack(states)


METHODS.register("angular")(
    Method(
        "angular distance: the block of layers that turns the hidden state least",
        score,
        label="Angular distance",
    )
)
