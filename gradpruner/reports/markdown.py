"""A run or a study as markdown: the results table, then the text needed to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.common.printing import text
from gradpruner.reports.cells import Table
from gradpruner.reports.notes import budget_words, serving_note
from gradpruner.reports.shipping import advice
from gradpruner.reports.tables import reading_words, results_table, short_table
from gradpruner.reports.verdict import judge
from gradpruner.reports.view import read


def markdown_table(source: dict[str, Any], folder: Path | None = None) -> str:
    """Returns the results of one run or study, ending in a newline.

    Args:
        source: The contents of run.json or study.json; missing parts show as a dash.
        folder: The record's folder; by default the folder it was written to.

    Returns:
        GitHub-flavoured markdown; a failed row shows its error instead of its quality.
    """
    view = read(source)
    verdict = judge(view)
    ship = advice(view, folder)
    texts = [
        f"{verdict.word}. {verdict.sentence}",
        budget_words(view),
        reading_words(view),
        serving_note(view),
    ]
    if ship is not None:
        texts.append(f"{ship.heading}. {ship.reason}")
    # A run shows the short table of the terminal, a study the full one.
    table = (short_table if view.kind == "run" else results_table)(view, ship.row if ship else None)
    parts = [_markdown_of(table), *(f"{_plain(words)}\n" for words in texts if words)]
    if ship is not None and ship.commands:
        parts.append("".join(f"    {text(step.command)}\n" for step in ship.commands))
    if verdict.notes:
        parts.append("".join(f"- {_plain(note)}\n" for note in verdict.notes))
    return "\n".join(parts)


def _plain(line: str) -> str:
    """Escapes names that would read as markup."""
    return line.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_").replace("\u00a0", " ")


def _markdown_of(table: Table) -> str:
    rule = ["---", *("---" if name in table.words else "---:" for name in table.columns[1:])]
    lines = [[_markdown_cell(name) for name in table.columns], rule]
    for line in table.lines:
        lines.append([_markdown_cell(cell) for cell in table.texts(line, f"failed: {line.error}")])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(cell: str) -> str:
    """Escapes characters that would end the cell or start markup."""
    cell = " ".join(cell.splitlines())
    for character in ("\\", "|", "*", "_", "`", "<", "["):
        # An interval such as "[80.1, 86.3]" is not a link, because no "(" follows it.
        if character != "[" or "](" in cell:
            cell = cell.replace(character, f"\\{character}")
    return cell.replace("\u00a0", " ")
