"""GSM8K: word problems of grade-school mathematics, worked step by step. A probe of reasoning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.numbers import final_number
from gradpruner.data.tasks.base import TASKS, Task, refusal, spaced, text_of

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {
        "question": "A baker packs 6 rolls in a bag. How many rolls are in 7 bags after she eats 2?",
        "answer": "Seven bags hold 6 * 7 = <<6*7=42>>42 rolls.\n"
        "After she eats 2 there are 42 - 2 = <<42-2=40>>40.\n#### 40",
    },
    {
        "question": "Ines walks 3 km to school and back each day. How far does she walk in 5 days?",
        "answer": "A day is 3 * 2 = <<3*2=6>>6 km.\nFive days are 6 * 5 = <<6*5=30>>30 km.\n#### 30",
    },
    {
        "question": "A tank holds 1,500 litres. A third is used, then 250 are added. How much is in it?",
        "answer": "Used are 1500 / 3 = <<1500/3=500>>500; 1500 - 500 = <<1500-500=1000>>1000 stay.\n"
        "Then there are 1000 + 250 = <<1000+250=1250>>1250 litres.\n#### 1,250",
    },
    {
        "question": "Children pay $4 and adults $9. What do 2 adults and 3 children pay in dollars?",
        "answer": "Adults pay 2 * 9 = $<<2*9=18>>18.\nChildren pay 3 * 4 = $<<3*4=12>>12.\n"
        "Together it is 18 + 12 = $<<18+12=30>>30.\n#### 30",
    },
    {
        "question": "At dawn it is -8 degrees; by noon it is 5 degrees warmer. How many degrees is that?",
        "answer": "At noon it is -8 + 5 = <<-8+5=-3>>-3 degrees.\n#### -3",
    },
    {
        "question": "Omar reads half of 90 pages on Monday and 15 on Tuesday. How many are left?",
        "answer": "On Monday he reads 90 / 2 = <<90/2=45>>45 pages.\n"
        "Left are 90 - 45 - 15 = <<90-45-15=30>>30.\n#### 30",
    },
)


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
        rows=SAMPLE,
        hub_id="openai/gsm8k",
        hub_config="main",
        metric="final_number",
        probe=True,
    )
)
