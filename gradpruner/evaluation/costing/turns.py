"""Two things measured in turns, each in a process of its own, so that a busy machine slows both alike.

A process of its own, because memory that a process once held counts in its peak for ever after, and because a
model that does not fit should take nothing else with it. The processes are started by `subprocess` and not by
`multiprocessing`, which would run the caller's script once more in each of them.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import Any, NamedTuple

from gradpruner.common.world import alone
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.workload import Workload

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_END_SECONDS = 30.0


class Order(NamedTuple):
    """What one process measures: a mode of `workload.MODES`, or `workload.RECORDING`, of a model.

    The device of the workload is the only one the process sees.
    """

    subject: Subject
    mode: str
    workload: Workload


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model in one mode.

    Attributes:
        values: Times in seconds by name, in the order measured, warm-up left out; "peak_bytes", one value:
            peak memory on CUDA of the device, else of all that was resident; "rise_bytes": the same above
            the process before it had a model. {} if it could not be measured.
        kind: "cuda" or "rss"; "" where nothing was measured.
        error: Why it could not be measured; "" when it could.
    """

    values: dict[str, tuple[float, ...]]
    kind: str = ""
    error: str = ""


def measure_pair(
    pair: tuple[Order, Order], advance: Callable[[], None] = lambda: None
) -> tuple[Measurement, Measurement]:
    """Measures two orders with the same number of steps; each goes first in turn: A B, B A, A B ...

    Args:
        pair: Such as the dense and the pruned model in one mode, or one model in two ways.
        advance: Called after every step.

    Returns:
        What was measured of either; if one fails, the other goes on alone.
    """
    with ExitStack() as stack:
        one, other = (stack.enter_context(Worker(order)) for order in pair)
        for worker in (one, other):
            worker.receive()  # it has loaded its model
        for step in range(pair[0].workload.steps):
            for worker in (one, other) if step % 2 == 0 else (other, one):
                if worker.step():
                    advance()
        return one.finish(), other.finish()


class Worker:
    """A process that carries out one order; it ends with the `with` block, whatever happens.

    Attributes:
        error: Why it failed; "" while it works. After a failure, nothing is asked of it any more.
    """

    def __init__(self, order: Order) -> None:
        self.error = ""
        device = order.workload.device
        self._environment = worker_environment(device)
        if self._environment.get("CUDA_VISIBLE_DEVICES") and device.startswith("cuda"):
            order = order._replace(workload=replace(order.workload, device="cuda"))
        self._order = order
        self._times: list[dict[str, float]] = []

    def __enter__(self) -> Worker:
        self._pipe, theirs = Pipe()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with theirs:
            start = f"from gradpruner.evaluation.costing.worker import main; main({theirs.fileno()})"
            self._process = Popen(
                [sys.executable, "-c", start],
                stdin=DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=self._environment,
                pass_fds=[theirs.fileno()],
            )
        self._send(self._order)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.kill()
        self._pipe.close()
        try:
            self._process.wait(_END_SECONDS)
        except TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def step(self) -> bool:
        """Has it run one step and keeps the times, in seconds; False if it has failed."""
        self._send("go")
        self._times.append(self.receive())
        return not self.error

    def finish(self) -> Measurement:
        """What was measured, after the last step; only the error after a failure."""
        memory = self.receive()
        if self.error:
            return Measurement({}, error=self.error)
        measured = self._times[self._order.workload.warmup :]
        values = {name: tuple(one[name] for one in measured) for name in measured[0]}
        peak, empty = float(memory["peak_bytes"]), float(memory["empty_bytes"])
        return Measurement(values | {"peak_bytes": (peak,), "rise_bytes": (peak - empty,)}, memory["kind"])

    def receive(self) -> dict[str, Any]:
        """What the process says next; {} once it has failed."""
        if self.error:
            return {}
        try:
            reply: dict[str, Any] = self._pipe.recv()
        except (EOFError, OSError):
            reply = {"error": self._last_words()}
        self.error = reply.get("error", "")
        return reply

    def _send(self, message: Any) -> None:
        if not self.error:
            with suppress(OSError):  # it died; `receive` says of what
                self._pipe.send(message)

    def _last_words(self) -> str:
        """Why the process ended without an answer."""
        code = self._process.wait()
        if code == -9:
            return (
                "The process was killed, most likely because memory ran out: measure one mode at a time "
                "(--mode), in another type (--dtype bfloat16), or look at sizes alone (--dry-run)."
            )
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().splitlines() if line.strip()]
        return f"The process ended with code {code}: {lines[-1] if lines else 'no message'}"


def worker_environment(device: str) -> dict[str, str]:
    """Variables of a process that finds this package and sees one GPU: the one named, else the first.

    A Trainer that sees several spreads every batch over all of them.
    """
    environment = alone(os.environ)
    paths = [_PACKAGE_PARENT, environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if device == "auto" or device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else []
        if visible is None or number < len(devices):
            environment["CUDA_VISIBLE_DEVICES"] = devices[number] if devices else str(number)
    return environment
