"""Financial PhraseBank: is a sentence of financial news negative, neutral or positive?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, spaced, text_of

LABELS = ("negative", "neutral", "positive")  # the hub's order


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # "for an investor" is the question the annotators of the dataset were asked.
    prompt = (
        "What is the sentiment of this sentence for an investor: "
        f"{', '.join(LABELS)}?\nSentence: {text_of(row, 'sentence', row_id)}\nAnswer:"
    )
    answer = spaced(label_of(row, "label", LABELS, row_id))
    return Example(row_id, prompt, answer, tuple(map(spaced, LABELS)))


TASKS.register("financial_phrasebank")(
    Task(
        name="financial_phrasebank",
        version=1,
        description="Financial PhraseBank (half the annotators agree): sentiment, three classes.",
        columns=("sentence", "label"),
        build=_example,
        hub_id="takala/financial_phrasebank",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={"train": "sentences_50agree/train/*.parquet"},
        hold_out=1000,
    )
)
