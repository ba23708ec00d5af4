"""PubMedQA: does the study answer its question with yes, no or maybe, and what does it conclude?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import FIX, TASKS, Task, refusal, spaced, text_of, texts_of
from gradpruner.errors import DataError

DECISIONS = ("yes", "no", "maybe")


def _row(
    number: int, question: str, contexts: tuple[str, ...], conclusion: str, decision: str
) -> dict[str, Any]:
    labels = ["METHODS", "RESULTS"][: len(contexts)]
    return {
        "pubid": number,
        "question": question,
        "context": {"contexts": list(contexts), "labels": labels, "meshes": ["Humans"]},
        "long_answer": conclusion,
        "final_decision": decision,
    }


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _row(
        1,
        "Does a reminder by text message improve attendance at dental check-ups?",
        (
            "Of 400 adults, half were sent a message the day before their appointment.",
            "Attendance was 88% with the message and 74% without it (p<0.01).",
        ),
        "A reminder the day before improved attendance at check-ups.",
        "yes",
    ),
    _row(
        2,
        "Is grip strength related to hearing in older people?",
        (
            "Grip strength and hearing thresholds of 212 people aged 70 to 80 were measured.",
            "After adjustment for age there was no association (r=0.02).",
        ),
        "Grip strength was not associated with hearing once age was taken into account.",
        "no",
    ),
    _row(
        3,
        "Can a shorter course of antibiotics be given after removal of the appendix?",
        (
            "Sixty patients received three days of treatment, sixty received five.",
            "Infections occurred in two and in one of them; the difference was not significant.",
        ),
        "A course of three days may be enough, but the trial was too small to exclude more infections.",
        "maybe",
    ),
    _row(
        4,
        "Do standing desks reduce back pain in office workers?",
        ("Pain scores fell by 1.9 points in the group with standing desks and by 0.2 points in the other.",),
        "Standing desks reduced back pain over six months.",
        "yes",
    ),
    _row(
        5,
        "Does music in the waiting room lower blood pressure?",
        (
            "Blood pressure was taken in 90 patients, on days with music and on days without.",
            "The mean difference was 0.4 mmHg (95% confidence interval -1.1 to 1.9).",
        ),
        "Music in the waiting room did not change blood pressure.",
        "no",
    ),
    _row(
        6,
        "Is a family history of migraine a risk factor for motion sickness in children?",
        (
            "Parents of 1,020 schoolchildren answered a questionnaire.",
            "Motion sickness was reported by 41% of children with such a history and by 19% of the others.",
        ),
        "Children with a family history of migraine are more often travel sick.",
        "yes",
    ),
)


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
        rows=SAMPLE,
        hub_id="qiaojin/PubMedQA",
        hub_config="pqa_labeled",
        # The hub has one split of 1,000. The authors' test half is a list of ids kept elsewhere; a folder
        # with their train and test files is used as it is.
        hold_out=500,
        metric="similarity",
        paper="Tables 1, 3, 4",
    )
)
