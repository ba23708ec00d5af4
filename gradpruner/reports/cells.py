"""Cells, lines and tables as plain data, so that HTML, terminal and markdown show the same numbers."""

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
    """One value of a table.

    Attributes:
        detail: A second, smaller text, for example an interval.
        exact: The unrounded value, shown on hover.
        share: Length of a bar, 0 to 1; None draws no bar.
        link: Address that the cell links to.
    """

    text: str
    detail: str = ""
    exact: str = ""
    share: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Line:
    """One line of a table; `kind` is '', 'main' (shown in bold) or 'failed' (see `error`)."""

    cells: tuple[Cell, ...]
    kind: str = ""
    error: str = ""


def line(*cells: Cell | str, kind: str = "", error: str = "") -> Line:
    """Returns a line; plain texts become cells."""
    return Line(tuple(Cell(cell) if isinstance(cell, str) else cell for cell in cells), kind, error)


@dataclass(frozen=True)
class Table:
    """A table. The first column names the line; the others hold numbers, except those in `words`."""

    caption: str
    columns: tuple[str, ...]
    lines: Sequence[Line]
    words: tuple[str, ...] = ()

    def texts(self, line: Line, failed: str) -> list[str]:
        """Returns the cells of a line as plain texts; a failed line shows `failed` instead of its quality."""
        texts = [f"{cell.text} {cell.detail}".strip() for cell in line.cells]
        if line.kind == "failed":
            texts[next((i for i, name in enumerate(self.columns) if name.endswith("]")), 1)] = failed
        return texts


def measured_cell(measured: Measured | None) -> Cell:
    """Returns a metric with its interval, and a star if it rests on too few examples."""
    if measured is None:
        return Cell(MISSING)
    star = "*" if measured.is_small else ""
    shown = interval(measured.low, measured.high)
    return Cell(percent(measured.value) + star, shown, exact_of(measured.value))


def difference_cell(difference: Measured | None) -> Cell:
    """Returns a difference in points with its interval."""
    if difference is None:
        return Cell(MISSING)
    return exact_cell(points, difference.value, interval(difference.low, difference.high))


def change(after: Any, before: Any) -> str:
    """Returns the relative change of a size as a signed percentage."""
    kept = ratio(after, before)
    return signed_percent(None if kept is None else kept - 1)


def exact_cell(show: Callable[[Any], str], value: Any, detail: str = "") -> Cell:
    """Returns a number formatted by `show`; hovering shows all its digits."""
    unit = "s" if show is duration else "bytes" if show is num_bytes else ""
    return Cell(show(value), detail, exact_of(value, unit))


def exact_of(value: Any, unit: str = "") -> str:
    """Returns the unrounded value as text, '' for a missing one."""
    finite = number(value)
    if finite is None:
        return ""
    shown = f"{round(finite):,}" if finite == int(finite) and abs(finite) > 1 else repr(finite)
    return f"{shown} {unit}".strip()
