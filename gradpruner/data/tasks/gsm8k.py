"""GSM8K: word problems of grade-school mathematics, worked step by step. A probe of reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.numbers import final_number
from gradpruner.data.tasks.base import TASKS, Task, refusal, spaced, text_of


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    answer = text_of(row, "answer", row_id)
    if "####" not in answer or final_number(answer) is None:
        raise refusal(row, "answer", row_id, "the steps, then '#### ' and the number")
    # The dataset's <<6*7=42>> stay: they are part of what was published, and spelling out each sum helps a
    # small model. Only the number behind #### is scored.
    prompt = (
        f"Question: {text_of(row, 'question', row_id)}\n"
        "Work it out step by step and end with #### and the number.\nAnswer:"
    )
    return Example(row_id, prompt, spaced(answer))


TASKS.register("gsm8k")(
    Task(
        name="gsm8k",
        version=1,
        description="GSM8K: grade-school mathematics, worked step by step (a probe of reasoning).",
        columns=("question", "answer"),
        build=_example,
        hub_id="openai/gsm8k",
        hub_config="main",
        metric="final_number",
        probe=True,
    )
)
