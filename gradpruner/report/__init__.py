"""run.json -> one self-contained HTML page, terminal tables, a markdown table. Never recomputes.

formats   numbers as people read them
reading   run.json as typed, forgiving views
verdict   what the run shows, in one honest sentence
tables    the tables as plain data, and the markdown table
terminal  the summary on the console
svg       one matplotlib figure as inline SVG
figures   the plots
page      what every page shares (page.html, parts.html, style.css)
html      the page of a run (report.html)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

__all__ = ["markdown_table", "print_summary", "render_html"]


def render_html(run: dict[str, Any], out: Path) -> Path:
    """Writes the report page; see `gradpruner.report.html.render_html`."""
    # matplotlib and jinja2 load here, so that printing a summary does not wait for them.
    from gradpruner.report import html

    return html.render_html(run, out)


def print_summary(run: dict[str, Any], console: Console) -> None:
    """Prints the run in the terminal; see `gradpruner.report.terminal.print_summary`."""
    from gradpruner.report import terminal

    terminal.print_summary(run, console)


def markdown_table(run: dict[str, Any]) -> str:
    """Returns the variants as a markdown table; see `gradpruner.report.tables.markdown_table`."""
    from gradpruner.report import tables

    return tables.markdown_table(run)
