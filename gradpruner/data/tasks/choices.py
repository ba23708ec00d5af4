"""Multiple-choice tasks, all with the same form of prompt.

    <what is asked>
    Options:
    - <option>
    - <option>
    Answer: <option>

The answer is the option's text, not a letter: a small or base model need not know what "B" stands for, and
the likelihood of an option is that of its words, as lm-evaluation-harness scores these tasks. The options are
listed, because otherwise a greedy answer could hardly match one of them word for word. They have no letters,
so that there is only one way to name an option.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.common.errors import DataError
from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import (
    CONVERTED,
    FIX,
    Build,
    Row,
    Task,
    add,
    filled,
    number_of,
    refusal,
    spaced,
    text_of,
)

# Marks left by the extraction from WikiHow; other brackets are part of the texts.
_TITLE = re.compile(r"[.\s]*\[title\]\s*")
_MARK = re.compile(r"\[(?:header|step|substeps?)\]\s*")
_MEDMCQA = ("opa", "opb", "opc", "opd")


def choice_example(row_id: str, asked: str, options: Sequence[str], answer: int) -> Example:
    """Makes an example of a question.

    Equal options are merged, in the order of their first appearance; otherwise they would be scored twice.
    Options that differ in case only stay separate (in genetics "Rr" is not "rr"). If a single option is left,
    it is the only choice of the example, and `load_task` leaves the row out.

    Args:
        row_id: Id of the row.
        asked: Everything above the options.
        options: Texts of the options; runs of white space become one space, and blank options are left out.
        answer: Index of the right option, from 0.

    Raises:
        DataError: If the right option is blank.
    """
    flat = [" ".join(option.split()) for option in options]
    if not flat[answer]:
        raise DataError(f"{row_id}: the right option, number {answer + 1}, is blank.", hint=FIX)
    offered = list(dict.fromkeys(filter(None, flat)))
    listed = "\n".join(f"- {option}" for option in offered)
    prompt = f"{asked}\nOptions:\n{listed}\nAnswer:"
    return Example(row_id, prompt, spaced(flat[answer]), tuple(map(spaced, offered)))


def options_of(values: Any, column: str, row_id: str) -> list[str]:
    """Returns a list of options unchanged, after checking it.

    Raises:
        DataError: If the value is empty or not a list of texts.
    """
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise DataError(f"{row_id}: '{column}' is {values!r}; a list of options is expected.", hint=FIX)
    return values


def _pair(asked: str, columns: Sequence[str], answer: str, first: int) -> Build:
    """Returns a function for questions with a column per option; `answer` holds the right one's number."""

    def build(row: Row, row_id: str) -> Example:
        options = [text_of(row, column, row_id) for column in columns]
        right = number_of(row, answer, range(first, first + len(options)), row_id) - first
        return choice_example(row_id, filled(asked, row, row_id), options, right)

    return build


def _arc(row: Row, row_id: str) -> Example:
    choices = row["choices"] if isinstance(row["choices"], Mapping) else {}
    texts = options_of(choices.get("text"), "choices", row_id)
    labels = choices.get("label")
    if not isinstance(labels, list) or len(labels) != len(texts):
        raise DataError(
            f"{row_id}: 'choices' has {len(texts)} texts and the labels {labels!r}.",
            hint='Write it as {"text": [...], "label": [...]}, with as many labels as texts.',
        )
    # The key is looked up among the labels: "B" need not be the second option.
    if row["answerKey"] not in labels:
        raise refusal(row, "answerKey", row_id, ", ".join(map(str, labels)))
    return choice_example(
        row_id, filled("Question: {question}", row, row_id), texts, labels.index(row["answerKey"])
    )


def _medmcqa(row: Row, row_id: str) -> Example:
    # `cop` counts from 0 on the hub (and is -1 in its test split, which has no answers). In the authors' own
    # files it counts from 1. A single row does not show which, but a 4 is refused.
    options = options_of([row[column] for column in _MEDMCQA], "opa to opd", row_id)
    answer = number_of(row, "cop", range(len(options)), row_id, "0 to 3, counted from 0 as on the hub")
    return choice_example(row_id, filled("Question: {question}", row, row_id), options, answer)


def _mmlu(row: Row, row_id: str) -> Example:
    options = options_of(row["choices"], "choices", row_id)
    answer = number_of(row, "answer", range(len(options)), row_id)
    return choice_example(row_id, filled("Question: {question}", row, row_id), options, answer)


def _hellaswag(row: Row, row_id: str) -> Example:
    endings = [_plain(ending) for ending in options_of(row["endings"], "endings", row_id)]
    answer = number_of(row, "label", range(len(endings)), row_id)
    told = f"{text_of(row, 'activity_label', row_id)}: {_plain(text_of(row, 'ctx', row_id))}"
    return choice_example(row_id, f"{told}\nWhich of these goes on with it?", endings, answer)


def _plain(text: str) -> str:
    """Removes the marks of WikiHow's layout from a text."""
    return _MARK.sub("", _TITLE.sub(". ", text).removeprefix(". ")).strip()


add(
    *(
        Task(
            name=name,
            description=f"{config}: {said}.",
            columns=("question", "choices", "answerKey"),
            build=_arc,
            hub_id="allenai/ai2_arc",
            hub_config=config,
            other_splits=("validation",),
            paper=paper,
        )
        for name, config, said, paper in (
            ("arc_easy", "ARC-Easy", "school science, three to five options", "Tables 1, 3, 4"),
            ("arc_challenge", "ARC-Challenge", "school science that word overlap does not solve", ""),
        )
    ),
    Task(
        name="hellaswag",
        description="HellaSwag: the sentence that goes on with what happens, one of four.",
        columns=("activity_label", "ctx", "endings", "label"),
        build=_hellaswag,
        hub_id="Rowan/hellaswag",
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4, 6-9, 13",
    ),
    Task(
        name="medmcqa",
        description="MedMCQA: medical entrance examinations, four options.",
        columns=("question", *_MEDMCQA, "cop"),
        build=_medmcqa,
        hub_id="openlifescienceai/medmcqa",
        # The paper compares texts, not letters: an answer close to the right one earns part of the score. The
        # likelihoods of the options can be measured too.
        metric="similarity",
        eval_split="validation",
        train_limit=40_000,
        paper="Tables 1, 3, 4, 7",
    ),
    Task(
        name="mmlu_clinical_knowledge",
        description="MMLU, clinical knowledge: for testing across datasets after training on MedMCQA.",
        columns=("question", "choices", "answer"),
        build=_mmlu,
        hub_id="cais/mmlu",
        hub_config="clinical_knowledge",
        # MMLU has no training rows for this task: `dev` has the five rows its authors use to show the form,
        # and `auxiliary_train` comes from other examinations.
        train_split="dev",
        other_splits=("validation",),
        paper="Table 12",
    ),
    Task(
        name="piqa",
        description="PIQA: the one of two ways that reaches an everyday goal.",
        columns=("goal", "sol1", "sol2", "label"),
        build=_pair("Goal: {goal}\nWhich of these reaches it?", ("sol1", "sol2"), "label", first=0),
        hub_id="ybisk/piqa",
        # The star stands for the configuration, which the conversion has called "plain_text" and "default".
        hub_revision=CONVERTED,
        hub_files={"train": "*/train/*.parquet", "validation": "*/validation/*.parquet"},
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3, 4",
    ),
    Task(
        name="winogrande",
        description="WinoGrande: the one of two names that fills the blank.",
        columns=("sentence", "option1", "option2", "answer"),
        # Only the name is learned and scored. lm-evaluation-harness instead scores the rest of the sentence
        # after each name, which demands more of a model that was not trained for the task; its figures are
        # not comparable.
        build=_pair(
            "Sentence: {sentence}\nWhich of these stands in the blank _?",
            ("option1", "option2"),
            "answer",
            first=1,
        ),
        hub_id="allenai/winogrande",
        hub_config="winogrande_l",  # the paper's 10.2k training rows
        eval_split="validation",  # the hub's test split has no answers
        paper="Tables 1, 3-5, 10",
    ),
)
