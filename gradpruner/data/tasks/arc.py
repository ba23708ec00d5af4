"""ARC: science questions of American schools, grades three to nine, in an easy and a hard set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, refusal, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of
from gradpruner.errors import DataError


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    choices = row["choices"] if isinstance(row["choices"], Mapping) else {}
    texts = options_of(choices.get("text"), "choices", row_id)
    labels = choices.get("label")
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise DataError(
            f"{row_id}: 'choices' has {len(texts)} texts and the labels {labels!r}.",
            hint='It must be {"text": [...], "label": [...]}, as many labels as texts.',
        )
    # The key is looked up, never counted: the same letter need not stand in the same place.
    if row["answerKey"] not in labels:
        raise refusal(row, "answerKey", row_id, ", ".join(map(str, labels)))
    asked = f"Question: {text_of(row, 'question', row_id)}"
    return choice_example(row_id, asked, texts, labels.index(row["answerKey"]))


for _name, _config, _said, _paper in (
    ("arc_easy", "ARC-Easy", "school science, three to five options", "Tables 1, 3, 4"),
    ("arc_challenge", "ARC-Challenge", "school science that word overlap does not solve", ""),
):
    TASKS.register(_name)(
        Task(
            name=_name,
            version=1,
            description=f"{_config}: {_said}.",
            columns=("question", "choices", "answerKey"),
            build=_example,
            hub_id="allenai/ai2_arc",
            hub_config=_config,
            other_splits=("validation",),
            paper=_paper,
        )
    )
