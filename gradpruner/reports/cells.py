"""Cells, lines and tables of a report as plain data: HTML, terminal and markdown show the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradpruner.printing import (
    MISSING,
    duration,
    interval,
    num_bytes,
    number,
    percent,
    points,
    short,
    whole,
)
from gradpruner.reports.record import Measured


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes:
        text: As shown.
        detail: A second, smaller text such as an interval.
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


@dataclass(frozen=True)
class Table:
    """A table; the first column names the line, the others hold numbers unless listed in `words`."""

    caption: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    words: tuple[str, ...] = ()

    @property
    def error_at(self) -> int:
        """The column that says of a failed line that it failed: the one of its quality."""
        return next((i for i, name in enumerate(self.columns) if name.endswith("]")), 1)


def markdown_of(table: Table) -> str:
    """Returns a table as GitHub-flavoured markdown; a failed line has its error in place of its quality."""
    rule = ["---", *("---" if name in table.words else "---:" for name in table.columns[1:])]
    lines = [[markdown_cell(name) for name in table.columns], rule]
    for line in table.lines:
        cells = [f"{c.text} {c.detail}".strip() for c in line.cells]
        if line.kind == "failed":
            cells[table.error_at] = f"failed: {line.error}"
        lines.append([markdown_cell(cell) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def words_line(*words: str, kind: str = "") -> Line:
    """A line of plain words."""
    return Line(tuple(map(Cell, words)), kind)


def measured_cell(measured: Measured | None) -> Cell:
    """A metric with its interval; starred where too few examples stand behind it."""
    if measured is None or measured.value is None:
        return Cell(MISSING)
    star = "*" if measured.is_small else ""
    shown = interval(measured.low, measured.high)
    return Cell(percent(measured.value) + star, shown, exact_of(measured.value))


def difference_cell(difference: Measured | None) -> Cell:
    """A difference in points with its interval."""
    if difference is None or difference.value is None:
        return Cell(MISSING)
    shown = interval(difference.low, difference.high)
    return Cell(points(difference.value), shown, exact_of(difference.value))


def whole_cell(value: Any) -> Cell:
    """A count in full."""
    return Cell(whole(value))


def short_cell(value: Any) -> Cell:
    """A number in a few digits; exact as a tooltip."""
    return Cell(short(value), exact=exact_of(value))


def bytes_cell(value: Any) -> Cell:
    """A number of bytes; exact as a tooltip."""
    return Cell(num_bytes(value), exact=exact_of(value, "bytes"))


def time_cell(value: Any, detail: str = "") -> Cell:
    """A duration; exact as a tooltip."""
    return Cell(duration(value), detail, exact_of(value, "s"))


def exact_of(value: Any, unit: str = "") -> str:
    """Returns the unrounded value, for those who hover; '' when there is none."""
    finite = number(value)
    if finite is None:
        return ""
    shown = f"{round(finite):,}" if finite == int(finite) and abs(finite) > 1 else repr(finite)
    return f"{shown} {unit}".strip()


def markdown_cell(cell: str) -> str:
    """Escapes what would end the cell or start markup."""
    cell = " ".join(cell.splitlines())
    for character in ("\\", "|", "*", "_", "`", "<", "["):
        # An interval such as "[80.1, 86.3]" is no link, since no "(" follows it.
        if character != "[" or "](" in cell:
            cell = cell.replace(character, f"\\{character}")
    return cell.replace("\u00a0", " ")
