"""study.json as typed views. A missing part reads as empty: an unfinished study still has a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gradpruner.reports.formats import number, text
from gradpruner.reports.reading import LayerAction, Measured, Plan, count, mapping, read_plan, sequence

_PENDING = ("not run yet", "not finished")
"""Errors of rows that did not fail: an unfinished study can be looked at."""
_ACCURACIES = ("exact_match", "choice_accuracy", "choice_accuracy_normalised", "final_number")


@dataclass(frozen=True)
class Quality:
    """One metric of one row, over its seeds.

    Attributes:
        mean: Mean after fine-tuning, 0-1; `low` and `high` are the lowest and the highest seed.
        per_seed: The value of every seed.
        before: Mean before fine-tuning, or None.
        paired: Difference to the dense model on the same examples, with its 95 % interval, or None.
        rival: The same difference to GradPruner, or None.
    """

    mean: Measured
    per_seed: tuple[float, ...]
    before: float | None
    paired: Measured | None
    rival: Measured | None


@dataclass(frozen=True)
class StudyRow:
    """One method at one point of a study.

    `uniform` False means that layers differ in width, so that only gradpruner loads the result. `pending`
    rows have not been run yet. `missing_seeds` are those that failed where others did not.
    """

    name: str
    label: str
    description: str
    error: str | None
    pending: bool
    num_parameters: int | None
    removed_parameters: int | None
    removed_share: float | None
    num_layers: int | None
    uniform: bool | None
    quality: dict[str, Quality]
    costs: dict[str, Any]
    plans: tuple[Plan, ...]
    num_seeds: int
    missing_seeds: tuple[int, ...]

    @property
    def is_dense(self) -> bool:
        """Whether this is the model as it was."""
        return self.name == "dense"

    @property
    def is_smaller(self) -> bool:
        """Whether this is another, smaller model, which removes nothing."""
        return self.name.startswith("smaller:")


@dataclass(frozen=True)
class StudyPoint:
    """One setting of a sweep; a comparison has one point, without a value."""

    value: Any
    label: str
    rows: tuple[StudyRow, ...]

    def row(self, name: str) -> StudyRow | None:
        """Returns the row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class StudyView:
    """Everything the page shows, found in study.json once.

    Attributes:
        study: The record itself.
        kind: 'compare', or 'ablation' where there are settings to compare.
        points: In recorded order.
        metric: The main metric; `metrics` are all, main first.
        seeds: As asked for.
        sweep_label: What is varied, in words; '' for a comparison.
        log: Whether the sweep's axis is logarithmic.
        majority: Accuracy of the most frequent answer; None where the main metric is no accuracy.
    """

    study: dict[str, Any]
    kind: str
    points: tuple[StudyPoint, ...]
    metric: str
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep_label: str
    log: bool
    majority: float | None

    @property
    def rows(self) -> tuple[StudyRow, ...]:
        """Every row of every point."""
        return tuple(row for point in self.points for row in point.rows)

    @property
    def names(self) -> dict[str, str]:
        """Row name -> label, in the order of first appearance."""
        found: dict[str, str] = {}
        for row in self.rows:
            found.setdefault(row.name, row.label)
        return found

    @property
    def main_name(self) -> str | None:
        """GradPruner's row, or the first one that is not the dense model."""
        others = [name for name in self.names if name != "dense"]
        return next((n for n in ("merged", "gradpruner", *others) if n in others), None)

    @property
    def num_examples(self) -> int | None:
        """Fewest evaluated examples behind a row; None when that was not recorded."""
        found = [
            measured.n
            for row in self.rows
            for q in row.quality.values()
            for measured in (q.mean, q.paired, q.rival)
            if measured is not None and measured.n is not None
        ]
        return min(found, default=None)


def read_study(study: dict[str, Any]) -> StudyView:
    """Finds points, rows and metrics of one study."""
    sweep = mapping(study, "sweep")
    label = text(sweep.get("label") or sweep.get("key") or "setting", 60)
    points = tuple(_read_point(mapping(point), label) for point in sequence(study, "points"))
    measured = dict.fromkeys(name for p in points for row in p.rows for name in row.quality)
    named = [str(name) for name in sequence(study, "metrics") if str(name) in measured]
    metrics = tuple(dict.fromkeys((*named, *measured)))
    # An ablation without settings (layers or hidden size, Fig. 9) compares methods.
    kind = "ablation" if sweep or len(points) > 1 else "compare"
    seeds = (count(seed) for seed in sequence(study, "seeds"))
    majority = number(mapping(study, "reference").get("majority_class"))
    return StudyView(
        study=study,
        kind=kind,
        points=points,
        metric=metrics[0] if metrics else "exact_match",
        metrics=metrics,
        seeds=tuple(seed for seed in seeds if seed is not None),
        sweep_label=label if kind == "ablation" else "",
        log=bool(sweep.get("log")),
        majority=majority if not metrics or metrics[0] in _ACCURACIES else None,
    )


def _read_point(point: dict[str, Any], sweep_label: str) -> StudyPoint:
    value, label = point.get("value"), text(point.get("label") or "", 60)
    if number(value) is not None:
        # The axis and the column say what is varied.
        label = f"{value:g}"
    elif sweep_label and label.startswith(f"{sweep_label} "):
        label = label[len(sweep_label) + 1 :]
    rows = tuple(_read_row(mapping(row)) for row in sequence(point, "rows"))
    return StudyPoint(value, label or text(value), rows)


def _read_row(row: dict[str, Any]) -> StudyRow:
    name, error = str(row.get("name")), row.get("error")
    qualities = {str(key): _read_quality(mapping(row, "metrics", key)) for key in mapping(row, "metrics")}
    per_seed = [mapping(entry) for entry in sequence(row, "per_seed")]
    broken = [entry for entry in per_seed if entry.get("error")]
    failed = [count(entry.get("seed")) for entry in broken if entry.get("error") not in _PENDING]
    uniform = row.get("uniform")
    return StudyRow(
        name=name,
        label=text(row.get("label") or name, 80),
        description=text(row.get("description") or ""),
        error=None if not error or error in _PENDING else str(error),
        pending=error in _PENDING,
        num_parameters=count(row.get("num_parameters")),
        removed_parameters=count(row.get("removed_parameters")),
        removed_share=number(row.get("removed_share")),
        num_layers=count(row.get("num_layers")),
        uniform=uniform if isinstance(uniform, bool) else None,
        quality={key: quality for key, quality in qualities.items() if quality is not None},
        costs=mapping(row, "costs"),
        plans=tuple(p for p in (_plan(name, entry) for entry in sequence(row, "plans")) if p.actions),
        num_seeds=len(per_seed) - len(broken),
        missing_seeds=() if error else tuple(seed for seed in failed if seed is not None),
    )


def _read_quality(entry: dict[str, Any]) -> Quality | None:
    mean = _measured(entry)
    before = number(entry.get("before"))
    if mean is None:
        return None
    per_seed = (number(value) for value in sequence(entry, "per_seed"))
    return Quality(
        mean=mean,
        per_seed=tuple(value for value in per_seed if value is not None),
        before=before,
        paired=_measured(mapping(entry, "paired")),
        rival=_measured(mapping(entry, "paired_gradpruner")),
    )


def _measured(entry: dict[str, Any]) -> Measured | None:
    value = number(entry.get("mean"))
    if value is None:
        value = number(entry.get("value"))
    if value is None:
        return None
    return Measured(value, number(entry.get("low")), number(entry.get("high")), count(entry.get("n")))


def _plan(name: str, entry: Any) -> Plan:
    """A seed's plan; one of widths has no actions and shows as nothing."""
    return read_plan(name, mapping(entry)) if mapping(entry) else Plan(name, (), None, {})


def kept_layers(plan: Plan) -> frozenset[int]:
    """The layers a plan keeps."""
    return frozenset(action.layer for action in plan.actions if _is_kept(action))


def _is_kept(action: LayerAction) -> bool:
    return action.action not in ("drop", "merge")
