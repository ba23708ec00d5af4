"""The tokens a repair is fitted on: which process has them, which are held out, and their weights."""

from __future__ import annotations

from collections.abc import Sequence

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
        view: The model.
        batches: The batches of all processes, see `Walk`.
        answers: Share of the total weight that positions before answer tokens get at least, in [0, 1).
        world: The processes.

    Attributes:
        walk: The walk over this process's batches.
    """

    def __init__(
        self, view: LayeredModel, batches: Sequence[dict[str, Tensor]], answers: float, world: World
    ) -> None:
        mine = [i for i in world.share(len(batches)) if batches[i]["attention_mask"][:, 1:].any()]
        # A process without batches walks the first one and counts no token: all must take part in every cut.
        walked = mine or [0]
        self.walk = Walk(view, [batches[i] for i in walked])
        if not mine:
            self.walk.counted[0].zero_()
        self.world = world
        self._first_number = [i * BATCH_SIZE for i in walked]
        self._answered = [_answered(batches[i]) for i in walked]
        total = sum(int(batch["attention_mask"][:, 1:].sum()) for batch in batches)
        answered = sum(int(_answered(batch)[:, 1:].sum()) for batch in batches)
        weight = answers / (1 - answers) * (total - answered) / max(answered, 1)
        self._answer_weight = max(weight, 1.0) if answered else 1.0
        self._mean_weight = (self._answer_weight * answered + total - answered) / max(total, 1)

    def parts(self, batch: int) -> tuple[Tensor, Tensor]:
        """Returns which tokens of a batch are fitted and which are held out; (samples, tokens), bool."""
        counted, number = self.walk.counted[batch], self._first_number[batch]
        numbers = torch.arange(number, number + len(counted)).to(counted.device)
        held_out = (numbers % HELD_OUT == 0)[:, None].expand_as(counted)
        return counted & ~held_out, counted & held_out

    def weights(self, batch: int, sample: Tensor, token: Tensor) -> Tensor:
        """Returns the weights of tokens of a batch, 1 on average over all batches, float64."""
        answered = self._answered[batch][sample, token]
        return torch.where(answered, self._answer_weight, 1.0).to(torch.float64) / self._mean_weight


def _answered(batch: dict[str, Tensor]) -> Tensor:
    """Returns the positions whose next token belongs to the answer, (samples, tokens), bool."""
    found = torch.zeros_like(batch["labels"], dtype=torch.bool)
    found[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return found
