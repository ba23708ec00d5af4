"""The tokens a repair is fitted on: which process has them, which are held out, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradpruner.common.world import World
from gradpruner.data.encoding import IGNORED
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import BATCH_SIZE, Walk

HELD_OUT = 5
"""One sample in this many is held out; the ridge is chosen on those."""


class Tokens:
    """The batches that this process walks, and the weights of their tokens.

    Args:
        view: The dense model, in evaluation mode.
        batches: The batches of all processes, see `Walk`.
        answers: Share of a sample's weight that its tokens get by their influence on its answer, in [0, 1).
        world: The processes.
        first: The first layer after which weights are asked for.
        progress: Called while influences are computed, in all with the number of layers of the model.

    Attributes:
        walk: The walk over this process's batches.
    """

    def __init__(
        self,
        view: LayeredModel,
        batches: Sequence[dict[str, Tensor]],
        answers: float,
        world: World,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        mine = [i for i in world.share(len(batches)) if batches[i]["attention_mask"][:, 1:].any()]
        # A process without batches walks the first one and counts no token: all must take part in every cut.
        walked = mine or [0]
        self.walk = Walk(view, [batches[i] for i in walked])
        if not mine:
            self.walk.counted[0].zero_()
        self.world, self.answers = world, answers
        self._first_number = [i * BATCH_SIZE for i in walked]
        self._influences: list[dict[int, Tensor]] = []
        for batch, number in enumerate(self._first_number if answers else ()):
            self._influences.append(influences(self.walk, batch, first, seed=number))
            if progress is not None:
                done = [view.num_layers * n // len(walked) for n in (batch, batch + 1)]
                progress(done[1] - done[0])

    def parts(self, batch: int) -> tuple[Tensor, Tensor]:
        """Returns which tokens of a batch are fitted and which are held out; (samples, tokens), bool."""
        counted, number = self.walk.counted[batch], self._first_number[batch]
        numbers = torch.arange(number, number + len(counted)).to(counted.device)
        held_out = (numbers % HELD_OUT == 0)[:, None].expand_as(counted)
        return counted & ~held_out, counted & held_out

    def weights(self, layer: int, batch: int, sample: Tensor, token: Tensor) -> Tensor:
        """Returns the weights of tokens of a batch after a layer, 1 on average over each sample, float64."""
        if not self.answers:
            return torch.ones(len(sample), dtype=torch.float64)
        influence = self._influences[batch][layer][sample.cpu(), token.cpu()]
        return 1 - self.answers + self.answers * influence


@torch.no_grad()
def influences(walk: Walk, batch: int, first: int, seed: int) -> dict[int, Tensor]:
    """Returns how much the answers depend on each token's hidden state after each layer.

    For a token's state h after a layer, this is |h|^2 E|J^T v|^2. J is the derivative, by h, of the last
    layer's states at the positions before answer tokens, each divided by its length, and v is a random vector
    of variance 1; one is drawn. So it is the squared change of these states by a change of h of a given size
    relative to h, and no label decides how much a sample counts.

    Memory: the states of the batch after every layer, and what one layer keeps for its backward pass. Time:
    a forward pass, and a forward and a backward pass of the layers behind `first`.

    Args:
        walk: The walk over the batches.
        batch: Number of the batch.
        first: The first layer wanted.
        seed: Seeds the random vector.

    Returns:
        Layer -> (samples, tokens), float64, 1 on average over the tokens of a sample that count, and 0 for
        those that do not. All 1 in samples without an answer.
    """
    layers = range(first, walk.view.num_layers)
    states = {-1: walk.start[batch]}
    for layer in range(walk.view.num_layers):
        states[layer] = walk.layer_on(layer, batch, states[layer - 1])
        if layer <= first:
            del states[layer - 1]
    last = states[layers[-1]]
    asked = _answered(walk.batches[batch]) & walk.counted[batch]
    noise = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed))
    lengths = last.float().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    gradient = (noise.to(lengths) * asked[..., None] / lengths).to(last.dtype)
    found = {}
    for layer in reversed(layers):
        energy = gradient.float().square().sum(-1) * states[layer].float().square().sum(-1)
        found[layer] = _shares(energy.cpu().double(), walk.counted[batch].cpu())
        if layer > first:
            gradient = walk.pulled(layer, batch, states[layer - 1], gradient)
    return found


def _shares(energy: Tensor, counted: Tensor) -> Tensor:
    """Returns energies divided by their mean over the tokens of each sample that count."""
    energy = energy * counted
    total, number = energy.sum(1, keepdim=True), counted.sum(1, keepdim=True)
    return torch.where(total == 0, counted.double(), energy * number / total.clamp_min(1e-300))


def _answered(batch: dict[str, Tensor]) -> Tensor:
    """Returns the positions whose next token belongs to the answer, (samples, tokens), bool."""
    found = torch.zeros_like(batch["labels"], dtype=torch.bool)
    found[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return found
