"""Two models measured in turns, so that what the machine does meanwhile meets both alike."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from gradpruner.errors import ResourceError
from gradpruner.evaluation.costing.subject import Subject
from gradpruner.evaluation.costing.worker import Worker
from gradpruner.evaluation.costing.workload import Workload

# Two models that do not fit into memory at once are each loaded this often, in turns.
VISITS = 2


@dataclass(frozen=True)
class Cell:
    """What was measured of one model in one mode.

    Attributes:
        seconds: Times by name, in the order measured, warm-up left out.
        peak_bytes: Peak memory of every process: of the device on CUDA, else all that was resident.
        rise_bytes: The same above the process before it had a model.
        kind: "cuda" or "rss".
        error: Why it could not be measured; "" when it could.
    """

    seconds: dict[str, tuple[float, ...]]
    peak_bytes: tuple[float, ...] = ()
    rise_bytes: tuple[float, ...] = ()
    kind: str = ""
    error: str = ""


def measure_pair(
    pair: tuple[Subject, Subject],
    mode: str,
    workload: Workload,
    *,
    together: bool,
    advance: Callable[[], None],
) -> tuple[Cell, Cell]:
    """Measures both models in one mode, each in a process of its own.

    Args:
        pair: The dense and the pruned model.
        mode: One of `workload.MODES`.
        workload: What is run.
        together: Hold both models and take turns step by step, first the one, then the other first (A B,
            B A, A B ...). Else each is loaded twice, in turns, for half of the steps.
        advance: Called after every step.

    Returns:
        A cell for either; one that fails leaves the other to go on alone.
    """
    if together:
        runs = [_Run(subject, mode, workload, advance) for subject in pair]
        _take_turns(runs)
        return runs[0].cell(), runs[1].cell()
    cells = (Cell({}), Cell({}))
    for visit in range(min(VISITS, workload.repeats)):
        share = workload.repeats // VISITS + (visit < workload.repeats % VISITS)
        part = replace(workload, repeats=share)
        dense, pruned = (
            _visit(subject, mode, part, advance, cell) for subject, cell in zip(pair, cells, strict=True)
        )
        cells = (dense, pruned)
    return cells


class _Run:
    """One process and what it has said."""

    def __init__(self, subject: Subject, mode: str, workload: Workload, advance: Callable[[], None]) -> None:
        self.worker = Worker(subject, mode, workload)
        self.workload = workload
        self._advance = advance
        self._times: list[dict[str, float]] = []
        self._memory: dict[str, float | str] = {}
        self._error = ""

    def attempt(self, action: Callable[[], None]) -> None:
        """Does something with the process unless it has failed; notes a failure."""
        if self._error:
            return
        try:
            action()
        except ResourceError as error:
            self._error = error.message

    def step(self) -> None:
        """One step."""
        self._times.append(self.worker.step())
        self._advance()

    def finish(self) -> None:
        """What the process says at its end."""
        self._memory = self.worker.finish()

    def cell(self) -> Cell:
        """All of it, warm-up left out; nothing but the error after a failure."""
        if self._error:
            return Cell({}, error=self._error)
        measured = self._times[self.workload.warmup :]
        names = measured[0]
        peak, empty = float(self._memory["peak_bytes"]), float(self._memory["empty_bytes"])
        return Cell(
            {name: tuple(one[name] for one in measured) for name in names},
            (peak,),
            (peak - empty,),
            str(self._memory["kind"]),
        )


def _visit(
    subject: Subject, mode: str, workload: Workload, advance: Callable[[], None], before: Cell
) -> Cell:
    """One more visit to a model, added to what was measured before; none after a failure."""
    if before.error:
        return before
    run = _Run(subject, mode, workload, advance)
    _take_turns([run])
    return _join(before, run.cell())


def _take_turns(runs: list[_Run]) -> None:
    with ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.worker)
        for run in runs:
            run.attempt(run.worker.wait_ready)
        for step in range(runs[0].workload.steps):
            for run in runs if step % 2 == 0 else reversed(runs):
                run.attempt(run.step)
        for run in runs:
            run.attempt(run.finish)


def _join(first: Cell, second: Cell) -> Cell:
    """Both visits as one cell; a failed visit spoils it."""
    if second.error:
        return second
    names = second.seconds
    return Cell(
        {name: first.seconds.get(name, ()) + second.seconds[name] for name in names},
        first.peak_bytes + second.peak_bytes,
        first.rise_bytes + second.rise_bytes,
        second.kind,
    )
