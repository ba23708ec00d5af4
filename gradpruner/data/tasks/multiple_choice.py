"""The one form of every multiple-choice task.

    <what is asked>
    Options:
    - <option>
    - <option>
    Answer: <option>

The answer is the option's text, not a letter: a small or base model need not know what "B" stands for, and
the likelihood of an option is that of its words, as lm-evaluation-harness scores these tasks. The options are
listed, because otherwise no greedy answer could match one of them word for word; they carry no letters, so
that there is only one way to name one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import FIX, spaced
from gradpruner.errors import DataError


def choice_example(row_id: str, asked: str, options: Sequence[str], answer: int) -> Example:
    """Makes the example of one question.

    Equal options are merged, in the order of their first appearance: offered twice, one would be scored
    twice. Options that differ in case only stay apart (in genetics "Rr" is not "rr"). If a single one is
    left, it is the one choice of the example, and `load_task` leaves the row out.

    Args:
        row_id: Names the row.
        asked: Everything above the options.
        options: Their texts; runs of white space become one space, and blank ones are not offered.
        answer: Which of them is right, from 0.

    Raises:
        DataError: If the right option is blank.
    """
    flat = [" ".join(option.split()) for option in options]
    if not flat[answer]:
        raise DataError(f"{row_id}: the right option, number {answer + 1}, is blank.", hint=FIX)
    offered = list(dict.fromkeys(filter(None, flat)))
    listed = "\n".join(f"- {option}" for option in offered)
    prompt = f"{asked}\nOptions:\n{listed}\nAnswer:"
    return Example(row_id, prompt, spaced(flat[answer]), tuple(map(spaced, offered)))


def options_of(values: Any, column: str, row_id: str) -> list[str]:
    """Returns a list of options as read, after checking it.

    Raises:
        DataError: If it is not a list of texts, or empty.
    """
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{row_id}: '{column}' holds {values!r}, not a list of options.", hint=FIX)
    return values
