"""A study's tables as plain data: HTML, terminal and markdown show the same numbers."""

from __future__ import annotations

from typing import Any

from gradpruner.reports.cells import Cell, Row, Table, exact_of
from gradpruner.reports.formats import (
    MISSING,
    duration,
    interval,
    num_bytes,
    percent,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.reports.reading import Measured, metric_label
from gradpruner.reports.study_reading import Quality, StudyPoint, StudyRow, StudyView


def study_table(view: StudyView) -> Table:
    """Returns the main table: one line per method, or per setting and method."""
    return sweep_table(view) if view.kind == "ablation" else comparison_table(view)


def comparison_table(view: StudyView) -> Table:
    """Returns every method's size, quality and cost."""
    point = view.points[0] if view.points else StudyPoint(None, "", ())
    rival = any(q.rival is not None for q in _qualities(view))
    columns = ("Method", "Parameters", *_quality_columns(view, rival), *_cost_columns(view))
    rows = [_row(view, row, [Cell(row.label), _size_cell(row)], rival) for row in point.rows]
    return Table(f"{metric_label(view.metric)} and cost of every method", columns, tuple(rows))


def sweep_table(view: StudyView) -> Table:
    """Returns one line per setting and method; a dense model all settings share stands once."""
    several = len(view.names) > 1
    shared = _shared_dense(view)
    rival = False
    names = (view.sweep_label.capitalize(), *(("Method",) if several else ()))
    columns = (*names, "Layers", "Parameters", *_quality_columns(view, rival), *_cost_columns(view))
    rows = []
    for i, point in enumerate(view.points):
        for row in point.rows:
            if row.is_dense and shared and i:
                continue
            setting = "any" if row.is_dense and shared else point.label
            head = [Cell(setting), *([Cell(row.label)] if several else [])]
            head += [Cell(whole(row.num_layers)), _size_cell(row)]
            rows.append(_row(view, row, head, rival))
    return Table(f"{metric_label(view.metric)} at every setting", columns, tuple(rows), words=("Method",))


def further_metrics_table(view: StudyView) -> Table:
    """Returns every further metric, mean and range over seeds; no rows when there is only one metric."""
    metrics = view.metrics[1:]
    columns = ("Method", *(metric_label(name) for name in metrics))
    rows = []
    for point in view.points:
        for row in point.rows:
            if not metrics or row.error is not None or not row.quality:
                continue
            label = row.label if view.kind == "compare" else f"{point.label}: {row.label}"
            cells = [Cell(label), *(_mean_cell(view, row.quality.get(name)) for name in metrics)]
            rows.append(Row(tuple(cells), kind=_kind(view, row)))
    return Table("Further metrics", columns, tuple(rows))


def short_table(view: StudyView) -> Table:
    """Returns the table of the terminal: what fits on 100 columns."""
    full = study_table(view)
    sweep = view.kind == "ablation"
    costs = ("Training",) if sweep else ("Method time", "Training")
    wanted = ("Parameters", *_quality_columns(view, False)[:2], *costs)
    at = [full.columns.index(name) for name in wanted if name in full.columns]
    rows = []
    for row in full.rows:
        # Setting and method share a column: only the first may wrap.
        lead = row.cells[: 2 if sweep and len(view.names) > 1 else 1]
        name = Cell(": ".join(cell.text for cell in lead))
        rows.append(Row((name, *(row.cells[i] for i in at)), row.kind, row.error))
    names = (full.columns[i].replace("Difference to", "vs") for i in at)
    return Table(full.caption, (full.columns[0], *names), tuple(rows))


def _row(view: StudyView, row: StudyRow, head: list[Cell], rival: bool) -> Row:
    quality = row.quality.get(view.metric)
    cells = [
        *head,
        _mean_cell(view, quality),
        _difference_cell(quality.paired if quality is not None and not row.is_dense else None),
    ]
    if rival:
        is_main = row.name == view.main_name
        cells.append(_difference_cell(quality.rival if quality is not None and not is_main else None))
    if _any_before(view):
        before = quality.before if quality is not None else None
        cells.append(Cell(percent(before), exact=exact_of(before)))
    cells += [_cost_cell(row.costs.get(key), show) for key, (_, show) in _costs(view).items()]
    return Row(tuple(cells), kind=_kind(view, row), error=text(row.error, 500) if row.error else "")


def _quality_columns(view: StudyView, rival: bool) -> tuple[str, ...]:
    return (
        f"{metric_label(view.metric)} [seeds]",
        "Difference to dense [95%]",
        *(("Difference to GradPruner [95%]",) if rival else ()),
        *(("Before tuning",) if _any_before(view) else ()),
    )


_COSTS: dict[str, tuple[str, Any]] = {
    "method_seconds": ("Method time", duration),
    "method_peak_memory_bytes": ("Method memory", num_bytes),
    "training_ratio": ("Training", times),
    "inference_ratio": ("Inference", times),
    "total_ratio": ("In all", times),
    "trained_tokens": ("Trained tokens", short),
}


def _costs(view: StudyView) -> dict[str, tuple[str, Any]]:
    """Returns the cost columns of which anything is known; a sweep has no room for memory."""
    known = {k: v for k, v in _COSTS.items() if any(row.costs.get(k) is not None for row in view.rows)}
    if view.kind == "ablation":
        known.pop("method_peak_memory_bytes", None)
    return known


def _cost_columns(view: StudyView) -> tuple[str, ...]:
    return tuple(name for name, _ in _costs(view).values())


def _kind(view: StudyView, row: StudyRow) -> str:
    if row.error is not None:
        return "failed"
    return "main" if view.kind == "compare" and row.name == view.main_name else ""


def _size_cell(row: StudyRow) -> Cell:
    share = row.removed_share
    detail = "" if share is None or row.is_dense else signed_percent(-share)
    return Cell(short(row.num_parameters), detail, exact_of(row.num_parameters))


def _mean_cell(view: StudyView, quality: Quality | None) -> Cell:
    if quality is None:
        return Cell(MISSING)
    mean, seeds = quality.mean, len(quality.per_seed)
    shown = interval(mean.low, mean.high)
    if seeds == 1:
        shown = f"1 of {len(view.seeds)} seeds" if len(view.seeds) > 1 else ""
    return Cell(percent(mean.value), shown, exact_of(mean.value))


def _difference_cell(paired: Measured | None) -> Cell:
    if paired is None:
        return Cell(MISSING)
    shown = signed_percent(paired.value)[:-1]
    return Cell(shown, interval(paired.low, paired.high), exact_of(paired.value))


def _cost_cell(value: Any, show: Any) -> Cell:
    return Cell(show(value), exact=exact_of(value))


def _qualities(view: StudyView) -> list[Quality]:
    return [row.quality[view.metric] for row in view.rows if view.metric in row.quality]


def _any_before(view: StudyView) -> bool:
    return any(quality.before is not None for quality in _qualities(view))


def _shared_dense(view: StudyView) -> bool:
    """Whether every setting has one and the same dense model; its difference to GradPruner may change."""
    rows = [point.row("dense") for point in view.points]
    found = [
        (row.costs, {name: (q.per_seed, q.before) for name, q in row.quality.items()})
        for row in rows
        if row is not None and row.quality
    ]
    return len(found) == len(rows) > 1 and all(entry == found[0] for entry in found)
