"""Progress of long steps, shown on standard error.

On a terminal, a bar with the remaining time. Elsewhere (log file, CI, batch job), occasional plain lines:

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

# Global, because how progress is shown is a property of the process, not of one step.
_mode: Mode = "auto"
# The innermost step now running; a run's status page shows it.
_current: Progress | None = None

# A plain line is printed when another tenth is done, or after a wait. The wait grows with the elapsed time,
# so that a run of ten hours does not print seven thousand lines. The shortest gap separates any two lines.
_LINE_FRACTION = 0.1
_WAIT_SECONDS = 5.0
_WAIT_OF_ELAPSED = 0.05
_SHORTEST_GAP_SECONDS = 1.0


def set_mode(mode: Mode) -> None:
    """Sets how this process shows progress.

    "auto" draws a bar on a terminal and prints plain lines elsewhere; "quiet" shows nothing.
    """
    global _mode
    _mode = mode


def current_progress() -> Progress | None:
    """Returns the progress of the innermost step now running, or None between steps."""
    return _current


def clock_text(seconds: float) -> str:
    """Formats a duration as "mm:ss", or "h:mm:ss" from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Progress:
    """Context manager that shows the progress of one step.

    Example:
        with Progress(120, "finetune merged") as progress:
            for step in range(1, 121):
                progress.update(step, loss=1.23)

    Args:
        total: Number of units of work.
        description: A few words on what is being done.
        stream: Where to write; standard error by default.
        clock: Returns a time in seconds; only differences matter.
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
        """What training has logged, such as {"step": ..., "loss": ...}; empty for other steps."""
        self.rate: Callable[[], float] | None = None
        """Returns the training speed in token positions per second; None for other steps."""
        self._outer: Progress | None = None
        self._bar: RichProgress | None = None
        self._plain = False
        self._line_time = self._started
        self._line_completed = 0

    def __enter__(self) -> Progress:
        global _current
        self._outer, _current = _current, self
        self._started = self._line_time = self._clock()
        if _mode == "quiet" or self.total == 0:
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
        global _current
        if _current is self:
            _current = self._outer
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif self._plain:
            took = clock_text(self._clock() - self._started)
            self._print(f"{'done in' if kind is None else 'stopped after'} {took}")
        self._plain = False

    def update(self, completed: int, **fields: object) -> None:
        """Reports that `completed` units are done in total, including skipped ones.

        `fields` are numbers or words to show next to the count, such as `loss=1.23`. They stay until new ones
        are given.
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
        """Reports that `count` more units are done. `fields` are as in `update`."""
        self.update(self.completed + count, **fields)

    def skip(self, count: int) -> None:
        """Counts units as done without counting them in the speed, such as those done before a resume."""
        self.completed += count
        self._skipped += count
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], completed=self.completed)

    def _open_bar(self) -> RichProgress | None:
        """Starts a bar and returns it, or returns None if the stream cannot show one."""
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
            # Older versions of rich draw one bar at a time. An inner step falls back to plain lines.
            return None
        return bar

    def _line_due(self) -> bool:
        """Returns whether it is time to print the next plain line."""
        now = self._clock()
        waited = now - self._line_time
        if self.completed == self.total or waited < _SHORTEST_GAP_SECONDS:
            return False  # `__exit__` prints the closing line
        if waited >= max(_WAIT_SECONDS, _WAIT_OF_ELAPSED * (now - self._started)):
            return True
        return self.completed - self._line_completed >= _LINE_FRACTION * self.total

    def seconds_left(self) -> float | None:
        """Returns the estimated remaining seconds, or None if nothing is done yet."""
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
    """Yields the items and shows how many are done."""
    with Progress(len(items), description) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def show_bytes(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """Shows progress in mebibytes; yields a function to call with the bytes done since its last call."""
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done // 2**20)

    with Progress(max(1, total // 2**20), f"{description} [MiB]") as progress:
        yield report
