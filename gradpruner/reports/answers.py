"""Sample answers of the dense and the pruned model, side by side, read from the run's examples.jsonl files.

The rows hold untrusted text. It is cut short here and escaped where it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.json_files import parse_json
from gradpruner.common.printing import text
from gradpruner.common.run_names import row_file
from gradpruner.reports.view import Row, View

KINDS = {
    "lost": "Lost: only the dense model is right",
    "won": "Won: only the pruned model is right",
    "right": "Both right",
    "wrong": "Both wrong",
}
MOST = 15
"""Most answers of one kind on a page."""
_LONGEST = 280
"""Most characters of one text on a page."""
_MOST_BYTES = 64 * 2**20
_SPECIAL = re.compile(r"^(<s>|<bos>|\[CLS\])+|<\|\w+\|>")
"""Special tokens in a prompt: of the usual kinds, and only where they are no words of the row."""
_FIELDS = {
    "exact_match": ("correct", "generated"),
    "final_number": ("number_correct", "generated"),
    "choice_accuracy": ("choice_correct", "chosen"),
    "choice_accuracy_normalised": ("normalised_correct", "chosen"),
    "rouge_l": ("rouge_l", "generated"),
    "bert_score": ("bert_score", "generated"),
    "similarity": ("rouge_l", "generated"),
}
"""Metric -> the field that grades an answer, and the field that holds it."""
_GRADED = 0.5
"""A graded answer counts as right from this score on."""


@dataclass(frozen=True)
class Answer:
    """The answers of both models to one row."""

    kind: str
    prompt: str
    wanted: str
    dense: str
    pruned: str


@dataclass(frozen=True)
class Answers:
    """Answers of the dense model and of the pruned row `label`, at most `MOST` of each kind.

    Attributes:
        counts: Kind -> number of answers in the whole file.
        graded: Whether "right" means a score of at least 0.5.
    """

    label: str
    answers: tuple[Answer, ...]
    counts: dict[str, int]
    graded: bool
    most: int = MOST

    @property
    def total(self) -> int:
        """Number of answers in the whole file."""
        return sum(self.counts.values())


def sample_answers(view: View, folder: Path) -> Answers | None:
    """Returns the answers of the main row and of the dense model; None if they are not on disk.

    Args:
        view: The record.
        folder: The record's folder; nothing outside it is read.
    """
    row, dense = view.main, view.dense
    if row is None or dense is None or view.metric not in _FIELDS:
        return None
    files = [_file(view, model, folder) for model in (dense, row)]
    if files[0] is None or files[1] is None:
        return None
    grade, answer = _FIELDS[view.metric]
    found: dict[str, list[Answer]] = {kind: [] for kind in KINDS}
    counts = dict.fromkeys(KINDS, 0)
    graded = False
    try:
        for before, after in zip(_lines(files[0]), _lines(files[1]), strict=False):
            scores = [example[grade] for example in (before, after)]
            if before["id"] != after["id"]:
                return None
            graded = graded or not isinstance(scores[0], bool)
            kind = _kind(*(float(score) >= _GRADED for score in scores))
            counts[kind] += 1
            if len(found[kind]) < MOST:
                shown = [text(example.get(answer), _LONGEST) for example in (before, after)]
                prompt = _SPECIAL.sub("", text(before.get("prompt_tail")))
                prompt = prompt if len(prompt) <= _LONGEST else "…" + prompt[-_LONGEST:]
                found[kind].append(Answer(kind, prompt, text(before.get("answer"), _LONGEST), *shown))
    except (OSError, ValueError, KeyError, TypeError):  # another program's file, or a field is missing
        return None
    answers = tuple(sample for kind in KINDS for sample in found[kind])
    return Answers(row.label, answers, counts, graded) if answers else None


def _kind(dense: bool, pruned: bool) -> str:
    if dense == pruned:
        return "right" if dense else "wrong"
    return "lost" if dense else "won"


def _file(view: View, row: Row, folder: Path) -> Path | None:
    """Returns the file of a row's answers, if it is a plain file inside the folder."""
    named = row.recorded.evaluation.per_example
    if view.kind != "run":
        named = f"{row.first_run}/{row_file(row.name, 'examples.jsonl')}" if row.first_run else None
    try:
        path = (folder / str(named)).resolve() if named else None
        inside = path is not None and path.is_relative_to(folder.resolve()) and path.is_file()
    except (OSError, ValueError):
        return None
    return path if inside else None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the complete rows in the first `_MOST_BYTES` of a file."""
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    for line in data[: data.rfind(b"\n") + 1].splitlines():
        row = parse_json(line)
        if not isinstance(row, dict):
            raise ValueError("no object")
        yield row
