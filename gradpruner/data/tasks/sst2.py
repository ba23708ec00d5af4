"""SST-2: is a sentence or phrase of a film review negative or positive?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, spaced, text_of

LABELS = ("negative", "positive")  # the hub's order


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    prompt = (
        f"What is the sentiment of this sentence: {', '.join(LABELS)}?\n"
        f"Sentence: {text_of(row, 'sentence', row_id)}\nAnswer:"
    )
    answer = spaced(label_of(row, "label", LABELS, row_id))
    return Example(row_id, prompt, answer, tuple(map(spaced, LABELS)))


TASKS.register("sst2")(
    Task(
        name="sst2",
        version=1,
        description="SST-2: sentiment of sentences from film reviews, two classes.",
        columns=("sentence", "label"),
        build=_example,
        hub_id="stanfordnlp/sst2",
        eval_split="validation",  # the hub's test split has no answers
    )
)
