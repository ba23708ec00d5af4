"""The tables of results: quality, size and cost of every row, of a run as of a study."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gradpruner.printing import MISSING, short, signed_percent, text, times, whole
from gradpruner.reports.cells import (
    Cell,
    Line,
    Table,
    bytes_cell,
    difference_cell,
    exact_of,
    markdown_of,
    measured_cell,
    short_cell,
    time_cell,
)
from gradpruner.reports.reading import known
from gradpruner.reports.record import Measured
from gradpruner.reports.view import Quality, Row, View, metric_label


def _times_cell(value: Any) -> Cell:
    return Cell(times(value), exact=exact_of(value))


_COSTS: dict[str, tuple[str, Any]] = {
    "method_seconds": ("Method time", time_cell),
    "method_peak_memory_bytes": ("Method memory", bytes_cell),
    "training_ratio": ("Training", _times_cell),
    "inference_ratio": ("Inference", _times_cell),
    "total_ratio": ("In all", _times_cell),
    "trained_tokens": ("Trained tokens", short_cell),
}
_TERMINAL_COSTS = {
    "run": ("Training", "In all"),
    "compare": ("Method time", "Training"),
    "ablation": ("Training",),
}


def results_table(view: View) -> Table:
    """One line per row: what it is, size, main metric, differences, cost; per setting where there are some.

    A dense model that all settings share stands once.
    """
    sweep, rival = view.kind == "ablation", _has_rivals(view)
    several, shared = len(view.names) > 1, _shared_dense(view)
    names = (view.sweep_label.capitalize(), *(("Method",) if several else ())) if sweep else (_name(view),)
    layers = view.kind != "compare"
    columns = (
        *names,
        *(("Layers",) if layers else ()),
        "Parameters",
        *_quality_columns(view),
        *(name for name, _ in _costs(view).values()),
    )
    lines = []
    for i, point in enumerate(view.points):
        for row in point.rows:
            if row.is_dense and shared and i:
                continue
            label = Cell(row.label, "to ship" if row is view.choice[0] else "")
            head = [label]
            if sweep:
                head = [
                    Cell("any" if row.is_dense and shared else point.label),
                    *([label] if several else []),
                ]
            head += [Cell(whole(row.num_layers))] if layers else []
            cells = [*head, _size_cell(row), *_quality_cells(view, row, rival)]
            cells += [show(row.costs.get(key)) for key, (_, show) in _costs(view).items()]
            lines.append(_line(view, row, cells))
    caption = f"{metric_label(view.metric)} and cost of every {'setting' if sweep else 'row'}"
    return Table(caption, columns, tuple(lines), words=("Method",))


def further_table(view: View) -> Table:
    """Every further metric; no lines when there is only one metric."""
    metrics = view.metrics[1:]
    columns = (_name(view), *(metric_label(name) for name in metrics))
    lines = []
    for point in view.points:
        for row in point.rows:
            if not metrics or row.error is not None or not row.quality:
                continue
            label = f"{point.label}: {row.label}" if view.kind == "ablation" else row.label
            cells = [Cell(label), *(_mean_cell(view, row.quality.get(name)) for name in metrics)]
            lines.append(_line(view, row, cells))
    return Table("Further metrics", columns, tuple(lines))


def short_table(view: View) -> Table:
    """The table of the terminal: what fits on 100 columns."""
    full = results_table(view)
    wanted = ("Parameters", *_quality_columns(view)[:2], *_TERMINAL_COSTS[view.kind])
    at = [full.columns.index(name) for name in wanted if name in full.columns]
    lead = full.columns.index("Parameters") - (view.kind != "compare")
    lines = []
    for line in full.lines:
        # Setting and method share a column: only the first may wrap.
        head = ": ".join(f"{'→ ' if c.detail else ''}{c.text}" for c in line.cells[:lead])
        lines.append(replace(line, cells=(Cell(head), *(line.cells[i] for i in at))))
    names = (full.columns[i].replace("Difference to", "vs") for i in at)
    return Table(full.caption, (full.columns[0], *names), tuple(lines))


def markdown_results(view: View) -> str:
    """The results as a markdown table: of a run what the terminal shows, of a study all of it."""
    return markdown_of(short_table(view) if view.kind == "run" else results_table(view))


def other_tasks_table(view: View) -> Table:
    """The headline metric of every row on every further task; validation rows are among them."""
    names = dict.fromkeys(name for row in view.rows for name in row.recorded.also)
    lines = []
    for name in names:
        for row in view.rows:
            found = headline_of(row, name)
            if found is not None:
                metric, measured = found
                cells = [Cell(text(name)), Cell(row.label), Cell(metric_label(metric))]
                paired = row.recorded.paired.get(name, {}).get(metric)
                cells += [measured_cell(measured), difference_cell(paired), Cell(whole(measured.n))]
                lines.append(_line(view, row, cells))
    columns = ("Rows of", "Variant", "Metric", "Value [95%]", "Difference to dense [95%]", "n")
    return Table("Further rows, not trained on", columns, tuple(lines), words=("Variant", "Metric"))


def headline_of(row: Row, task: str) -> tuple[str, Measured] | None:
    """The first metric recorded of a further task, which is the most telling one."""
    evaluated = row.recorded.also.get(task)
    return next(iter(known(evaluated).items()), None) if evaluated else None


def difference(view: View, row: Row) -> Measured | None:
    """The difference to the dense model: on the same examples where that was measured."""
    paired = row.paired(view.metric)
    mine = row.after(view.metric)
    dense = view.dense.after(view.metric) if view.dense else None
    if row.is_dense or paired is not None or view.kind != "run" or mine is None or dense is None:
        return None if row.is_dense else paired
    return Measured(value=mine.value - dense.value)


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


def _quality_cells(view: View, row: Row, rival: bool) -> list[Cell]:
    quality = row.quality.get(view.metric)
    cells = [_mean_cell(view, quality), difference_cell(difference(view, row))]
    if rival:
        is_main = row.name == view.main_name
        cells.append(difference_cell(quality.rival if quality is not None and not is_main else None))
    if _any_before(view):
        cells.append(measured_cell(quality.before if quality is not None else None))
    if view.kind == "run":
        measured = (quality.after or quality.before) if quality is not None else None
        cells.append(Cell(whole(measured.n if measured else None)))
    return cells


def _costs(view: View) -> dict[str, tuple[str, Any]]:
    """The cost columns of which anything is known; details have a table of their own in a run."""
    known = {k: v for k, v in _COSTS.items() if any(row.costs.get(k) is not None for row in view.rows)}
    left_out = {
        "run": ("method_seconds", "inference_ratio", "trained_tokens"),
        "ablation": ("method_peak_memory_bytes",),
    }
    return {k: v for k, v in known.items() if k not in left_out.get(view.kind, ())}


def _line(view: View, row: Row, cells: list[Cell]) -> Line:
    error = text(row.error, 500) if row.error else ""
    kind = "failed" if error else "main" if row is view.main and stands_out(view) else ""
    return Line(tuple(cells), kind, error)


def stands_out(view: View) -> bool:
    """Whether the headline's row is set in bold: not where another row, in a run the dense one, beats it."""
    main = view.main
    mine = main.after(view.metric) if main else None
    if main is None or mine is None or mine.value is None:
        return False
    paired = main.paired(view.metric)
    if view.kind == "run" and paired is not None and paired.high is not None and paired.high < 0:
        return False
    others = (row.after(view.metric) for row in view.first.rows if row is not main and not row.is_dense)
    return all(other is None or other.value <= mine.value for other in others)


def _size_cell(row: Row) -> Cell:
    share = row.removed_share
    detail = "" if share is None or row.is_dense else signed_percent(-share)
    return Cell(short(row.num_parameters), detail, exact_of(row.num_parameters))


def _mean_cell(view: View, quality: Quality | None) -> Cell:
    cell = measured_cell(quality.after if quality is not None else None)
    if quality is not None and len(quality.per_seed) == 1 and cell.text != MISSING:
        seeds = f"1 of {len(view.seeds)} seeds" if len(view.seeds) > 1 else ""
        return replace(cell, detail=seeds)
    return cell


def _qualities(view: View) -> list[Quality]:
    return [row.quality[view.metric] for row in view.rows if view.metric in row.quality]


def _has_rivals(view: View) -> bool:
    return view.kind == "compare" and any(q.rival is not None for q in _qualities(view))


def _any_before(view: View) -> bool:
    return any(quality.before is not None for quality in _qualities(view))


def _shared_dense(view: View) -> bool:
    """Whether every setting has one and the same dense model; its difference to GradPruner may change."""
    rows = [point.row("dense") for point in view.points]
    found = [
        (row.costs, {name: (q.per_seed, q.before) for name, q in row.quality.items()})
        for row in rows
        if row is not None and row.quality
    ]
    return len(found) == len(rows) > 1 and all(entry == found[0] for entry in found)
