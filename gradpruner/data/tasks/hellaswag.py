"""HellaSwag: which of four sentences goes on with what happens?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, number_of, text_of
from gradpruner.data.tasks.multiple_choice import choice_example, options_of

# Left by the extraction from WikiHow; other brackets are the authors' own.
_TITLE = re.compile(r"[.\s]*\[title\]\s*")
_MARK = re.compile(r"\[(?:header|step|substeps?)\]\s*")


def _row(activity: str, ctx: str, endings: tuple[str, ...], label: int) -> dict[str, Any]:
    return {"activity_label": activity, "ctx": ctx, "endings": list(endings), "label": str(label)}


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row(
        "Making tea",
        "A woman fills a kettle and sets it on the stove. She",
        (
            "climbs onto the roof with it.",
            "paints the kettle blue.",
            "waits until it whistles and pours the water.",
            "throws the stove away.",
        ),
        2,
    ),
    _row(
        "Home and Garden",
        "[header] How to oil a squeaking door [title] Find the hinge. [step] Move the door slowly.",
        (
            "Listen at each hinge in turn.",
            "Sing along with it.",
            "[substeps] Take the house apart.",
            "Buy a second door and hang it up beside the first.",
        ),
        0,
    ),
    _row(
        "Rowing",
        "Four people carry a long boat down to the water. They",
        ("fold it.", "lower it in and take their seats.", "eat the oars.", "carry the water up to the boat."),
        1,
    ),
    _row(
        "Changing a wheel",
        "A man loosens the nuts of a flat wheel and lifts the car with a jack. He",
        (
            "lets all the other tyres down.",
            "falls asleep in the boot.",
            "drives off on three wheels.",
            "pulls the wheel off and fits the spare one.",
        ),
        3,
    ),
    _row(
        "Pets and Animals",
        "[header] How to brush a cat [title] Choose a calm moment. [step] Begin after a meal.",
        (
            "Brush with the fur, not against it.",
            "Wake the dog first.",
            "Use a broom and plenty of water.",
            "Do it only in thunderstorms.",
        ),
        0,
    ),
    _row(
        "Javelin",
        "An athlete runs up to the white line holding a javelin. She",
        ("sits down on it.", "hurls it far into the field.", "plants it and waters it.", "asks it the way."),
        1,
    ),
)


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    endings = [_plain(ending) for ending in options_of(row["endings"], "endings", row_id)]
    answer = number_of(row, "label", range(len(endings)), row_id)
    asked = (
        f"{text_of(row, 'activity_label', row_id)}: {_plain(text_of(row, 'ctx', row_id))}\n"
        "Which of these goes on with it?"
    )
    return choice_example(row_id, asked, endings, answer)


def _plain(text: str) -> str:
    """Returns a text without the marks of WikiHow's layout."""
    return _MARK.sub("", _TITLE.sub(". ", text).removeprefix(". ")).strip()


TASKS.register("hellaswag")(
    Task(
        name="hellaswag",
        version=1,
        description="HellaSwag: the sentence that goes on with what happens, one of four.",
        columns=("activity_label", "ctx", "endings", "label"),
        build=_example,
        rows=SAMPLE,
        hub_id="Rowan/hellaswag",
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4, 6-9, 13",
    )
)
