"""Angular distance (Gromov et al.): prunes the block of layers that turns the last token's state least."""

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
    """Scores layers such that the block with the smallest angular distance has the lowest scores.

        d(l, n) = mean over samples of arccos(cos(x_l, x_{l+n})) / pi

    `x_l` is the input of layer l at a sample's last token, and n the number of layers to prune. `evidence`
    holds d of every block of n layers: `distances[l]` is for layers l to l+n-1. The score of a layer is the
    smallest d of the candidate blocks it belongs to. So the n lowest scores are exactly the best block; of
    blocks with equal d it is the last one (see `layer_values`).

    A block that contains a protected layer is not a candidate. Layers outside all candidates rank above the
    others, protected layers highest: 1 or 2 is added to their smallest d, which is at most 1. The pruned
    layers may therefore not be one block if protected layers leave no room for it, or if a plan prunes
    another number of layers than n (the plan option `contiguous` makes them one block). If n is 0, blocks of
    1 layer are measured.

    Measured on the first 256 training samples. Their last token is the one that ends the answer.

    Source: The Unreasonable Ineffectiveness of the Deeper Layers (Gromov et al., 2025).
    """
    view = LayeredModel(context.model())
    size = max(1, context.checked_num_prune())
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
    """Returns for every layer the smallest distance of the candidate blocks it belongs to; see `score`.

    The `size` least important layers are then the block with the smallest distance, or the last one of
    several: all its layers have that value, and `LayerScores.ascending` puts the later of equal layers first.

    Args:
        distances: Distances of the blocks that begin at layer 0, 1, ...
        size: Layers in a block, >= 1.
        protected: Layers that no candidate may contain.
    """
    last = len(distances) - 1
    free = [not any(layer in protected for layer in range(i, i + size)) for i in range(len(distances))]
    values = []
    for layer in range(len(distances) + size - 1):
        blocks = range(max(0, layer - size + 1), min(layer, last) + 1)
        candidates = [distances[block] for block in blocks if free[block]]
        added = 0 if candidates else 2 if layer in protected else 1
        values.append(added + min(candidates or [distances[block] for block in blocks]))
    return values


def _last_states(view: LayeredModel, batch: dict[str, Tensor]) -> Tensor:
    """Returns the states at every sample's last token, shape (layers + 1, samples, hidden_size), on the CPU.

    In fp64: near 1, the error of arccos is the square root of the cosine's rounding error, 3e-4 in fp32.
    """
    real = batch["attention_mask"].cpu()
    last = real.shape[1] - 1 - real.flip(1).argmax(dim=1)  # for padding on either side
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
