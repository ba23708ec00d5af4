"""Measures two orders in turns, each in its own process, so that load on the machine affects both equally.

Each order has its own process because a process's peak memory never goes down again, and because a model that
does not fit must not crash anything else. The processes are started with `subprocess`, because
`multiprocessing` would run the caller's script again in each of them.
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

from gradpruner.common.world import without_launcher
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.workload import Workload

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_END_SECONDS = 30.0


class Order(NamedTuple):
    """What one process measures: a model in one of `workload.MODES` or in `workload.RECORDING`.

    The process sees no GPU except the workload's.
    """

    subject: Subject
    mode: str
    workload: Workload


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model in one mode.

    Attributes:
        values: Name -> values in the order measured; {} after a failure. Times are in seconds, without those
            of warm-up. "peak_bytes" is a single value: the peak of the memory allocated on CUDA, or of
            resident memory (RSS) on other devices. "rise_bytes" is the peak minus the RSS before the process
            had a model; on CUDA it equals the peak.
        kind: "cuda" or "rss", the kind of the peak; "" after a failure.
        error: Why the measurement failed; "" if it did not.
    """

    values: dict[str, tuple[float, ...]]
    kind: str = ""
    error: str = ""


def measure_pair(
    pair: tuple[Order, Order], advance: Callable[[], None] = lambda: None
) -> tuple[Measurement, Measurement]:
    """Measures two orders step by step, alternating which goes first: A B, B A, A B ...

    Args:
        pair: Two orders with the same number of steps, e.g. the dense and the pruned model in one mode, or
            one model with two workloads.
        advance: Called after every step.

    Returns:
        The measurements in the order of `pair`; if one fails, the other is still measured.
    """
    with ExitStack() as stack:
        one, other = (stack.enter_context(Worker(order)) for order in pair)
        for worker in (one, other):
            worker.receive()  # the worker says that its model is loaded
        for step in range(pair[0].workload.steps):
            for worker in (one, other) if step % 2 == 0 else (other, one):
                if worker.step():
                    advance()
        return one.finish(), other.finish()


class Worker:
    """A process that carries out one order; a context manager that always ends the process.

    Attributes:
        error: Why the process failed; "" if it did not. After a failure it gets no more requests.
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
        self._pipe, remote_end = Pipe()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with remote_end:
            start = f"from gradpruner.evaluation.costing.worker import main; main({remote_end.fileno()})"
            self._process = Popen(
                [sys.executable, "-c", start],
                stdin=DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=self._environment,
                pass_fds=[remote_end.fileno()],
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
        """Runs one step in the process and keeps its times in seconds; returns False after a failure."""
        self._send("go")
        self._times.append(self.receive())
        return not self.error

    def finish(self) -> Measurement:
        """Returns what was measured; to be called after the last step."""
        memory = self.receive()
        if self.error:
            return Measurement({}, error=self.error)
        measured = self._times[self._order.workload.warmup :]
        values = {name: tuple(one[name] for one in measured) for name in measured[0]}
        peak, empty = float(memory["peak_bytes"]), float(memory["empty_bytes"])
        return Measurement(values | {"peak_bytes": (peak,), "rise_bytes": (peak - empty,)}, memory["kind"])

    def receive(self) -> dict[str, Any]:
        """Returns the next message from the process; {} after a failure."""
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
            with suppress(OSError):  # the process died; `receive` finds out why
                self._pipe.send(message)

    def _last_words(self) -> str:
        """Returns why the process ended without an answer."""
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
    """Returns the environment of a process that can import this package and sees one GPU only.

    That is the GPU in `device`, or the first one if none is named. With several GPUs in sight, a Trainer
    would spread every batch over all of them.
    """
    environment = without_launcher(os.environ)
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
