"""MedMCQA: questions of Indian medical entrance examinations, four options each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of

_OPTIONS = ("opa", "opb", "opc", "opd")


def _row(question: str, options: tuple[str, str, str, str], cop: int, subject: str) -> dict[str, Any]:
    return {
        "question": question,
        **dict(zip(_OPTIONS, options, strict=True)),
        "cop": cop,
        "choice_type": "single",
        "exp": None,
        "subject_name": subject,
        "topic_name": None,
    }


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row("Which of these is made in the skin in sunlight?",
         ("vitamin A", "vitamin B12", "vitamin C", "vitamin D"), 3, "Biochemistry"),
    _row("The tibia is a bone of the", ("leg", "arm", "skull", "spine"), 0, "Anatomy"),
    _row("Insulin is secreted by the", ("spleen", "pancreas", "thyroid", "bladder"), 1, "Physiology"),
    _row("The antidote to heparin is", ("vitamin K", "naloxone", "protamine", "atropine"), 2, "Pharmacology"),
    _row("Scurvy is caused by a lack of", ("iron", "iodine", "ascorbic acid", "calcium"), 2, "Medicine"),
    _row("Which valve lies between left atrium and left ventricle?",
         ("aortic", "mitral", "tricuspid", "pulmonary"), 1, "Anatomy"),
    # As in the dataset, two options can be the same.
    _row("A fracture with an open wound is called", ("closed", "simple", "simple", "compound"), 3, "Surgery"),
)  # fmt: skip


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
        rows=SAMPLE,
        hub_id="openlifescienceai/medmcqa",
        # The paper compares texts, not letters: an answer near the right one earns something. The likelihood
        # of the options can be had as well.
        metric="similarity",
        eval_split="validation",
        train_limit=40_000,
        paper="Tables 1, 3, 4, 7",
    )
)
