"""run.json or study.json -> one self-contained HTML page, terminal and markdown tables. Never recomputes.

formats   numbers as people read them
reading   run.json as typed, forgiving views
verdict   what the run shows, in one honest sentence
shipping  which model of a run is the one to ship, and why
tables    the tables as plain data, and the markdown table; cells: what they are made of
terminal  the summary on the console
svg       one matplotlib figure as inline SVG
figures   the plots; drawing: what they are made of
page      what every page shares (page.html, parts.html, style.css)
html      the page of a run (report.html)
study     a study of many runs: page (study.html), markdown, terminal; study_reading, study_verdict,
          study_tables, study_figures and study_sweep are to it what the above are to a run
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

__all__ = [
    "markdown_table",
    "print_study",
    "print_summary",
    "render_html",
    "render_study",
    "study_markdown",
]


def render_html(run: dict[str, Any], out: Path) -> Path:
    """Writes the report page; see `gradpruner.reports.html.render_html`."""
    # matplotlib and jinja2 load here, so that printing a summary does not wait for them.
    from gradpruner.reports import html

    return html.render_html(run, out)


def print_summary(run: dict[str, Any], console: Console) -> None:
    """Prints the run in the terminal; see `gradpruner.reports.terminal.print_summary`."""
    from gradpruner.reports import terminal

    terminal.print_summary(run, console)


def markdown_table(run: dict[str, Any]) -> str:
    """Returns the variants as a markdown table; see `gradpruner.reports.tables.markdown_table`."""
    from gradpruner.reports import tables

    return tables.markdown_table(run)


def render_study(study: dict[str, Any], out: str | Path) -> Path:
    """Writes the page of a study; see `gradpruner.reports.study.render_study`."""
    from gradpruner.reports import study as page

    return page.render_study(study, out)


def print_study(study: dict[str, Any], console: Console) -> None:
    """Prints a study in the terminal; see `gradpruner.reports.study.print_study`."""
    from gradpruner.reports import study as page

    page.print_study(study, console)


def study_markdown(study: dict[str, Any]) -> str:
    """Returns a study as a markdown table; see `gradpruner.reports.study.study_markdown`."""
    from gradpruner.reports import study as page

    return page.study_markdown(study)
