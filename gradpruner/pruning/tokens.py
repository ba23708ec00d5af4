"""The tokens a repair is fitted on: who has them, which are held out, and how much each counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradpruner.common.world import World
from gradpruner.data.encoding import IGNORED
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import BATCH_SIZE, Walk

HELD_OUT = 5
"""One sample in so many is not fitted on: the ridge is chosen by it."""


class Tokens:
    """The batches that this process walks, and what counts in them.

    Args:
        view: The model.
        batches: Of all processes, see `Walk`.
        answers: Share of all weight that the positions before answer tokens have at least, in [0, 1).
        world: The processes.

    Attributes:
        walk: Over this process's batches.
    """

    def __init__(
        self, view: LayeredModel, batches: Sequence[dict[str, Tensor]], answers: float, world: World
    ) -> None:
        mine = [i for i in world.share(len(batches)) if batches[i]["attention_mask"][:, 1:].any()]
        # A process without batches walks the first one with nothing counted: all take part in every cut.
        self.walk = Walk(view, [batches[i] for i in mine or (0,)])
        if not mine:
            self.walk.counted[0].zero_()
        self.world = world
        self._first_number = [i * BATCH_SIZE for i in mine or (0,)]
        self._answered = [_answered(batches[i]) for i in mine or (0,)]
        total = sum(int(batch["attention_mask"][:, 1:].sum()) for batch in batches)
        asked = sum(int(_answered(batch)[:, 1:].sum()) for batch in batches)
        more = answers / (1 - answers) * (total - asked) / max(asked, 1)
        self._more = max(more, 1.0) if asked else 1.0
        self._mean = (self._more * asked + total - asked) / max(total, 1)

    def parts(self, batch: int) -> tuple[Tensor, Tensor]:
        """Which tokens of a batch are fitted, and which are held out; (samples, tokens), bool."""
        counted, number = self.walk.counted[batch], self._first_number[batch]
        numbers = torch.arange(number, number + len(counted)).to(counted.device)
        held_out = (numbers % HELD_OUT == 0)[:, None].expand_as(counted)
        return counted & ~held_out, counted & held_out

    def weights(self, batch: int, sample: Tensor, token: Tensor) -> Tensor:
        """How much tokens of a batch count, one on average, float64."""
        answered = self._answered[batch][sample, token]
        return torch.where(answered, self._more, 1.0).to(torch.float64) / self._mean


def _answered(batch: dict[str, Tensor]) -> Tensor:
    """The positions whose next token is one of the answer, (samples, tokens), bool."""
    found = torch.zeros_like(batch["labels"], dtype=torch.bool)
    found[:, :-1] = batch["labels"][:, 1:] != IGNORED
    return found
