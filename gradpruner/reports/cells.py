"""Cells, lines and tables of a report as plain data: HTML, terminal and markdown show the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.common.printing import (
    MISSING,
    duration,
    interval,
    num_bytes,
    number,
    percent,
    points,
    ratio,
    signed_percent,
)
from gradpruner.reports.fields import Measured


@dataclass(frozen=True)
class Cell:
    """One value; `detail` is a second, smaller text such as an interval.

    Attributes:
        exact: The unrounded value, shown on hover.
        share: 0-1 draws a bar of that length; None draws none.
        link: Where a click on it leads.
    """

    text: str
    detail: str = ""
    exact: str = ""
    share: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table; `kind` is '', 'main' (set in bold) or 'failed' (see `error`)."""

    cells: tuple[Cell, ...]
    kind: str = ""
    error: str = ""


def line(*cells: Cell | str, kind: str = "", error: str = "") -> Line:
    """A line of cells; plain texts become cells."""
    return Line(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), kind, error)


@dataclass(frozen=True)
class Table:
    """A table; the first column names the line, the others hold numbers unless listed in `words`."""

    caption: str
    columns: tuple[str, ...]
    lines: Sequence[Line]
    words: tuple[str, ...] = ()

    def texts(self, line: Line, failed: str) -> list[str]:
        """The cells of a line as plain texts; of a failed line `failed` in place of its quality."""
        texts = [f"{cell.text} {cell.detail}".strip() for cell in line.cells]
        if line.kind == "failed":
            texts[next((i for i, name in enumerate(self.columns) if name.endswith("]")), 1)] = failed
        return texts


def measured_cell(measured: Measured | None) -> Cell:
    """A metric with its interval; starred where too few examples stand behind it."""
    if measured is None:
        return Cell(MISSING)
    star = "*" if measured.is_small else ""
    shown = interval(measured.low, measured.high)
    return Cell(percent(measured.value) + star, shown, exact_of(measured.value))


def difference_cell(difference: Measured | None) -> Cell:
    """A difference in points with its interval."""
    if difference is None:
        return Cell(MISSING)
    return exact_cell(points, difference.value, interval(difference.low, difference.high))


def change(after: Any, before: Any) -> str:
    """The relative change of a size, with its sign."""
    kept = ratio(after, before)
    return signed_percent(None if kept is None else kept - 1)


def exact_cell(show: Callable[[Any], str], value: Any, detail: str = "") -> Cell:
    """A number rounded by `show`; hovering over it shows all digits."""
    unit = "s" if show is duration else "bytes" if show is num_bytes else ""
    return Cell(show(value), detail, exact_of(value, unit))


def exact_of(value: Any, unit: str = "") -> str:
    """The unrounded value; '' when there is none."""
    finite = number(value)
    if finite is None:
        return ""
    shown = f"{round(finite):,}" if finite == int(finite) and abs(finite) > 1 else repr(finite)
    return f"{shown} {unit}".strip()
