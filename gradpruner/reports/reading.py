"""run.json or study.json -> `View`: found once, as every report shows it."""

from __future__ import annotations

from typing import Any

from gradpruner.printing import number, ratio, text
from gradpruner.reports.fields import Measured, count, known
from gradpruner.reports.record import Evaluated, PointRecord, Record, VariantRecord
from gradpruner.reports.view import Point, Row, View

_ACCURACIES = ("exact_match", "choice_accuracy", "choice_accuracy_normalised", "final_number")
_PREPARING = ("recording", "choosing", "repairing", "pruning")


def pairs(rows: list[Any], x: str, y: str) -> list[tuple[float, float]]:
    """Reads (x, y) from a list of dictionaries, leaving out what is not finite."""
    found = ((number(row.get(x)), number(row.get(y))) for row in rows if isinstance(row, dict))
    return [(a, b) for a, b in found if a is not None and b is not None]


def read(source: dict[str, Any]) -> View:
    """Reads run.json or study.json."""
    record = Record.model_validate(source)
    is_study = "points" in source or "kind" in source
    label = text((record.sweep.label or record.sweep.key if record.sweep else None) or "setting", 60)
    if is_study:
        # An ablation without settings (layers or hidden size, Fig. 9) compares methods.
        kind = "ablation" if record.sweep or len(record.points) > 1 else "compare"
        points = tuple(_read_point(point, label) for point in record.points)
    else:
        rows = (_run_row(name, found, record) for name, found in record.variants.items())
        kind, points = "run", (Point(None, "", tuple(rows)),)
    measured = dict.fromkeys(n for point in points for row in point.rows for n in (*row.after, *row.before))
    named = [str(name) for name in record.metrics if str(name) in measured]
    metrics = tuple(dict.fromkeys((*named, *measured)))
    seeds = (count(seed) for seed in record.seeds)
    return View(
        record=record,
        kind=kind,
        points=points,
        metric=metrics[0] if metrics else "exact_match",
        metrics=metrics,
        seeds=tuple(seed for seed in seeds if seed is not None),
        sweep_label=label if kind == "ablation" else "",
        majority=record.majority if not metrics or metrics[0] in _ACCURACIES else None,
    )


def _run_row(name: str, found: VariantRecord, record: Record) -> Row:
    dense = record.variants.get("dense", VariantRecord())
    kept = ratio(found.num_parameters, dense.num_parameters or record.model.num_parameters)
    plan = record.plans.get(str(found.plan))
    return Row(
        name=name,
        label=found.label or name,
        error=found.error,
        num_layers=found.num_layers,
        num_parameters=found.num_parameters,
        removed_share=None if kept is None else 1 - kept,
        after=found.evaluation.metrics,
        before=found.before.metrics,
        paired=found.paired.get("task", {}),
        validation=found.also.get("validation", Evaluated()).metrics,
        costs=_run_costs(found, dense),
        plans=[plan] if plan else [],
        recorded=found,
    )


def _run_costs(row: VariantRecord, dense: VariantRecord) -> dict[str, Any]:
    """What a row took, as a study has it."""
    parts = row.cost
    preparing = [parts[part] or 0.0 for part in _PREPARING if part in parts]
    return {
        "method_seconds": sum(preparing) if preparing else None,
        "training_ratio": ratio(row.finetune.seconds, dense.finetune.seconds),
        "inference_ratio": ratio(row.evaluation.seconds, dense.evaluation.seconds),
        "total_ratio": ratio(parts.get("total"), dense.cost.get("total")),
        "total_seconds": parts.get("total"),
        "trained_tokens": row.cost_tokens,
    }


def _read_point(point: PointRecord, sweep_label: str) -> Point:
    label = text(point.label or "", 60)
    if number(point.value) is not None:
        # The axis and the column say what is varied.
        label = f"{point.value:g}"
    elif sweep_label and label.startswith(f"{sweep_label} "):
        label = label[len(sweep_label) + 1 :]
    return Point(point.value, label or text(point.value), tuple(map(_study_row, point.rows)))


def _study_row(raw: Any) -> Row:
    """A row of study.json, in which differences stand beside the metrics they are of."""
    row = Row.model_validate(raw)
    row.label = row.label or text(row.name, 80)
    row.before = known({name: Measured(value=found.before) for name, found in row.after.items()})
    row.paired = known({name: found.paired for name, found in row.after.items()})
    row.rival = known({name: found.paired_gradpruner for name, found in row.after.items()})
    row.plans = [plan for plan in row.plans if plan.actions]
    return row
