"""WinoGrande: which of two names fills the blank?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example


def _row(sentence: str, option1: str, option2: str, answer: int) -> dict[str, str]:
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": str(answer)}


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row("The jug did not fit into the basket because the _ was too tall.", "jug", "basket", 1),
    _row("The jug did not fit into the basket because the _ was too small.", "jug", "basket", 2),
    _row("Priya lent Marta her umbrella because _ had left hers at home.", "Priya", "Marta", 2),
    _row("Priya lent Marta her umbrella because _ had brought two.", "Priya", "Marta", 1),
    _row("Tom chose the dentist over the barber, for the _ could see him at once.", "dentist", "barber", 1),
    _row("The soup was salty and the bread was stale, so Nils ate more of the _ after soaking it.",
         "soup", "bread", 2),
)  # fmt: skip


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
        rows=SAMPLE,
        hub_id="allenai/winogrande",
        hub_config="winogrande_l",  # the paper's 10.2k training rows
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3-5, 10",
    )
)
