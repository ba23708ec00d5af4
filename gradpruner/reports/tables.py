"""The results tables of runs and studies: quality, size and cost of every row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradpruner.common.printing import duration, num_bytes, short, signed_percent, text, times, whole
from gradpruner.reports.cells import Cell, Line, Table, difference_cell, exact_cell, line, measured_cell
from gradpruner.reports.fields import Measured
from gradpruner.reports.record import Evaluated
from gradpruner.reports.view import LONGEST_ERROR, Row, View, metric_label

_AGAINST = " time against dense"
COSTS: dict[str, tuple[str, Any]] = {
    "method_seconds": ("Method time", duration),
    "method_peak_memory_bytes": ("Method memory", num_bytes),
    "training_seconds": ("Training time", duration),
    "training_ratio": (f"Training{_AGAINST}", times),
    "training_peak_memory_bytes": ("Training memory", num_bytes),
    "inference_seconds": ("Evaluation time", duration),
    "inference_ratio": (f"Evaluation{_AGAINST}", times),
    "total_ratio": (f"Total{_AGAINST}", times),
    "trained_tokens": ("Trained tokens", short),
}
"""Key of a cost -> its name, and how it is shown."""
_COLUMNS = (
    "method_seconds", "method_peak_memory_bytes", "training_ratio", "inference_ratio", "total_ratio",
    "trained_tokens",
)  # fmt: skip
_TERMINAL_COSTS = {
    "run": ("Training", "Total"),
    "compare": ("Method time", "Training"),
    "ablation": ("Training",),
}


def results_table(view: View, ship: Row | None = None) -> Table:
    """Returns one line per row and setting: label, size, main metric, differences and cost.

    The row `ship` is marked as the one to ship.

    A dense model shared by all settings is listed once.
    """
    sweep, costs = view.kind == "ablation", _costs(view)
    several, shared = len(view.names) > 1, _shared_dense(view)
    names = (view.sweep_label.capitalize(), *(("Method",) if several else ())) if sweep else (_name(view),)
    layers = view.kind != "compare"
    columns = (
        *names,
        *(("Layers",) if layers else ()),
        "Parameters",
        *_quality_columns(view),
        *(name for name, _ in costs.values()),
    )
    lines = []
    for i, point in enumerate(view.points):
        for row in point.rows:
            if row.is_dense and shared and i:
                continue
            setting = ["any" if row.is_dense and shared else point.label] if sweep else []
            label = [Cell(row.label, "to ship" if row is ship else "")]
            size = "" if row.removed_share is None or row.is_dense else signed_percent(-row.removed_share)
            cells = [
                *setting,
                *(label if several or not sweep else []),
                *([whole(row.num_layers)] if layers else []),
                exact_cell(short, row.num_parameters, size),
                *_quality_cells(view, row),
                *(exact_cell(show, row.costs.get(key)) for key, (_, show) in costs.items()),
            ]
            lines.append(_line(view, row, *cells))
    caption = f"{metric_label(view.metric)} and cost of every {'setting' if sweep else 'row'}"
    return Table(caption, columns, lines, words=("Method",))


def further_table(view: View) -> Table:
    """Returns all metrics but the main one; the table has no lines if there are no others."""
    metrics = view.metrics[1:]
    columns = (_name(view), *(metric_label(name) for name in metrics))
    lines = []
    for point in view.points:
        for row in point.rows:
            if metrics and row.error is None and (row.after or row.before):
                label = f"{point.label}: {row.label}" if view.kind == "ablation" else row.label
                lines.append(_line(view, row, label, *(_mean_cell(view, row, name) for name in metrics)))
    return Table("Further metrics", columns, lines)


def short_table(view: View, ship: Row | None = None) -> Table:
    """Returns the table for the terminal: the columns that fit in 100 characters."""
    full = results_table(view, ship)
    wanted = ("Parameters", *_quality_columns(view)[:2], *_TERMINAL_COSTS[view.kind])
    at = [full.columns.index(name) for name in wanted if name in full.columns]
    lead = full.columns.index("Parameters") - (view.kind != "compare")
    lines = []
    for one in full.lines:
        # Setting and method share the first column, because only that one may wrap.
        head = ": ".join(f"{'→ ' if c.detail else ''}{c.text}" for c in one.cells[:lead])
        lines.append(replace(one, cells=(Cell(head), *(one.cells[i] for i in at))))
    names = (full.columns[i].replace("Difference to", "vs") for i in at)
    return Table(full.caption, (full.columns[0], *names), lines)


def other_tasks_table(view: View) -> Table:
    """Returns the first metric of every row on every other task, and on the validation rows."""
    lines = []
    for task in dict.fromkeys(name for row in view.rows for name in row.recorded.also):
        for row in view.rows:
            if (found := headline_of(row, task)) is not None:
                metric, measured = found
                words = (text(task), row.label, metric_label(metric))
                paired = difference_cell(row.recorded.paired.get(task, {}).get(metric))
                lines.append(_line(view, row, *words, measured_cell(measured), paired, whole(measured.n)))
    columns = ("Data", "Variant", "Metric", "Value [95%]", "Difference to dense [95%]", "n")
    return Table("Validation rows and other tasks", columns, lines, words=("Variant", "Metric"))


def headline_of(row: Row, task: str) -> tuple[str, Measured] | None:
    """Returns the first recorded metric of another task, which is the most informative one."""
    return next(iter(row.recorded.also.get(task, Evaluated()).metrics.items()), None)


def difference(view: View, row: Row) -> Measured | None:
    """Returns the difference to the dense model; paired by example, if that was measured."""
    if row.is_dense:
        return None
    mine, dense = (one.after.get(view.metric) if one else None for one in (row, view.dense))
    if view.metric in row.paired or view.kind != "run" or mine is None or dense is None:
        return row.paired.get(view.metric)
    return Measured(value=mine.value - dense.value)


def reading_words(view: View) -> str:
    """Explains the numbers of the main table."""
    words = []
    if view.kind == "run":
        words.append("Brackets are 95% bootstrap intervals, in percent.")
    elif len(view.seeds) > 1:
        words.append(
            f"{metric_label(view.metric)} is the mean over {len(view.seeds)} seeds; brackets show the lowest "
            "and the highest seed."
        )
    if any(row.paired for row in view.rows):
        words.append(
            "Differences are in percentage points, paired example by example, with 95% bootstrap intervals."
        )
    if any(row.costs.get("training_ratio") is not None for row in view.rows):
        columns = "Training" if view.kind == "run" else "Training, Evaluation"
        words.append(f"{columns} and Total are times relative to the dense model with the same seed.")
    if any(m.is_small for row in view.rows for m in (*row.after.values(), *row.before.values())):
        words.append("* Fewer than 100 examples: rely on the interval, not on the value.")
    return " ".join(words)


def _name(view: View) -> str:
    return "Variant" if view.kind == "run" else "Method"


def _quality_columns(view: View) -> tuple[str, ...]:
    return (
        f"{metric_label(view.metric)} [{'95%' if view.kind == 'run' else 'seeds'}]",
        "Difference to dense [95%]",
        *(("Difference to GradPruner [95%]",) if _has_rivals(view) else ()),
        *(("Before tuning",) if _any_before(view) else ()),
        *(("n",) if view.kind == "run" else ()),
    )


def _quality_cells(view: View, row: Row) -> list[Cell | str]:
    metric = view.metric
    after, before = row.after.get(metric), row.before.get(metric)
    cells: list[Cell | str] = [_mean_cell(view, row, metric), difference_cell(difference(view, row))]
    if _has_rivals(view):
        cells.append(difference_cell(None if row.name == view.main_name else row.rival.get(metric)))
    if _any_before(view):
        cells.append(measured_cell(before))
    if view.kind == "run":
        measured = after or before
        cells.append(whole(measured.n if measured else None))
    return cells


def _costs(view: View) -> dict[str, tuple[str, Any]]:
    """Returns the cost columns that have a value; `reading_words` says that ratios are against dense."""
    left_out = "method_peak_memory_bytes" if view.kind == "ablation" else ""
    known = [k for k in _COLUMNS if k != left_out and any(row.costs.get(k) is not None for row in view.rows)]
    return {key: (COSTS[key][0].removesuffix(_AGAINST), COSTS[key][1]) for key in known}


def _line(view: View, row: Row, *cells: Cell | str) -> Line:
    error = text(row.error, LONGEST_ERROR) if row.error else ""
    kind = "failed" if error else "main" if row is view.main and stands_out(view) else ""
    return line(*cells, kind=kind, error=error)


def stands_out(view: View) -> bool:
    """Returns whether the main row is shown in bold.

    It is, unless another pruned row scores higher or, in a run, it is clearly worse than the dense model.
    """
    main, metric = view.main, view.metric
    if main is None or metric not in main.after:
        return False
    paired = main.paired.get(metric)
    if view.kind == "run" and paired is not None and paired.high is not None and paired.high < 0:
        return False
    rivals = (row for row in view.first.rows if row is not main and not row.is_dense and metric in row.after)
    return all(row.after[metric].value <= main.after[metric].value for row in rivals)


def _mean_cell(view: View, row: Row, metric: str) -> Cell:
    after = row.after.get(metric)
    cell = measured_cell(after)
    if after is not None and len(after.per_seed) == 1:
        return replace(cell, detail=f"1 of {len(view.seeds)} seeds" if len(view.seeds) > 1 else "")
    return cell


def _has_rivals(view: View) -> bool:
    return view.kind == "compare" and any(view.metric in row.rival for row in view.rows)


def _any_before(view: View) -> bool:
    return any(view.metric in row.before for row in view.rows)


def _shared_dense(view: View) -> bool:
    """Returns whether all settings have the same dense model; its difference to GradPruner may differ."""
    rows = [point.row("dense") for point in view.points]
    found = [
        (row.costs, row.before, {name: measured.per_seed for name, measured in row.after.items()})
        for row in rows
        if row is not None and row.after
    ]
    return len(found) == len(rows) > 1 and all(entry == found[0] for entry in found)
