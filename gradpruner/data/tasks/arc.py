"""ARC: science questions of American schools, grades three to nine, in an easy and a hard set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, refusal, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of
from gradpruner.errors import DataError


def _row(name: str, question: str, texts: tuple[str, ...], key: str, labels: str = "ABCDE") -> dict[str, Any]:
    choices = {"text": list(texts), "label": list(labels[: len(texts)])}
    return {"id": name, "question": question, "choices": choices, "answerKey": key}


# Both sets have rows with three or five options, and rows that number them 1 to 4.
EASY_SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row("E1", "Which tool measures how warm a liquid is?", ("scale", "ruler", "thermometer", "clock"), "C"),
    _row("E2", "What does a plant take in through its roots?", ("water", "light", "sugar", "sound"), "A"),
    _row("E3", "Which of these is a conductor of electricity?", ("wool", "copper wire", "glass"), "B"),
    _row("E4", "What pulls a dropped ball down?", ("friction", "magnetism", "wind", "gravity"), "4", "1234"),
    _row("E5", "Which animal lays eggs?", ("hen", "horse", "bat", "whale"), "1", "1234"),
    _row(
        "E6", "Which season follows autumn in Norway?", ("spring", "summer", "autumn", "winter", "May"), "D"
    ),
)
HARD_SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row(
        "H1",
        "A wet towel hung outside dries faster on a windy day. Why?",
        (
            "Wind cools the water until it freezes.",
            "Wind carries away the damp air next to the towel.",
            "Wind adds heat to the towel.",
            "Wind presses the water out of the towel.",
        ),
        "B",
    ),
    _row(
        "H2",
        "Two pots hold the same seedlings and the same soil; only one stands in the dark. What is tested?",
        ("the effect of soil", "the effect of light", "the effect of the pot", "the effect of the seed"),
        "B",
    ),
    _row(
        "H3",
        "Which change in a steel bridge is only physical?",
        ("It rusts.", "Its paint burns.", "It grows longer in summer."),
        "C",
    ),
    _row(
        "H4",
        "A cart of twice the mass is pushed with the same force. Its acceleration is",
        ("half as large.", "twice as large.", "the same.", "zero."),
        "1",
        "1234",
    ),
    _row(
        "H5",
        "Why can astronauts on the Moon jump higher than at home?",
        (
            "There is no air.",
            "They are stronger there.",
            "The ground is soft.",
            "The Moon's gravity is weaker.",
        ),
        "D",
    ),
    _row(
        "H6",
        "Which part of a cell lets some substances in and keeps others out?",
        ("nucleus", "membrane", "vacuole", "chromosome", "ribosome"),
        "B",
    ),
)


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


def _task(name: str, config: str, description: str, rows: tuple[Mapping[str, Any], ...], paper: str) -> Task:
    return Task(
        name=name,
        version=1,
        description=description,
        columns=("question", "choices", "answerKey"),
        build=_example,
        rows=rows,
        hub_id="allenai/ai2_arc",
        hub_config=config,
        other_splits=("validation",),
        paper=paper,
    )


TASKS.register("arc_easy")(
    _task(
        "arc_easy",
        "ARC-Easy",
        "ARC-Easy: school science, three to five options.",
        EASY_SAMPLE,
        "Tables 1, 3, 4",
    )
)
TASKS.register("arc_challenge")(
    _task(
        "arc_challenge",
        "ARC-Challenge",
        "ARC-Challenge: school science that word overlap does not solve.",
        HARD_SAMPLE,
        "",
    )
)
