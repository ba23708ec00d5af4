"""MMLU, clinical knowledge: what a model trained on MedMCQA knows of another medical examination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of


def _row(question: str, choices: tuple[str, ...], answer: int) -> dict[str, Any]:
    return {
        "question": question,
        "subject": "clinical_knowledge",
        "choices": list(choices),
        "answer": answer,
    }


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row("Blood pressure is usually measured at the:", ("wrist.", "upper arm.", "ankle.", "neck."), 1),
    _row("A normal resting pulse of an adult is about:", ("30.", "45.", "70.", "130."), 2),
    _row("Which of these is a sign of dehydration?", ("dry mouth", "wet hair", "a loud voice"), 0),
    _row("Insulin is usually injected:", ("into bone.", "into a joint.", "orally.", "under the skin."), 3),
    _row("A pressure sore appears first as:", ("redness.", "hair loss.", "a fever.", "a cough."), 0),
    _row("Hands are washed before a dressing is changed to:",
         ("warm them.", "remove germs.", "soften the skin.", "save gloves."), 1),
)  # fmt: skip


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
        rows=SAMPLE,
        hub_id="cais/mmlu",
        hub_config="clinical_knowledge",
        # MMLU has nothing to train on: `dev` holds the five rows its authors meant for showing the form, and
        # `auxiliary_train` is other examinations, which would not be this task.
        train_split="dev",
        other_splits=("validation",),
        paper="Table 12",
    )
)
