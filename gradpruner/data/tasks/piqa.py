"""PIQA: which of two ways reaches an everyday goal?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {
        "goal": "To keep a paper map dry on a hike,",
        "sol1": "carry it in a sieve.",
        "sol2": "carry it in a plastic sleeve.",
        "label": 1,
    },
    {
        "goal": "How do you get the last honey out of a jar?",
        "sol1": "Stand the jar in warm water, then pour.",
        "sol2": "Stand the jar in the freezer, then pour.",
        "label": 0,
    },
    {
        "goal": "To loosen a tight screw,",
        "sol1": "turn it clockwise with a fitting screwdriver.",
        "sol2": "turn it anticlockwise with a fitting screwdriver.",
        "label": 1,
    },
    {
        "goal": "bookmark",
        "sol1": "a strip of card can be one",
        "sol2": "a strip of lard can be one",
        "label": 0,
    },
    {
        "goal": "To stop a table from wobbling,",
        "sol1": "push folded paper under the short leg.",
        "sol2": "push folded paper under the long leg.",
        "label": 0,
    },
    {
        "goal": "How can you tell whether an egg is raw?",
        "sol1": "Spin it; a raw one spins longer.",
        "sol2": "Spin it; a raw one soon wobbles and stops.",
        "label": 1,
    },
)


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    options = [text_of(row, column, row_id) for column in ("sol1", "sol2")]
    answer = number_of(row, "label", range(2), row_id)
    asked = f"Goal: {text_of(row, 'goal', row_id)}\nWhich of these reaches it?"
    return choice_example(row_id, asked, options, answer)


TASKS.register("piqa")(
    Task(
        name="piqa",
        version=1,
        description="PIQA: the one of two ways that reaches an everyday goal.",
        columns=("goal", "sol1", "sol2", "label"),
        build=_example,
        rows=SAMPLE,
        hub_id="ybisk/piqa",
        # The main branch holds a loading script, which current `datasets` does not run. The star is the
        # configuration, which the conversion has called "plain_text" and "default".
        hub_revision="refs/convert/parquet",
        hub_files={"train": "*/train/*.parquet", "validation": "*/validation/*.parquet"},
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4",
    )
)
