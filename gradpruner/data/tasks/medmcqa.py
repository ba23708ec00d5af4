"""MedMCQA: questions of Indian medical entrance examinations, four options each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of

_OPTIONS = ("opa", "opb", "opc", "opd")


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # `cop` counts from 0 on the hub (and is -1 in its test split, which has no answers). In the authors' own
    # files it counts from 1; nothing in a single row tells the two apart, but a 4 is refused.
    options = options_of([row[column] for column in _OPTIONS], "opa to opd", row_id)
    answer = number_of(row, "cop", range(len(options)), row_id, "0 to 3, counted from 0 as on the hub")
    return choice_example(row_id, f"Question: {text_of(row, 'question', row_id)}", options, answer)


TASKS.register("medmcqa")(
    Task(
        name="medmcqa",
        version=1,
        description="MedMCQA: medical entrance examinations, four options.",
        columns=("question", *_OPTIONS, "cop"),
        build=_example,
        hub_id="openlifescienceai/medmcqa",
        # The paper compares texts, not letters: an answer near the right one earns something. The likelihood
        # of the options can be had as well.
        metric="similarity",
        eval_split="validation",
        train_limit=40_000,
        paper="Tables 1, 3, 4, 7",
    )
)
