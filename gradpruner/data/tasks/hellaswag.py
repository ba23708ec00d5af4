"""HellaSwag: which of four sentences goes on with what happens?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of

# Left by the extraction from WikiHow; other brackets are the authors' own.
_TITLE = re.compile(r"[.\s]*\[title\]\s*")
_MARK = re.compile(r"\[(?:header|step|substeps?)\]\s*")


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    endings = [_plain(ending) for ending in options_of(row["endings"], "endings", row_id)]
    answer = number_of(row, "label", range(len(endings)), row_id)
    asked = (
        f"{text_of(row, 'activity_label', row_id)}: {_plain(text_of(row, 'ctx', row_id))}\n"
        "Which of these goes on with it?"
    )
    return choice_example(row_id, asked, endings, answer)


def _plain(text: str) -> str:
    """Returns a text without the marks of WikiHow's layout."""
    return _MARK.sub("", _TITLE.sub(". ", text).removeprefix(". ")).strip()


TASKS.register("hellaswag")(
    Task(
        name="hellaswag",
        version=1,
        description="HellaSwag: the sentence that goes on with what happens, one of four.",
        columns=("activity_label", "ctx", "endings", "label"),
        build=_example,
        hub_id="Rowan/hellaswag",
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4, 6-9, 13",
    )
)
