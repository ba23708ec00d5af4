"""run.json or study.json -> `View`: found once, as every report shows it."""

from __future__ import annotations

from typing import Any

from gradpruner.printing import number, ratio, text
from gradpruner.reports.record import (
    Evaluated,
    Measured,
    PlanRecord,
    PointRecord,
    Record,
    StudyRow,
    VariantRecord,
    count,
)
from gradpruner.reports.view import Plan, Point, Quality, Row, View

PENDING = ("not run yet", "not finished")
"""Errors of rows that did not fail: an unfinished study can be looked at."""
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
    plans = {name: read_plan(name, plan) for name, plan in record.plans.items()}
    label = text((record.sweep.label or record.sweep.key if record.sweep else None) or "setting", 60)
    if is_study:
        # An ablation without settings (layers or hidden size, Fig. 9) compares methods.
        kind = "ablation" if record.sweep or len(record.points) > 1 else "compare"
        points = tuple(_read_point(point, label) for point in record.points)
    else:
        kind, points = "run", (Point(None, "", _run_rows(record, plans)),)
    measured = dict.fromkeys(name for point in points for row in point.rows for name in row.quality)
    named = [str(name) for name in record.metrics if str(name) in measured]
    metrics = tuple(dict.fromkeys((*named, *measured)))
    seeds = (count(seed) for seed in record.seeds)
    return View(
        record=record,
        kind=kind,
        points=points,
        metric=metrics[0] if metrics else "exact_match",
        metrics=metrics,
        plans=plans,
        seeds=tuple(seed for seed in seeds if seed is not None),
        sweep_label=label if kind == "ablation" else "",
        majority=record.majority if not metrics or metrics[0] in _ACCURACIES else None,
    )


def read_plan(name: str, recorded: PlanRecord) -> Plan:
    """Reads a pruning plan; entries without a layer are left out."""
    known = [action for action in recorded.actions if action.layer is not None]
    return Plan(name, tuple(sorted(known, key=lambda action: action.layer or 0)), recorded)


def _run_rows(record: Record, plans: dict[str, Plan]) -> tuple[Row, ...]:
    dense = record.variants.get("dense", VariantRecord())
    whole = dense.num_parameters or record.model.num_parameters
    rows = []
    for name, found in record.variants.items():
        kept = ratio(found.num_parameters, whole)
        plan = plans.get(str(found.plan))
        paired = found.paired.get("task", {})
        after, before = known(found.evaluation), known(found.before)
        rows.append(
            Row(
                name=name,
                label=text(found.label or name, 80),
                error=str(found.error) if found.error else None,
                num_layers=found.num_layers,
                num_parameters=found.num_parameters,
                removed_share=None if kept is None else 1 - kept,
                quality={
                    metric: Quality(after.get(metric), before.get(metric), paired.get(metric))
                    for metric in (*after, *before)
                },
                validation=known(found.also.get("validation", Evaluated())),
                costs=_run_costs(found, dense),
                plans=(plan,) if plan else (),
                recorded=found,
            )
        )
    return tuple(rows)


def known(evaluated: Evaluated) -> dict[str, Measured]:
    """The metrics that have a value, in the order they were recorded: the most telling first."""
    return {name: found for name, found in evaluated.metrics.items() if found.value is not None}


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


def _study_row(row: StudyRow) -> Row:
    error = str(row.error) if row.error else ""
    broken = [entry for entry in row.per_seed if entry.error]
    failed = [entry.seed for entry in broken if entry.error not in PENDING]
    plans = (read_plan(str(row.name), entry) for entry in row.plans)
    return Row(
        name=str(row.name),
        label=text(row.label or row.name, 80),
        description=text(row.description or ""),
        error=None if not error or error in PENDING else error,
        pending=error in PENDING,
        num_parameters=row.num_parameters,
        removed_share=row.removed_share,
        num_layers=row.num_layers,
        uniform=row.uniform if isinstance(row.uniform, bool) else None,
        quality={key: _quality(found) for key, found in row.metrics.items() if found.value is not None},
        validation={key: found for key, found in row.validation.items() if found.value is not None},
        costs=row.costs,
        plans=tuple(plan for plan in plans if plan.actions),
        seeds=tuple(row.per_seed),
        missing_seeds=() if error else tuple(seed for seed in failed if seed is not None),
    )


def _quality(entry: Measured) -> Quality:
    paired, rival = (Measured.model_validate(e) for e in (entry.paired, entry.paired_gradpruner))
    seeds = (number(value) for value in entry.per_seed)
    return Quality(
        after=entry,
        before=None if entry.before is None else Measured(value=entry.before),
        paired=paired if paired.value is not None else None,
        rival=rival if rival.value is not None else None,
        per_seed=tuple(value for value in seeds if value is not None),
    )
