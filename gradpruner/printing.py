"""Results that print as short tables: in a terminal or a script, and as HTML in a notebook."""

from __future__ import annotations

import html
import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 110
"""Columns, where nothing says how wide the place is."""


class Printed:
    """Something people look at: `print(x)`, and a notebook's last line, show what `show` says."""

    def show(self, console: Console) -> None:
        """Prints sentences and tables.

        Args:
            console: Where to; no colours when it is no terminal, no symbols when it cannot show them.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        from rich.console import Console

        class Screen(io.StringIO):
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"

        screen = Screen()
        self.show(Console(file=screen, width=WIDTH, force_jupyter=False, color_system=None))
        lines = (line.rstrip() for line in screen.getvalue().splitlines())
        return "\n".join(lines).strip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        from rich.console import Console

        parts: list[str] = []

        class Page(Console):
            def print(self, *objects: Any, **how: Any) -> None:
                parts.extend(map(_as_html, objects))

        self.show(Page(file=io.StringIO(), width=WIDTH, force_jupyter=False))
        return "\n".join(parts)


def print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    notes: Iterable[str] = (),
) -> None:
    """Prints a title, a table with columns of numbers set to the right, and notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    texts = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    shown = Table(
        box=box.ASCII if console.options.ascii_only else box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(columns),
    )
    for name, *cells in zip(columns, *texts, strict=True):
        numbers = all(re.fullmatch(r"[\d.e+-]+%?", cell) for cell in cells)
        shown.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for cells in texts:
        shown.add_row(*map(Text, cells))  # Text: a name such as "[red]" is no markup
    print_line(console, title, "bold")
    console.print(shown)
    for note in notes:
        print_line(console, f"Note: {note}")


def print_line(console: Console, line: str, style: str = "") -> None:
    """Prints a sentence as it is."""
    from rich.text import Text

    console.print(Text(line, style=style))


def _as_html(printed: Any) -> str:
    from rich.table import Table

    if not isinstance(printed, Table):
        weight = "bold" if "bold" in str(getattr(printed, "style", "")) else "normal"
        style = f"white-space: pre-wrap; margin: 0.3em 0; font-weight: {weight}"
        return f'<pre style="{style}">{_escaped(printed)}</pre>'

    def row(tag: str, cells: Iterable[Any]) -> str:
        sides = (f' style="text-align: {column.justify}; padding: 0 0.6em"' for column in printed.columns)
        styled = zip(cells, sides, strict=True)
        return "<tr>" + "".join(f"<{tag}{side}>{_escaped(cell)}</{tag}>" for cell, side in styled) + "</tr>"

    title = f"<caption>{_escaped(printed.title)}</caption>" if printed.title else ""
    head = row("th", (column.header for column in printed.columns)) if printed.show_header else ""
    body = "".join(row("td", cells) for cells in zip(*(c.cells for c in printed.columns), strict=True))
    return f"<table>{title}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _escaped(printed: Any) -> str:
    from rich.text import Text

    text = Text.from_markup(printed) if isinstance(printed, str) else printed
    return html.escape(text.plain if isinstance(text, Text) else str(text))
