"""PIQA: which of two ways reaches an everyday goal?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example


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
        hub_id="ybisk/piqa",
        # The main branch holds a loading script, which current `datasets` does not run. The star is the
        # configuration, which the conversion has called "plain_text" and "default".
        hub_revision="refs/convert/parquet",
        hub_files={"train": "*/train/*.parquet", "validation": "*/validation/*.parquet"},
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4",
    )
)
