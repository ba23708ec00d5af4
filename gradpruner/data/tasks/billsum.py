"""BillSum: summarise a bill of the US Congress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, spaced, text_of


def _example(row: Mapping[str, Any], row_id: str) -> Example:
    # Bills are longer than most limits (5,000 to 20,000 characters); what is cut is the beginning. The title
    # is not shown: it often is the summary's first line.
    asked = f"Bill:\n{text_of(row, 'text', row_id)}\n\nSummarise this bill.\nSummary:"
    return Example(row_id, asked, spaced(text_of(row, "summary", row_id)))


TASKS.register("billsum")(
    Task(
        name="billsum",
        version=1,
        description="BillSum: the summary of a bill of the US Congress.",
        columns=("text", "summary"),
        build=_example,
        hub_id="FiscalNote/billsum",
        metric="similarity",
        # California's bills: another legislature's language, for a test across domains.
        other_splits=("ca_test",),
        paper="Tables 1, 3, 4",
    )
)
