"""MMLU, clinical knowledge: what a model trained on MedMCQA knows of another medical examination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    options = options_of(row["choices"], "choices", row_id)
    answer = number_of(row, "answer", range(len(options)), row_id)
    return choice_example(row_id, f"Question: {text_of(row, 'question', row_id)}", options, answer)


TASKS.register("mmlu_clinical_knowledge")(
    Task(
        name="mmlu_clinical_knowledge",
        version=1,
        description="MMLU, clinical knowledge: for testing across datasets after training on MedMCQA.",
        columns=("question", "choices", "answer"),
        build=_example,
        hub_id="cais/mmlu",
        hub_config="clinical_knowledge",
        # MMLU has nothing to train on: `dev` holds the five rows its authors meant for showing the form, and
        # `auxiliary_train` is other examinations, which would not be this task.
        train_split="dev",
        other_splits=("validation",),
        paper="Table 12",
    )
)
