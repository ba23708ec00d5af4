"""Financial PhraseBank: is a sentence of financial news negative, neutral or positive?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, spaced, text_of

LABELS = ("negative", "neutral", "positive")  # the hub's order

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {"sentence": "Operating profit fell to EUR 3.1 mn from EUR 4.8 mn a year ago .", "label": 0},
    {"sentence": "The mill will lay off 40 people by the end of the year .", "label": 0},
    {"sentence": "The annual meeting is held in Tampere on 12 April .", "label": 1},
    {"sentence": "The company makes valves and pumps for the paper industry .", "label": 1},
    {"sentence": "The board has seven members .", "label": 1},
    {"sentence": "Orders rose by a fifth , and the outlook was raised .", "label": 2},
    {"sentence": "The new contract is worth EUR 25 mn over three years .", "label": 2},
)


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
        rows=SAMPLE,
        hub_id="takala/financial_phrasebank",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={"train": "sentences_50agree/train/*.parquet"},
        hold_out=1000,
    )
)
