"""FinGPT sentiment: news and tweets about finance, the choices named by each row's instruction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, refusal, spaced, text_of
from gradpruner.errors import DataError


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
