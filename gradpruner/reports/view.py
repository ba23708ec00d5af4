"""run.json or study.json as all reports see it: points with rows, their metrics, and which row to ship.

A run has one point, and each row has one seed. A comparison has one point, and each row has several seeds. An
ablation has one point per setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field

from gradpruner.common.printing import number, ratio, text
from gradpruner.reports.fields import Count, Each, Fields, JsonPart, Measured, Metrics, Number, count, known
from gradpruner.reports.record import PENDING, Evaluated, PlanRecord, PointRecord, Record, Seed, VariantRecord

_ACCURACIES = ("exact_match", "choice_accuracy", "choice_accuracy_normalised", "final_number")
LONGEST_ERROR = 1000
"""Errors are shown up to this many characters, because the hint comes last."""
FAR_FROM_BUDGET = 0.03
"""A row whose removed fraction is further than this from the budget does not meet it."""
MOST_LOST = 0.5
"""A row that is clearly worse than dense is not worth shipping if it loses more than this share of what the
dense model gains over always giving the most frequent answer (where that is unknown: of its score)."""


def _failure(error: Any) -> str | None:
    return str(error) if error and error not in PENDING else None


class Row(JsonPart):
    """One model: the dense one, or the one a method leaves. The fields are those of a row in study.json.

    Attributes:
        after: Metrics of the finished model.
        before: Metrics before fine-tuning.
        paired: Differences to the dense model on the same examples, with 95 % intervals.
        rival: Differences to GradPruner on the same examples; only in studies.
        error: Why the row failed; None if it did not fail or has not run yet.
        uniform: False if layers differ in width, so that only gradpruner loads the model.
        plans: The plan of every seed; a run has one.
        recorded: The row's whole record in run.json; empty in studies.
    """

    name: Annotated[str, BeforeValidator(str)] = "None"
    label: Annotated[str, BeforeValidator(lambda value: text(value or "", 80))] = ""
    description: Annotated[str, BeforeValidator(lambda value: text(value or ""))] = ""
    error: Annotated[str | None, BeforeValidator(_failure)] = None
    num_layers: Count = None
    num_parameters: Count = None
    removed_share: Number = None
    uniform: Any = None
    after: Metrics = Field(default={}, validation_alias=AliasChoices("after", "metrics"))
    before: Metrics = {}
    paired: Metrics = {}
    rival: Metrics = {}
    validation: Metrics = {}
    costs: Fields = {}
    plans: Annotated[list[PlanRecord], Each] = []
    seeds: Annotated[list[Seed], Each] = Field(default=[], validation_alias="per_seed")
    recorded: VariantRecord = VariantRecord()

    @property
    def is_dense(self) -> bool:
        """Whether this is the unpruned model."""
        return self.name == "dense"

    @property
    def is_pruned(self) -> bool:
        """Whether parameters are gone; of `longer` and `sat` none are, and a smaller model is another one."""
        return not (self.is_dense or self.removed_share == 0 or self.name.startswith("smaller:"))

    @property
    def plan(self) -> PlanRecord | None:
        """The plan of the first seed."""
        return self.plans[0] if self.plans else None

    @property
    def first_run(self) -> str:
        """In a study, the folder of the first seed without an error; '' if there is none."""
        return next((text(seed.run) for seed in self.seeds if not seed.error), "")

    @property
    def missing_seeds(self) -> list[int]:
        """The failed seeds, if at least one other seed worked."""
        failed = [seed.seed for seed in self.seeds if seed.error and seed.error not in PENDING]
        return [seed for seed in failed if seed is not None] if self.after else []


@dataclass(frozen=True)
class Point:
    """One setting of a sweep; runs and comparisons have a single point without a value."""

    value: Any
    label: str
    rows: tuple[Row, ...]

    def row(self, name: str | None) -> Row | None:
        """Returns the row of that name, or None."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class View:
    """Everything a report shows.

    Attributes:
        kind: 'run', 'compare', or 'ablation' (a study with several settings).
        metric: The main metric; `metrics` lists all metrics, the main one first.
        seeds: The seeds of a study.
        sweep_label: What an ablation varies, in words; otherwise ''.
        majority: Accuracy of always giving the most frequent answer; None if the main metric is not an
            accuracy.
    """

    record: Record
    kind: str
    points: tuple[Point, ...]
    metric: str
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    sweep_label: str
    majority: float | None

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every row of every point."""
        return tuple(row for point in self.points for row in point.rows)

    @cached_property
    def first(self) -> Point:
        """The first point; the only one of runs and comparisons."""
        return self.points[0] if self.points else Point(None, "", ())

    @property
    def dense(self) -> Row | None:
        """The dense row."""
        return self.first.row("dense")

    @property
    def names(self) -> dict[str, str]:
        """Row name -> label, in the order of first appearance."""
        found: dict[str, str] = {}
        for row in self.rows:
            found.setdefault(row.name, row.label)
        return found

    @cached_property
    def choice(self) -> tuple[Row | None, str]:
        """The row to ship, and what the choice rests on (see `choose`)."""
        return choose(self) if self.kind != "ablation" else (None, "")

    @cached_property
    def main_name(self) -> str | None:
        """The name of the main row: in a run the one to ship, in a study GradPruner's, else the first."""
        if self.kind == "run":
            found = self.choice[0] or next(iter(in_order(self.rows)), None)
            return found.name if found else None
        pruned = [row.name for row in self.rows if row.is_pruned]
        others = pruned or [name for name in self.names if name != "dense"]
        return next((n for n in ("merged", "gradpruner", *others) if n in others), None)

    @property
    def main(self) -> Row | None:
        """The main row: the one the headline is about."""
        return self.first.row(self.main_name)

    def has_lost(self, row: Row) -> bool:
        """Returns whether a row is too bad to ship: clearly worse than dense, and by too much.

        That is by more than `MOST_LOST` of what is above `floor`, or so that it is no longer clearly above
        it, while the dense model is.
        """
        after, dense = (one.after.get(self.metric) if one else None for one in (row, self.dense))
        if row.is_dense or after is None or dense is None or dense.value <= 0:
            return False
        paired = row.paired.get(self.metric)
        if paired is not None and paired.ends:
            worse = (paired.high or 0) < 0
        else:
            worse = after.high is not None and dense.low is not None and after.high < dense.low
        known = self.floor is not None and self.floor < dense.value
        floor = self.floor if known and self.floor is not None else 0.0
        fallen = known and _least(after) <= floor < _least(dense)
        return worse and (fallen or dense.value - after.value > MOST_LOST * (dense.value - floor))

    @property
    def floor(self) -> float | None:
        """The score that needs no tuning: that of always giving the most frequent answer or, if the metric is
        no accuracy, the dense model's before it was tuned; None if it was not measured."""
        before = self.dense.before.get(self.metric) if self.dense else None
        if self.majority is not None or self.metric in _ACCURACIES or before is None:
            return self.majority
        return float(before.value)

    @property
    def num_examples(self) -> int | None:
        """The smallest number of examples behind any value; None if it was not recorded."""
        found = [
            m.n for row in self.rows for part in (row.after, row.paired, row.rival) for m in part.values()
        ]
        return min((n for n in found if n is not None), default=None)


def _least(measured: Measured) -> float:
    return float(measured.value if measured.low is None else measured.low)


def read(source: dict[str, Any]) -> View:
    """Reads run.json or study.json."""
    record = Record.model_validate(source)
    is_study = "points" in source or "kind" in source
    label = text((record.sweep.label or record.sweep.key if record.sweep else None) or "setting", 60)
    if is_study:
        # An ablation without settings (Fig. 9: layers or hidden size) is shown as a comparison.
        kind = "ablation" if record.sweep or len(record.points) > 1 else "compare"
        points = tuple(_read_point(point, label) for point in record.points)
    else:
        rows = (_run_row(name, found, record) for name, found in record.variants.items())
        kind, points = "run", (Point(None, "", tuple(rows)),)
    measured = dict.fromkeys(n for point in points for row in point.rows for n in (*row.after, *row.before))
    named = [str(name) for name in record.metrics if str(name) in measured]
    metrics = tuple(dict.fromkeys((*named, *measured)))
    section = record.recipe.get("evaluate")
    asked = section.get("metrics") if isinstance(section, dict) else None
    listed = (*metrics, *record.metrics, *(asked if isinstance(asked, list) else ()))
    seeds = (count(seed) for seed in record.seeds)
    return View(
        record=record,
        kind=kind,
        points=points,
        metric=str(listed[0]) if listed else "exact_match",
        metrics=metrics,
        seeds=tuple(seed for seed in seeds if seed is not None),
        sweep_label=label if kind == "ablation" else "",
        majority=(record.majority or None) if not metrics or metrics[0] in _ACCURACIES else None,
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
    """Returns the costs of a run's row that reports show, under the keys that studies use."""
    total = row.cost.seconds.get("total")
    return {
        "training_ratio": ratio(row.finetune.seconds, dense.finetune.seconds),
        "total_ratio": ratio(total, dense.cost.seconds.get("total")),
        "total_seconds": total,
    }


def _read_point(point: PointRecord, sweep_label: str) -> Point:
    label = text(point.label or "", 60)
    if number(point.value) is not None:
        # Axis and column heading already say what is varied.
        label = f"{point.value:g}"
    elif sweep_label and label.startswith(f"{sweep_label} "):
        label = label[len(sweep_label) + 1 :]
    return Point(point.value, label or text(point.value), tuple(map(_study_row, point.rows)))


def _study_row(raw: Any) -> Row:
    """Reads a row of study.json, where each metric holds its own differences."""
    row = Row.model_validate(raw)
    row.label = row.label or text(row.name, 80)
    row.before = known({name: Measured(value=found.before) for name, found in row.after.items()})
    row.paired = known({name: found.paired for name, found in row.after.items()})
    row.rival = known({name: found.paired_gradpruner for name, found in row.after.items()})
    row.plans = [plan for plan in row.plans if plan.actions]
    return row


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Returns the pruned rows: working ones first, GradPruner before others, never ordered by result."""
    pruned = [row for row in rows if row.is_pruned]

    def rank(row: Row) -> tuple[bool, ...]:
        return (row.error is not None, not row.after, not row.before, row.name.partition("@")[0] != "merged")

    return sorted(pruned, key=rank)


def choose(view: View) -> tuple[Row | None, str]:
    """Returns the row to ship, among those that worked and fit the budget, and what the choice rests on.

    'validation': it scores best on validation rows. 'certified': it is the smallest model with a certified
    loss. 'only': it is the only candidate. 'recipe': it is first in `in_order`, because only test rows were
    evaluated, and test rows must not decide. Returns (None, '') if no row worked. In a run, the first plans
    (rows named like their variant) set the budget and come first; if a limit on the loss set it, rows with
    the smallest limit fit. Rows that `has_lost` are taken only if all have.
    """
    done = [row for row in in_order(view.first.rows) if row.error is None and view.metric in row.after]
    done = [row for row in done if not view.has_lost(row)] or done
    if view.kind == "run":  # the first plans define the budget: any row no larger than them fits
        first = [row for row in done if "@" not in row.name]
        done = [*first, *(row for row in done if row not in first)]
        asked = [row.num_parameters for row in first]
        limit = max((size for size in asked if size is not None), default=None)
        fits = [row for row in done if limit is None or (row.num_parameters or 0) <= limit]
        if any(_limit(row) is not None for row in first):
            least_loss = min(most for row in done if (most := _limit(row)) is not None)
            fits = [row for row in done if _limit(row) == least_loss]
    else:
        share = view.record.budget.share
        least = None if share is None else share - FAR_FROM_BUDGET
        fits = [row for row in done if least is None or (row.removed_share or 0) >= least]
    validated = [
        (found.value, -(row.num_parameters or 0), -i, row)
        for i, row in enumerate(fits)
        if (found := row.validation.get(view.metric)) is not None
    ]
    if validated:
        return max(validated)[3], "validation"
    certified = [row for row in fits if _limit(row) is not None]
    if certified:
        return min(certified, key=lambda row: row.num_parameters or 0), "certified"
    if not fits:
        return None, ""
    return fits[0], "only" if len(fits) == 1 else "recipe"


def _limit(row: Row) -> float | None:
    """Returns the loss, as a fraction, that a row is certified not to exceed; None if it is not certified."""
    search = row.plan.search if row.plan else None
    return None if search is None or search.best is None else search.limit or 0.0


_PROPER = {"rouge_l": "ROUGE-L", "bert_score": "BERTScore"}


def metric_label(name: str) -> str:
    """Returns a metric's name as a title: exact_match -> 'Exact match'."""
    return _PROPER.get(name) or text(name).replace("_", " ").capitalize()


def metric_words(name: str) -> str:
    """Returns a metric's name within a sentence: exact_match -> 'exact match'."""
    return _PROPER.get(name) or metric_label(name).lower()


def answer_losses(losses: list[Any]) -> list[tuple[float, float]]:
    """Reads (step, loss on answers); with a teacher the logged loss is a mix, and `ce` that on answers."""
    return pairs(losses, "step", "ce") or pairs(losses, "step", "loss")


def pairs(rows: list[Any], x: str, y: str) -> list[tuple[float, float]]:
    """Reads (x, y) from a list of dictionaries; leaves out pairs that are not finite."""
    found = ((number(row.get(x)), number(row.get(y))) for row in rows if isinstance(row, dict))
    return [(a, b) for a, b in found if a is not None and b is not None]
