"""TREC question classification: what kind of thing does a question ask for? (six classes)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, label_of, spaced, text_of

# The hub's order: ABBR, ENTY, DESC, HUM, LOC, NUM. Written out in lower case because the short
# names are pieces of tokens that no model has read in a sentence.
LABELS = ("abbreviation", "entity", "description", "human", "location", "numeric")


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
        hub_id="CogComp/trec",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={"train": "default/train/*.parquet", "test": "default/test/*.parquet"},
    )
)
