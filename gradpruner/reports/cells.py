"""Cells, rows and tables of a report, and values as they are written in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradpruner.reports.formats import (
    MISSING,
    interval,
    num_bytes,
    number,
    percent,
    ratio,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.reports.reading import (
    Measured,
)

_UNITS = {
    "layers": "Decoder layers",
    "decoder_parameters": "Decoder parameters",
    "parameters": "All parameters",
    "kv_bytes_per_token": "KV cache per token",
    "flops_per_token": "FLOPs per token",
    "disk_bytes": "Size on disk",
}


@dataclass(frozen=True)
class Cell:
    """One value.

    Attributes:
        text: As shown.
        detail: A second, smaller text such as an interval.
        exact: The unrounded value, shown on hover.
        share: 0-1 draws a bar of that length; None draws none.
    """

    text: str
    detail: str = ""
    exact: str = ""
    share: float | None = None


@dataclass(frozen=True)
class Row:
    """One line; `kind` is '', 'main' (the headline's variant) or 'failed' (see `error`)."""

    cells: tuple[Cell, ...]
    kind: str = ""
    error: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others hold numbers unless listed in `words`."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    words: tuple[str, ...] = ()


def markdown_of(table: Table, error_at: int) -> str:
    """Returns a table as GitHub-flavoured markdown; a failed row has its error in column `error_at`."""
    rule = ["---", *("---" if name in table.words else "---:" for name in table.columns[1:])]
    lines = [[markdown_cell(name) for name in table.columns], rule]
    for row in table.rows:
        cells = [f"{c.text} {c.detail}".strip() for c in row.cells]
        if row.kind == "failed":
            cells[error_at] = f"failed: {row.error}"
        lines.append([markdown_cell(cell) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def measured_cell(measured: Measured | None) -> Cell:
    """A metric with its interval."""
    if measured is None:
        return Cell(MISSING)
    exact = exact_of(measured.value)
    return Cell(percent(measured.value), interval(measured.low, measured.high), exact)


def paired_cell(difference: Measured | None) -> Cell:
    """Returns the difference to dense in points, both measured on the same examples."""
    if difference is None:
        return Cell(MISSING)
    shown = signed_percent(difference.value)[:-1]
    return Cell(shown, interval(difference.low, difference.high), exact_of(difference.value))


def savings_row(unit: str, before: float | None, after: float | None) -> Row:
    """One quantity before and after pruning, with their ratio."""
    show = num_bytes if "bytes" in unit else short if unit.startswith("flops") else whole
    kept = ratio(after, before)
    cells = (
        Cell(_UNITS.get(unit, text(unit).replace("_", " ").capitalize())),
        Cell(show(before), exact=exact_of(before)),
        Cell(show(after), exact=exact_of(after)),
        Cell(signed_percent(None if kept is None else kept - 1)),
        Cell(times(kept), share=None if kept is None else min(max(kept, 0.0), 1.0)),
    )
    return Row(cells)


def short_cell(value: Any) -> Cell:
    """A number in a few digits; exact as a tooltip."""
    return Cell(short(value), exact=exact_of(value))


def bytes_cell(value: Any) -> Cell:
    """A number of bytes; exact as a tooltip."""
    return Cell(num_bytes(value), exact=exact_of(value, "bytes"))


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
