"""A run or a study as markdown: the table of results, and below it what is needed to read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradpruner.printing import text
from gradpruner.reports.reading import read
from gradpruner.reports.shipping import advice
from gradpruner.reports.tables import markdown_results
from gradpruner.reports.verdict import budget_words, judge, reading_words, serving_note


def markdown_table(source: dict[str, Any], folder: Path | None = None) -> str:
    """Returns the results of one run or study, ending in a newline.

    Args:
        source: A record as read from run.json or study.json; missing parts show as a dash.
        folder: Where the record lies; by default where it was made.

    Returns:
        GitHub-flavoured markdown; a failed row has its error in the place of its quality.
    """
    view = read(source)
    verdict = judge(view)
    ship = advice(view, folder)
    said = [
        f"{verdict.word}. {verdict.sentence}",
        budget_words(view),
        reading_words(view),
        serving_note(view),
    ]
    if ship is not None:
        said.append(f"To ship: {ship.title}. {ship.reason}")
    parts = [markdown_results(view), *(f"{_plain(words)}\n" for words in said if words)]
    if ship is not None and ship.commands:
        parts.append("".join(f"    {text(step.command)}\n" for step in ship.commands))
    if verdict.notes:
        parts.append("".join(f"- {_plain(note)}\n" for note in verdict.notes))
    return "\n".join(parts)


def _plain(line: str) -> str:
    """Keeps names from becoming markup."""
    return line.replace("<", "\\<").replace("*", "\\*").replace("_", "\\_").replace("\u00a0", " ")
