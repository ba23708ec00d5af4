"""FinGPT sentiment: news and tweets about finance, the choices named by each row's instruction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, refusal, spaced, text_of
from gradpruner.errors import DataError

_THREE = "Please choose an answer from {negative/neutral/positive}."
_SEVEN = (
    "Please choose an answer from {strong negative/moderately negative/mildly negative/neutral/"
    "mildly positive/moderately positive/strong positive}."
)
_NEWS = "What is the sentiment of this news?"
_TWEET = "What is the sentiment of this tweet?"

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {
        "instruction": f"{_NEWS} {_THREE}",
        "input": "Net sales of the bakery chain grew to EUR 18.2 mn from EUR 16.9 mn .",
        "output": "positive",
        "source": "fpb",
    },
    {
        "instruction": f"{_NEWS} {_THREE}",
        "input": "The shipyard named a new head of purchasing .",
        "output": "neutral",
        "source": "fpb",
    },
    {
        "instruction": f"{_TWEET} {_THREE}",
        "input": "Analyst cuts the price target of the solar maker in half",
        "output": "negative",
        "source": "tfns",
    },
    {
        "instruction": f"{_TWEET} {_THREE}",
        "input": "Grocer beats on both lines, raises full-year guidance",
        "output": "positive",
        "source": "tfns",
    },
    {
        "instruction": f"{_NEWS} {_SEVEN}",
        "input": "The chip maker expects demand to stay soft through the winter.",
        "output": "moderately negative",
        "source": "nwgi",
    },
    {
        "instruction": f"{_NEWS} {_SEVEN}",
        "input": "Shares of the airline jumped after it ordered no new planes and paid down debt.",
        "output": "strong positive",
        "source": "nwgi",
    },
    {
        "instruction": f"{_NEWS} {_SEVEN}",
        "input": "The insurer will publish its quarterly report on Thursday.",
        "output": "neutral",
        "source": "nwgi",
    },
)


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # The dataset's own instruction stays: it differs by source and names the choices.
    instruction = text_of(row, "instruction", row_id)
    listed = re.search(r"\{([^{}]+)\}", instruction)
    if not listed:
        raise DataError(
            f"{row_id}: the instruction names no choices: {instruction!r}.",
            hint="It must list them in braces: {negative/neutral/positive}.",
        )
    choices = tuple(choice.strip() for choice in listed[1].split("/"))
    answer = text_of(row, "output", row_id)
    if answer not in choices:
        raise refusal(row, "output", row_id, ", ".join(choices))
    prompt = f"Instruction: {instruction}\nInput: {text_of(row, 'input', row_id)}\nAnswer:"
    return Example(row_id, prompt, spaced(answer), tuple(map(spaced, choices)))


TASKS.register("fingpt_sentiment")(
    Task(
        name="fingpt_sentiment",
        version=1,
        description="FinGPT: sentiment of financial news and tweets, three or seven classes.",
        columns=("instruction", "input", "output"),
        build=_example,
        rows=SAMPLE,
        hub_id="FinGPT/fingpt-sentiment-train",
        # The hub has one split, with some sources repeated many times over.
        hold_out=1500,
        # The paper's measure, which finds "mildly positive" close to "positive". The answers are class names,
        # so exact match and the likelihood of the choices can be had as well.
        metric="similarity",
        train_limit=40_000,
        paper="Tables 1, 3, 4, 7",
    )
)
