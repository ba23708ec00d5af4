"""SciTLDR: the one-sentence summary of a paper's abstract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, spaced, texts_of

SAMPLE: tuple[Mapping[str, Any], ...] = (
    {
        "source": [
            "Small ovens heat unevenly.",
            "We place a fan in front of the coil and measure the temperature at nine points.",
            "The spread falls from 31 to 6 degrees at no cost in time.",
        ],
        "target": ["A fan evens out the heat of small ovens at no cost in time."],
    },
    {
        "source": [
            "Sorting networks are fixed sequences of comparisons.",
            "We search them with integer programming and find shorter ones for eleven and twelve inputs.",
        ],
        "target": [
            "Integer programming finds shorter sorting networks for eleven and twelve inputs.",
            "Shorter sorting networks by integer programming.",
        ],
    },
    {
        "source": [
            "Bird song is hard to tell apart in wind.",
            "We train a classifier on recordings mixed with noise of the same site.",
            "It recognises 14 species as well in wind as in calm.",
        ],
        "target": ["Mixing recordings with local noise makes a classifier of bird song robust to wind."],
    },
    {
        "source": [
            "Many proofs about lists repeat one induction.",
            "We give a tactic that finds it by unification.",
            "It closes 212 of 260 lemmas of a standard library.",
        ],
        "target": ["A tactic that finds the induction of proofs about lists by unification."],
    },
    {
        "source": [
            "Cheap sensors drift.",
            "We calibrate them against each other when two buses of a fleet meet.",
            "Errors stay below five percent for a year.",
        ],
        "target": [
            "Sensors on buses calibrate each other whenever two buses meet.",
            "Drift of cheap sensors is corrected by meetings of a fleet.",
        ],
    },
    {
        "source": [
            "We ask whether readers notice when a table is sorted.",
            "Eye tracking of 48 readers shows that a sorted column halves the time of a look-up.",
        ],
        "target": ["Sorted columns halve the time of looking something up in a table."],
    },
)


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
        rows=SAMPLE,
        hub_id="allenai/scitldr",
        hub_config="Abstract",
        # The main branch holds a loading script, which current `datasets` does not run.
        hub_revision="refs/convert/parquet",
        hub_files={name: f"Abstract/{name}/*.parquet" for name in ("train", "validation", "test")},
        metric="similarity",
        other_splits=("validation",),
    )
)
