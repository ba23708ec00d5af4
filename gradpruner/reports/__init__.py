"""run.json or study.json -> one self-contained HTML page, terminal and markdown tables. Never recomputes.

record     run.json and study.json as forgiving types; reading: from there to what reports show (view)
verdict    what the record shows, in one honest sentence; notes: what limits it; tiles: the headline numbers
shipping   which model of a run is the one to ship, and why; the next commands
tables     results of runs and studies as plain data; details: the other tables; cells: what they are made of
answers    sample answers, dense beside pruned
terminal   the summary on the console
svg        one matplotlib figure as inline SVG; drawing: what figures are made of
comparing  plots of rows; figures: plots of a run; sweep: plots of an ablation
folders    the runs below a folder, as they stand; serving: a server that shows them (serving.html)
html       the page, section by section (page.html, parts.html, style.*, copy.js); page: what fills it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["markdown_table", "print_summary", "render_html"]


def render_html(source: dict[str, Any], out: str | Path) -> Path:
    """Writes the report page; see `gradpruner.reports.html.render_html`."""
    # matplotlib and jinja2 load here, so that printing a summary does not wait for them.
    from gradpruner.reports import html

    return html.render_html(source, Path(out))


def print_summary(
    source: dict[str, Any], console: Console, folder: Path | None = None, *, advise: bool = True
) -> None:
    """Prints a run or a study in the terminal; see `gradpruner.reports.terminal.print_summary`."""
    from gradpruner.reports import terminal

    terminal.print_summary(source, console, folder, advise=advise)


def markdown_table(source: dict[str, Any], folder: Path | None = None) -> str:
    """Returns results, verdict and advice as markdown; see `gradpruner.reports.markdown.markdown_table`."""
    from gradpruner.reports import markdown

    return markdown.markdown_table(source, folder)
