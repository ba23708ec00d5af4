"""BillSum: summarise a bill of the US Congress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradpruner.data.examples import Example
from gradpruner.data.tasks.base import TASKS, Task, spaced, text_of


def _bill(title: str, sections: tuple[str, ...], summary: str) -> dict[str, str]:
    head = f"SECTION 1. SHORT TITLE.\n\n    This Act may be cited as the ``{title}''.\n\n"
    body = "\n\n".join(f"SEC. {number}. {text}" for number, text in enumerate(sections, start=2))
    return {"text": head + body, "summary": summary, "title": f"A bill to enact the {title}."}


SAMPLE: tuple[Mapping[str, Any], ...] = (
    _bill(
        "Covered Bridge Repair Act",
        (
            "GRANTS.\n\n    The Secretary of Transportation may make grants to counties to repair covered "
            "bridges built before 1930.",
            "FUNDING.\n\n    There is authorized $4,000,000 for each of three fiscal years.",
        ),
        "Covered Bridge Repair Act - Authorizes the Secretary of Transportation to make grants to counties "
        "for the repair of covered bridges built before 1930.",
    ),
    _bill(
        "Night Sky Protection Act",
        ("LIGHTING.\n\n    Every new outdoor lamp on land of the National Park Service shall be shielded.",),
        "Night Sky Protection Act - Requires new outdoor lamps in national parks to be shielded.",
    ),
    _bill(
        "Rural Library Hours Act",
        (
            "PURPOSE.\n\n    To keep libraries in towns of fewer than 5,000 people open in the evening.",
            "REPORT.\n\n    The Director shall report to Congress each year on the hours kept.",
        ),
        "Rural Library Hours Act - Supports evening hours of libraries in small towns.",
    ),
    _bill(
        "Veterans Tool Loan Act",
        ("LOANS.\n\n    The Secretary of Veterans Affairs shall lend trade tools to apprentices.",),
        "Veterans Tool Loan Act - Directs the Secretary of Veterans Affairs to lend tools to apprentices.",
    ),
    _bill(
        "Harbor Seal Count Act",
        ("SURVEY.\n\n    The Administrator shall count harbor seals every second spring.",),
        "Harbor Seal Count Act - Provides for a count of harbor seals every two years.",
    ),
    _bill(
        "School Well Water Act",
        (
            "TESTS.\n\n    A school with its own well shall have the water tested for lead twice a year.",
            "COSTS.\n\n    The Administrator shall bear half the cost of each test.",
        ),
        "School Well Water Act - Has schools with wells test the water for lead and pays half the cost.",
    ),
)


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
        rows=SAMPLE,
        hub_id="FiscalNote/billsum",
        metric="similarity",
        # California's bills: another legislature's language, for a test across domains.
        other_splits=("ca_test",),
        paper="Tables 1, 3, 4",
    )
)
