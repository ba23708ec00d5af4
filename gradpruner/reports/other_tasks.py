"""Tasks the variants were measured on without being trained on them: transfer, reasoning probe, lm-eval."""

from __future__ import annotations

from typing import Any

from gradpruner.reports.cells import Cell, Row, Table
from gradpruner.reports.formats import interval, number, percent, ratio, signed_percent, text, whole
from gradpruner.reports.reading import FEW_EXAMPLES, Measured, RunView, mapping, metric_label, read_metrics

PROBE_TASKS = ("gsm8k",)
"""Tasks that take several steps of reasoning; a test keeps this in step with `Task.probe`."""
PROBE_LOSS = 0.1
"""Relative loss on a probe from which the report warns."""
_PROBE_FLOOR = 0.02
"""A dense model that solves no more than this has nothing to lose."""


def other_tasks_table(view: RunView) -> Table:
    """Returns the headline metric of every variant on every further task."""
    rows = []
    for name in _names(view):
        dense = _headline(view, "dense", name)
        for variant in view.variants:
            found = _headline(view, variant.name, name)
            if found is None:
                continue
            metric, measured = found
            paired = _paired(view, variant.name, name, metric)
            change = ratio(measured.value - dense[1].value, dense[1].value) if dense else None
            mark = "*" if measured.is_small else ""
            cells = (
                Cell(text(name)),
                Cell(variant.label),
                Cell(metric_label(metric)),
                Cell(percent(measured.value), interval(measured.low, measured.high)),
                Cell("-" if variant.is_dense else signed_percent(change)),
                Cell(paired),
                Cell(f"{whole(measured.n)}{mark}"),
            )
            rows.append(Row(cells, kind="main" if variant is view.main else ""))
    columns = (
        "Task",
        "Variant",
        "Metric",
        "Value [95%]",
        "Relative to dense",
        "Paired difference [95%]",
        "n",
    )
    return Table("Further tasks, not trained on", columns, tuple(rows), words=("Variant", "Metric"))


def harness_table(view: RunView) -> Table:
    """Returns what lm-evaluation-harness measured."""
    rows = []
    for variant in view.variants:
        found = mapping(view.run, "variants", variant.name, "lm_eval")
        for task in mapping(found, "tasks"):
            entry = mapping(found, "tasks", task)
            for metric in mapping(entry, "metrics"):
                scored = mapping(entry, "metrics", metric)
                spread = number(scored.get("stderr"))
                value = number(scored.get("value"))
                # Most of its metrics are fractions; perplexities and the like are not.
                fraction = value is not None and 0 <= value <= 1
                shown = percent(value) if fraction else f"{value:.4g}" if value is not None else "-"
                error = f"± {100 * spread:.1f}" if spread is not None and fraction else ""
                few = (number(entry.get("n")) or FEW_EXAMPLES) < FEW_EXAMPLES
                cells = (
                    Cell(text(task)),
                    Cell(variant.label),
                    Cell(text(metric)),
                    Cell(shown, error),
                    Cell(f"{whole(entry.get('n'))}{'*' if few else ''}"),
                )
                rows.append(Row(cells, kind="main" if variant is view.main else ""))
    rows.sort(key=lambda row: (row.cells[0].text, row.cells[2].text))
    columns = ("Task", "Variant", "Metric", "Value ± standard error", "n")
    return Table("lm-evaluation-harness", columns, tuple(rows), words=("Variant", "Metric"))


def probe_notes(view: RunView) -> tuple[str, ...]:
    """Returns warnings about reasoning that was lost, or could not be probed."""
    notes = []
    for name in _names(view):
        if name not in PROBE_TASKS or view.main is None:
            continue
        dense, main = _headline(view, "dense", name), _headline(view, view.main.name, name)
        if dense is None or main is None:
            continue
        before, after = dense[1].value, main[1].value
        if before <= _PROBE_FLOOR:
            notes.append(
                f"The reasoning probe ({name}) says nothing here: the dense model itself solves only "
                f"{percent(before)}."
            )
        elif (before - after) / before > PROBE_LOSS:
            notes.append(
                f"Reasoning in several steps suffered: {name} falls from {percent(before)} to "
                f"{percent(after)}. Depth pruning keeps classification and short answers well and loses "
                "such reasoning far more, and fine-tuning does not bring it all back."
            )
    return tuple(notes)


def _names(view: RunView) -> list[str]:
    found = (mapping(row, "also") for row in mapping(view.run, "variants").values())
    return list(dict.fromkeys(name for also in found for name in also))


def _headline(view: RunView, variant: str, task: str) -> tuple[str, Measured] | None:
    """The first metric recorded, which is the most telling one."""
    found = read_metrics(mapping(view.run, "variants", variant, "also", task, "metrics"))
    return next(iter(found.items()), None)


def _paired(view: RunView, variant: str, task: str, metric: str) -> str:
    entry: dict[str, Any] = mapping(view.run, "variants", variant, "paired", task, metric)
    return paired_cell(entry)


def paired_cell(entry: dict[str, Any]) -> str:
    """Formats a paired difference in points: '−1.2 [−2.9, 0.4]'."""
    value = number(entry.get("value"))
    if value is None:
        return "-"
    return f"{signed_percent(value)[:-1]} {interval(entry.get('low'), entry.get('high'))}".strip()
