"""Gate: runs the steps of a measurement one at a time, and times them."""

from __future__ import annotations

import json
import time
from typing import Any, TextIO

import torch

from gradpruner.evaluation.costing.workload import Workload

# The first tokens of a vocabulary are often special (padding, end): not ordinary input.
_FIRST_PLAIN_TOKEN = 3


class Gate:
    """Lets one step through at a time and times it; the only place with a clock.

    Args:
        device: The device that is waited for before the clock is read: its kernels run behind Python's back.
        commands: One line for every step that may run.
        replies: Where times go.
    """

    def __init__(self, device: torch.device, commands: TextIO, replies: TextIO) -> None:
        self.device, self._commands, self._replies = device, commands, replies
        self._ready = False
        self._started = 0.0

    def start(self) -> None:
        """Waits until the next step may run, and starts the clock."""
        if not self._ready:
            self.say(ready=True)
            self._ready = True
        if not self._commands.readline():
            raise SystemExit(0)  # whoever asked is gone
        self._started = self._now()

    def seconds(self) -> float:
        """Seconds since `start`, all work of the device included."""
        return self._now() - self._started

    def say(self, **reply: Any) -> None:
        """Sends one reply."""
        print(json.dumps(reply), file=self._replies, flush=True)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def random_ids(model: Any, workload: Workload, *, rows: int) -> list[list[int]]:
    """Ordinary token ids of a model's vocabulary, shape (rows, tokens)."""
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(workload.seed)
    first = min(_FIRST_PLAIN_TOKEN, vocabulary - 1)
    ids: list[list[int]] = torch.randint(
        first, vocabulary, (rows, workload.tokens), generator=generator
    ).tolist()
    return ids
