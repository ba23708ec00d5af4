"""What every row took in all: not its fine-tuning alone, but everything that had to be done for it."""

from __future__ import annotations

from gradpruner.reports.cells import Cell, Row, Table
from gradpruner.reports.formats import MISSING, duration, number, ratio, times, whole
from gradpruner.reports.reading import RunView, mapping, sequence

PARTS = ("tuning", "recording", "choosing", "repairing", "pruning", "training")


def whole_cost_table(view: RunView, *, tokens: bool = True) -> Table:
    """Seconds of every part by row, their sum, and the sum as a multiple of the dense row's.

    "resumed" stands where a stage went on from an interrupted start, which may lack seconds.

    Args:
        view: The run.
        tokens: Whether the tokens that were trained on are shown too, and what was resumed,
            for which a terminal has no room.
    """
    rows = []
    dense = _seconds(view, "dense")
    for variant in view.variants:
        found = _seconds(view, variant.name)
        if not found:
            continue
        total = found.get("total")
        cost = mapping(view.run, "variants", variant.name, "cost")
        cells = [
            Cell(variant.label),
            *(Cell(duration(found[part]) if found.get(part) else MISSING) for part in PARTS),
            Cell(duration(total), "resumed" if sequence(cost, "resumed") and tokens else ""),
            Cell(MISSING if variant.is_dense else times(ratio(total, dense.get("total")))),
        ]
        if tokens:
            trained = number(cost.get("tokens"))
            cells.append(Cell(whole(trained)))
        rows.append(Row(tuple(cells), kind="main" if variant is view.main else ""))
    columns = ("Variant", *(part.capitalize() for part in PARTS), "In all", "vs dense")
    return Table("Whole cost", (*columns, *(("Trained tokens",) if tokens else ())), tuple(rows))


def _seconds(view: RunView, name: str) -> dict[str, float | None]:
    recorded = mapping(view.run, "variants", name, "cost", "seconds")
    return {str(part): number(value) for part, value in recorded.items()}
