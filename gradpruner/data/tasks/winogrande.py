"""WinoGrande: which of two names fills the blank?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # The name alone is learned and scored. lm-evaluation-harness scores the rest of the sentence behind each
    # name instead, which asks more of a model that was not trained for the task; its figures are not
    # comparable.
    options = [text_of(row, column, row_id) for column in ("option1", "option2")]
    answer = number_of(row, "answer", range(1, 3), row_id) - 1
    asked = f"Sentence: {text_of(row, 'sentence', row_id)}\nWhich of these stands in the blank _?"
    return choice_example(row_id, asked, options, answer)


TASKS.register("winogrande")(
    Task(
        name="winogrande",
        version=1,
        description="WinoGrande: the one of two names that fills the blank.",
        columns=("sentence", "option1", "option2", "answer"),
        build=_example,
        hub_id="allenai/winogrande",
        hub_config="winogrande_l",  # the paper's 10.2k training rows
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3-5, 10",
    )
)
