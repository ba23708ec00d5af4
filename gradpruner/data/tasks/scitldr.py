"""SciTLDR: the one-sentence summary of a paper's abstract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, spaced, texts_of


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # Evaluation rows have several summaries; the first is the answer. Published figures take the best match
    # over all of them and so are higher.
    abstract = " ".join(texts_of(row, "source", row_id))
    prompt = f"Abstract: {abstract}\nSummarise it in one sentence.\nSummary:"
    return Example(row_id, prompt, spaced(texts_of(row, "target", row_id)[0]))


TASKS.register("scitldr")(
    Task(
        name="scitldr",
        version=1,
        description="SciTLDR: one sentence that says what a paper found, from its abstract.",
        columns=("source", "target"),
        build=_example,
        hub_id="allenai/scitldr",
        hub_config="Abstract",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={name: f"Abstract/{name}/*.parquet" for name in ("train", "validation", "test")},
        metric="similarity",
        other_splits=("validation",),
    )
)
