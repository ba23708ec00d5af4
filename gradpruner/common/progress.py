"""How far along a long step is, on standard error.

On a terminal a bar with the time left; elsewhere (a log file, CI, a batch job) plain lines, few
enough to read:

    finetune merged 40/120 loss 1.23 ETA 00:41
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, TextIO, TypeVar

from rich.console import Console
from rich.errors import LiveError
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

T = TypeVar("T")
Mode = Literal["auto", "quiet"]

# Global state: where and how progress shows is a property of the process, not of one step.
_mode: Mode = "auto"
# The step this process is at, the innermost of several: the server shows it.
_in_hand: Progress | None = None

# A plain line appears when a tenth more is done, or after a wait. The wait grows with the run, so
# that a run of ten hours does not print seven thousand lines; steps under the shortest gap share a
# line.
_LINE_FRACTION = 0.1
_WAIT_SECONDS = 5.0
_WAIT_OF_ELAPSED = 0.05
_SHORTEST_GAP_SECONDS = 1.0


def set_mode(mode: Mode) -> None:
    """Chooses how progress shows in this process.

    "auto" draws a bar on a terminal and prints plain lines elsewhere; "quiet" shows nothing.
    """
    global _mode
    _mode = mode


def in_hand() -> Progress | None:
    """The step this process is at, the innermost of several; None between steps."""
    return _in_hand


def clock_text(seconds: float) -> str:
    """Formats a duration as "mm:ss", or "h:mm:ss" from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Progress:
    """Progress of one step; a context manager.

    Example:
        with Progress(120, "finetune merged") as progress:
            for step in range(1, 121):
                progress.update(step, loss=1.23)

    Args:
        total: Number of units until done.
        description: What is being done, a few words.
        stream: Where to write; standard error by default.
        clock: Returns seconds; only differences matter.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.description = description
        self.completed = 0
        self._skipped = 0
        self._stream = stream if stream is not None else sys.stderr
        self._clock = clock
        self._started = clock()
        self.fields: dict[str, object] = {}
        self.history: list[dict[str, Any]] = []
        """What a training logged, {"step": ..., "loss": ...} among it; of other steps nothing."""
        self.rate: Callable[[], float] | None = None
        """Token positions a second, of a training."""
        self._outer: Progress | None = None
        self._bar: RichProgress | None = None
        self._plain = False
        self._line_time = self._started
        self._line_completed = 0

    def __enter__(self) -> Progress:
        global _in_hand
        self._outer, _in_hand = _in_hand, self
        self._started = self._line_time = self._clock()
        if _mode == "quiet" or self.total == 0:  # nothing to do needs no line
            return self
        self._bar = self._open_bar()
        self._plain = self._bar is None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _in_hand
        if _in_hand is self:
            _in_hand = self._outer
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._plain:
            took = clock_text(self._clock() - self._started)
            self._print(f"{'done in' if kind is None else 'stopped after'} {took}")
        self._plain = False

    def update(self, completed: int, **fields: object) -> None:
        """Reports that `completed` units are done in all, skipped ones included.

        Fields are numbers or words to show beside, such as `loss=1.23`; the last ones given stay.
        """
        self.completed = completed
        if fields:
            self.fields = fields
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=completed, total=self.total, fields_text=self._fields_text())
        elif self._plain and self._line_due():
            left = self.seconds_left()
            passed = self._clock() - self._started
            self._print(f"after {clock_text(passed)}" if left is None else f"ETA {clock_text(left)}")

    def advance(self, count: int = 1, **fields: object) -> None:
        """Reports that `count` more units are done; `fields` as in `update`."""
        self.update(self.completed + count, **fields)

    def skip(self, count: int) -> None:
        """Counts units that were done before the start, as after a resume; they do not count in the speed."""
        self.completed += count
        self._skipped += count
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], completed=self.completed)

    def _open_bar(self) -> RichProgress | None:
        """Starts a bar if the stream is a terminal that can draw one."""
        console = Console(file=self._stream)
        if not console.is_terminal or console.is_dumb_terminal:
            return None
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[fields_text]}", markup=False),
            TimeRemainingColumn(),
            console=console,
        )
        bar.add_task(escape(self.description), total=self.total, fields_text="")
        try:
            bar.start()
        except LiveError:
            # Older rich draws one bar at a time: a bar inside a bar falls back to lines.
            return None
        return bar

    def _line_due(self) -> bool:
        """Tells whether enough happened since the last line."""
        now = self._clock()
        waited = now - self._line_time
        if self.completed == self.total or waited < _SHORTEST_GAP_SECONDS:
            return False  # The closing line says it.
        if waited >= max(_WAIT_SECONDS, _WAIT_OF_ELAPSED * (now - self._started)):
            return True
        return self.completed - self._line_completed >= _LINE_FRACTION * self.total

    def seconds_left(self) -> float | None:
        """How long it will still take; None when there is no telling."""
        done = self.completed - self._skipped
        if done <= 0:
            return None
        return (self._clock() - self._started) / done * (self.total - self.completed)

    def _fields_text(self) -> str:
        values = (f"{value:.4g}" if isinstance(value, float) else value for value in self.fields.values())
        return " ".join(f"{name} {value}" for name, value in zip(self.fields, values, strict=True))

    def _print(self, ending: str) -> None:
        """Writes one plain line."""
        words = (self.description, f"{self.completed}/{self.total}", self._fields_text(), ending)
        print(" ".join(word for word in words if word), file=self._stream, flush=True)
        self._line_time = self._clock()
        self._line_completed = self.completed


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Yields the items, showing how many are done."""
    with Progress(len(items), description) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def show_bytes(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Shows progress in megabytes; yields a function to call with the bytes done since its last call."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done // 10**6)

    with Progress(max(1, total // 10**6), f"{description} [MB]") as progress:
        yield report
