"""What to do about rows that cannot be read, by what their columns and their faults look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.data.parsing import type_of
from gradpruner.data.rows import RowSet
from gradpruner.data.shapes import FORMATS, Shape

_ASKED = ("prompt", "question", "instruction", "input")  # columns that preference data have their prompt in
_WORDS, _CHARACTERS = 5, 60  # of the longest name of a column


def on_columns(rows: RowSet, found: Sequence[str]) -> str:
    """Returns what to do about columns that are not recognised; `found` are their names."""
    first = rows.rows[0]
    written = type_of(Path(first.id.rpartition(":")[0]))
    if written in (".csv", ".tsv") and any(
        len(name.split()) > _WORDS or len(name) > _CHARACTERS for name in found
    ):
        return (
            "The first line names the columns, and here it looks like a row: no header line? Put one first, "
            "such as prompt,completion or text,label."
        )
    if {"chosen", "rejected"} <= set(found):
        return _on_preferences(first.fields, found)
    if turns := [name for name in found if _are_turns(first.fields.get(name))]:
        return f"'{turns[0]}' holds conversations: {_meaning(messages=turns[0])}."
    if len(found) == 1:
        return (
            f"A row needs a prompt and an answer, and these have one column, '{found[0]}': split it into "
            "prompt and completion, or text and label."
        )
    asked, answered = [*found, "QUESTION", "ANSWER"][:2]
    return (
        f"Rename the columns, or say what they mean: {_meaning(prompt=asked, completion=answered)} (text and "
        "label instead of prompt and completion for a text with its label). Or set data.prompt and "
        "data.completion to texts with columns in braces."
    )


def _on_preferences(row: Mapping[str, Any], found: Sequence[str]) -> str:
    """Returns what to do about pairs of a chosen and a rejected answer."""
    asked = next((name for name in _ASKED if name in found), None)
    turns = _are_turns(row.get("chosen"))
    if turns and not (asked and _are_turns(row.get(asked))):
        meaning = _meaning(messages="chosen")
    elif asked:
        meaning = _meaning(prompt=asked, completion="chosen")
    else:
        return (
            "These are preference data without a column for the prompt: split 'chosen' into two columns, "
            "prompt and completion."
        )
    return f"These are preference data. To learn the chosen answers and ignore the others: {meaning}."


def _meaning(**columns: str) -> str:
    pairs = ", ".join(f"{known}: {name}" for known, name in columns.items())
    return f"--set 'data.columns={{{pairs}}}'"


def _are_turns(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def on_other_layouts(rows: RowSet, shape: Shape, faulty: Sequence[str]) -> str:
    """Returns what to do if the rows with the ids `faulty` lack columns of `shape` but fit another format."""
    ids, counts = set(faulty), dict[str, int]()
    for row in rows.rows:
        present = {name for name, value in row.fields.items() if value is not None}
        if row.id not in ids or present >= set(shape.required):
            continue
        other = next((one.columns() for one in FORMATS.values() if present >= set(one.required)), None)
        if other is not None:
            counts[other] = counts.get(other, 0) + 1
    if not counts:
        return ""
    named = "; ".join(f"{count} rows have the columns {columns}" for columns, count in counts.items())
    return f"The file mixes layouts: {named}. Split it into one file per layout, or bring all rows into one."
