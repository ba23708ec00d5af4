"""TREC question classification: what kind of thing does a question ask for? (six classes)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, spaced, text_of

# The hub's order: ABBR, ENTY, DESC, HUM, LOC, NUM. Written out in lower case because the short
# names are pieces of tokens that no model has read in a sentence.
LABELS = ("abbreviation", "entity", "description", "human", "location", "numeric")

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {"text": "What do the letters WLAN mean ?", "coarse_label": 0},
    {"text": "What is the short form of kilowatt hour ?", "coarse_label": 0},
    {"text": "Which instrument has six strings and a long neck ?", "coarse_label": 1},
    {"text": "Why do leaves fall in autumn ?", "coarse_label": 2},
    {"text": "Who repaired the tower clock of Bern ?", "coarse_label": 3},
    {"text": "In which valley does the cheese market take place ?", "coarse_label": 4},
    {"text": "How many bridges cross the river below the dam ?", "coarse_label": 5},
    {"text": "What year did the ferry make its last crossing ?", "coarse_label": 5},
)


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # The classes are listed so that an instruction-tuned model can answer before any training.
    prompt = (
        "Classify the question by what it asks for: "
        f"{', '.join(LABELS)}.\nQuestion: {text_of(row, 'text', row_id)}\nAnswer:"
    )
    answer = spaced(label_of(row, "coarse_label", LABELS, row_id))
    return Example(row_id, prompt, answer, tuple(map(spaced, LABELS)))


TASKS.register("trec")(
    Task(
        name="trec",
        version=1,
        description="TREC: what kind of thing a question asks for, six classes.",
        columns=("text", "coarse_label"),
        build=_example,
        rows=SAMPLE,
        hub_id="CogComp/trec",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={"train": "default/train/*.parquet", "test": "default/test/*.parquet"},
    )
)
