"""PubMedQA: does the study answer its question with yes, no or maybe, and what does it conclude?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import FIX, TASKS, Task, refusal, spaced, text_of, texts_of
from gradpruner.errors import DataError

DECISIONS = ("yes", "no", "maybe")


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    contexts = row["context"].get("contexts") if isinstance(row["context"], Mapping) else None
    if not contexts:
        raise DataError(f"{row_id}: 'context' has no list 'contexts'.", hint=FIX)
    if row["final_decision"] not in DECISIONS:
        raise refusal(row, "final_decision", row_id, ", ".join(DECISIONS))
    prompt = "\n".join(
        [
            f"Abstract: {' '.join(texts_of({'contexts': contexts}, 'contexts', row_id))}",
            f"Question: {text_of(row, 'question', row_id)}",
            "Answer yes, no or maybe, then give the conclusion.",
            "Answer:",
        ]
    )
    # The paper scores PubMedQA by the similarity of texts, which says little of single words: so the answer
    # is the conclusion, opened by the decision. What follows: similarity is mostly that of the conclusion
    # (about 40 words), a wrong decision alone costs little, and the accuracy of the decision is that of the
    # first word.
    answer = f"{row['final_decision']}. {text_of(row, 'long_answer', row_id)}"
    return Example(row_id, prompt, spaced(answer))


TASKS.register("pubmedqa")(
    Task(
        name="pubmedqa",
        version=1,
        description="PubMedQA, labelled by experts: yes, no or maybe, and the study's conclusion.",
        columns=("question", "context", "long_answer", "final_decision"),
        build=_example,
        hub_id="qiaojin/PubMedQA",
        hub_config="pqa_labeled",
        # The hub has one split of 1,000. The authors' test half is a list of ids kept elsewhere; a folder
        # with their train and test files is used as it is.
        hold_out=500,
        metric="similarity",
        paper="Tables 1, 3, 4",
    )
)
