"""Tasks whose answer is a text: a summary, a conclusion, a worked answer."""

from __future__ import annotations

from collections.abc import Mapping

from gradpruner.common.errors import DataError
from gradpruner.data.examples import Example
from gradpruner.data.numbers import final_number
from gradpruner.data.tasks.base import (
    CONVERTED,
    FIX,
    Row,
    Task,
    add,
    filled,
    refusal,
    spaced,
    text_of,
    texts_of,
)

DECISIONS = ("yes", "no", "maybe")


def _billsum(row: Row, row_id: str) -> Example:
    # Bills are longer than most limits (5,000 to 20,000 characters), and their beginning is cut. The title is
    # not shown, because it is often the first line of the summary.
    asked = filled("Bill:\n{text}\n\nSummarise this bill.\nSummary:", row, row_id)
    return Example(row_id, asked, spaced(text_of(row, "summary", row_id)))


def _gsm8k(row: Row, row_id: str) -> Example:
    answer = text_of(row, "answer", row_id)
    if "####" not in answer or final_number(answer) is None:
        raise refusal(row, "answer", row_id, "the steps, then '#### ' and the number")
    # The <<6*7=42>> marks stay: they are part of the published dataset, and spelling out each calculation
    # helps a small model. Only the number after #### is scored.
    prompt = "Question: {question}\nWork it out step by step and end with #### and the number.\nAnswer:"
    return Example(row_id, filled(prompt, row, row_id), spaced(answer))


def _pubmedqa(row: Row, row_id: str) -> Example:
    contexts = row["context"].get("contexts") if isinstance(row["context"], Mapping) else None
    if not contexts:
        raise DataError(f"{row_id}: 'context' has no list 'contexts'.", hint=FIX)
    if row["final_decision"] not in DECISIONS:
        raise refusal(row, "final_decision", row_id, ", ".join(DECISIONS))
    abstract = " ".join(texts_of({"contexts": contexts}, "contexts", row_id))
    asked = "Question: {question}\nAnswer yes, no or maybe, then give the conclusion.\nAnswer:"
    prompt = f"Abstract: {abstract}\n{filled(asked, row, row_id)}"
    # The paper scores PubMedQA by the similarity of texts, which says little about single words. The answer
    # is therefore the conclusion, preceded by the decision. So the similarity is mostly that of the
    # conclusion (about 40 words), a wrong decision alone costs little, and the accuracy of the decision is
    # the accuracy of the first word.
    answer = f"{row['final_decision']}. {text_of(row, 'long_answer', row_id)}"
    return Example(row_id, prompt, spaced(answer))


def _scitldr(row: Row, row_id: str) -> Example:
    # Evaluation rows have several summaries; the first one is the answer. Published figures take the best
    # match over all summaries and are therefore higher.
    abstract = " ".join(texts_of(row, "source", row_id))
    prompt = f"Abstract: {abstract}\nSummarise it in one sentence.\nSummary:"
    return Example(row_id, prompt, spaced(texts_of(row, "target", row_id)[0]))


add(
    Task(
        name="billsum",
        description="BillSum: the summary of a bill of the US Congress.",
        columns=("text", "summary"),
        build=_billsum,
        hub_id="FiscalNote/billsum",
        metric="similarity",
        # Bills of California: the language of another legislature, for a test across domains.
        other_splits=("ca_test",),
        paper="Tables 1, 3, 4",
    ),
    Task(
        name="gsm8k",
        description="GSM8K: grade-school mathematics, worked step by step (a probe of reasoning).",
        columns=("question", "answer"),
        build=_gsm8k,
        hub_id="openai/gsm8k",
        hub_config="main",
        metric="final_number",
        probe=True,
    ),
    Task(
        name="pubmedqa",
        description="PubMedQA, labelled by experts: yes, no or maybe, and the study's conclusion.",
        columns=("question", "context", "long_answer", "final_decision"),
        build=_pubmedqa,
        hub_id="qiaojin/PubMedQA",
        hub_config="pqa_labeled",
        # The hub has one split of 1,000 rows. The authors' test half is a list of ids published elsewhere; a
        # folder with their train and test files is used as it is.
        hold_out=500,
        metric="similarity",
        paper="Tables 1, 3, 4",
    ),
    Task(
        name="scitldr",
        description="SciTLDR: one sentence that says what a paper found, from its abstract.",
        columns=("source", "target"),
        build=_scitldr,
        hub_id="allenai/scitldr",
        hub_config="Abstract",
        hub_revision=CONVERTED,
        hub_files={name: f"Abstract/{name}/*.parquet" for name in ("train", "validation", "test")},
        metric="similarity",
        other_splits=("validation",),
    ),
)
