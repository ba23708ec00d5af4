"""Sample answers of a run, dense beside pruned, from the files of examples it left.

Rows hold whatever the task holds: untrusted text, which is cut short here and escaped where it is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.json_files import parse_json
from gradpruner.common.printing import text
from gradpruner.reports.view import Row, View

KINDS = {
    "lost": "Lost: only the dense model is right",
    "won": "Won: only the pruned model is right",
    "right": "Both right",
    "wrong": "Both wrong",
}
MOST = 15
"""Examples of a kind that a page holds."""
_LONGEST = 280
"""Characters of a text that a page holds."""
_MOST_BYTES = 64 * 2**20
_FIELDS = {
    "exact_match": ("correct", "generated"),
    "final_number": ("number_correct", "generated"),
    "choice_accuracy": ("choice_correct", "chosen"),
    "choice_accuracy_normalised": ("normalised_correct", "chosen"),
    "rouge_l": ("rouge_l", "generated"),
    "bert_score": ("bert_score", "generated"),
    "similarity": ("rouge_l", "generated"),
}
"""Metric -> what says whether an answer is right, and the answer."""
_GRADED = 0.5
"""From this score on, a graded answer counts as right."""


@dataclass(frozen=True)
class Answer:
    """One row, as both models answered it."""

    kind: str
    prompt: str
    wanted: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Answers:
    """Some answers of the pruned row called `label`, at most `MOST` of a kind.

    Attributes:
        counts: How many there are of every kind.
        graded: Whether "right" stands for a score of at least a half.
    """

    label: str
    answers: tuple[Answer, ...]
    counts: dict[str, int]
    graded: bool


def sample_answers(view: View, folder: Path) -> Answers | None:
    """The answers of the headline's row beside those of the dense model; None where they are not on disk.

    Args:
        view: The record.
        folder: Where it lies; nothing outside is read.
    """
    row, dense = view.main, view.dense
    if row is None or dense is None or view.metric not in _FIELDS:
        return None
    files = [_file(view, one, folder) for one in (dense, row)]
    if files[0] is None or files[1] is None:
        return None
    right, said = _FIELDS[view.metric]
    found: dict[str, list[Answer]] = {kind: [] for kind in KINDS}
    counts = dict.fromkeys(KINDS, 0)
    graded = False
    try:
        for one, other in zip(_lines(files[0]), _lines(files[1]), strict=False):
            scores = [e[right] for e in (one, other)]
            if one["id"] != other["id"]:
                return None
            graded = graded or not isinstance(scores[0], bool)
            kind = _kind(*(float(score) >= _GRADED for score in scores))
            counts[kind] += 1
            if len(found[kind]) < MOST:
                shown = [text(e.get(said), _LONGEST) for e in (one, other)]
                prompt = text(one.get("prompt_tail"))
                prompt = prompt if len(prompt) <= _LONGEST else "…" + prompt[-_LONGEST:]
                found[kind].append(Answer(kind, prompt, text(one.get("answer"), _LONGEST), *shown))
    except (OSError, ValueError, KeyError, TypeError):  # another program's file, or a field is missing
        return None
    answers = tuple(answer for kind in KINDS for answer in found[kind])
    return Answers(row.label, answers, counts, graded) if answers else None


def _kind(dense: bool, pruned: bool) -> str:
    if dense == pruned:
        return "right" if dense else "wrong"
    return "lost" if dense else "won"


def _file(view: View, row: Row, folder: Path) -> Path | None:
    """Where a row's answers lie, if that is a plain file inside the folder."""
    named = row.recorded.evaluation.per_example
    if view.kind != "run":
        named = f"{row.first_run}/variants/{row.name}/examples.jsonl" if row.first_run else None
    try:
        path = (folder / str(named)).resolve() if named else None
        inside = path is not None and path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):
        return None
    return path if inside else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in the first `_MOST_BYTES` of a file."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        row = parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
        yield row
