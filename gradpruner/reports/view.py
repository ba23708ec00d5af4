"""What every report shows: points of rows, their metrics, and which row to ship.

A run has one point and its rows one seed each; a comparison has one point over seeds; an ablation has a point
per setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gradpruner.printing import text
from gradpruner.reports.record import Action, Measured, PlanRecord, Record, Seed, VariantRecord

FAR_FROM_BUDGET = 0.03
"""Removed shares further than this from the budget are not at it."""


@dataclass(frozen=True)
class Plan:
    """A pruning plan as recorded; `actions` has one entry per layer, in layer order."""

    name: str
    actions: tuple[Action, ...]
    recorded: PlanRecord

    @cached_property
    def targets(self) -> dict[int, list[int]]:
        """Target layer -> the layers merged into it, in layer order."""
        found: dict[int, list[int]] = {}
        for action in self.actions:
            if action.action == "merge" and action.into is not None and action.layer is not None:
                found.setdefault(action.into, []).append(action.layer)
        return found

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """Of every layer: keep, drop, merge, or receive (kept, and the target of a merge)."""
        kept = ("receive" if action.layer in self.targets else "keep" for action in self.actions)
        return tuple(
            str(action.action) if action.action in ("drop", "merge") else role
            for action, role in zip(self.actions, kept, strict=True)
        )

    @property
    def kept(self) -> frozenset[int | None]:
        """The layers that stay."""
        return frozenset(action.layer for action in self.actions if action.action not in ("drop", "merge"))

    def role(self, layer: int) -> str:
        """The role of a layer by its number."""
        return next((r for a, r in zip(self.actions, self.roles, strict=True) if a.layer == layer), "keep")


@dataclass(frozen=True)
class Quality:
    """One metric of one row.

    Attributes:
        after: Of the finished model. In a study the mean, with the lowest and the highest seed.
        before: Before fine-tuning.
        paired: Difference to the dense model on the same examples, with its 95 % interval.
        rival: The same difference to GradPruner; in studies only.
        per_seed: The value of every seed of a study.
    """

    after: Measured | None
    before: Measured | None = None
    paired: Measured | None = None
    rival: Measured | None = None
    per_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One model: the dense one, or what a method leaves.

    `uniform` False means that layers differ in width, so that only gradpruner loads the result. `pending`
    rows have not been run yet. `missing_seeds` are those that failed where others did not. `recorded` is
    what a run knows beyond that.
    """

    name: str
    label: str
    num_layers: int | None
    num_parameters: int | None
    removed_share: float | None
    quality: dict[str, Quality]
    validation: dict[str, Measured]
    costs: dict[str, Any]
    plans: tuple[Plan, ...]
    error: str | None = None
    pending: bool = False
    description: str = ""
    uniform: bool | None = None
    seeds: tuple[Seed, ...] = ()
    missing_seeds: tuple[int, ...] = ()
    recorded: VariantRecord = field(default_factory=lambda: VariantRecord())

    @property
    def is_dense(self) -> bool:
        """Whether this is the model as it was."""
        return self.name == "dense"

    @property
    def is_smaller(self) -> bool:
        """Whether this is another, smaller model, which removes nothing."""
        return self.name.startswith("smaller:")

    @property
    def plan(self) -> Plan | None:
        """The plan, of the first seed."""
        return self.plans[0] if self.plans else None

    def after(self, metric: str) -> Measured | None:
        """A metric of the finished model."""
        return self.quality[metric].after if metric in self.quality else None

    def before(self, metric: str) -> Measured | None:
        """A metric before fine-tuning."""
        return self.quality[metric].before if metric in self.quality else None

    def paired(self, metric: str) -> Measured | None:
        """The difference to the dense model, example by example."""
        return self.quality[metric].paired if metric in self.quality else None


@dataclass(frozen=True)
class Point:
    """One setting of a sweep; runs and comparisons have one point, without a value."""

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
        record: What was read.
        kind: 'run', 'compare', or 'ablation' where there are settings to compare.
        points: In recorded order.
        metric: The main metric; `metrics` are all, main first.
        plans: Of a run, by name.
        seeds: Of a study, as asked for.
        sweep_label: What is varied, in words; '' without settings.
        majority: Accuracy of always giving the most frequent answer; None where the main metric is no
            accuracy.
    """

    record: Record
    kind: str
    points: tuple[Point, ...]
    metric: str
    metrics: tuple[str, ...]
    plans: dict[str, Plan]
    seeds: tuple[int, ...]
    sweep_label: str
    majority: float | None

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """Every row of every point."""
        return tuple(row for point in self.points for row in point.rows)

    @cached_property
    def first(self) -> Point:
        """The only point, where there are no settings."""
        return self.points[0] if self.points else Point(None, "", ())

    @property
    def dense(self) -> Row | None:
        """The reference."""
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
        """The row to ship and what that rests on; see `choose`."""
        return choose(self) if self.kind != "ablation" else (None, "")

    @cached_property
    def main_name(self) -> str | None:
        """The row of the headline: of a run the one to ship, of a study GradPruner's, or the first."""
        if self.kind == "run":
            found = self.choice[0] or next(iter(in_order(self.rows)), None)
            return found.name if found else None
        others = [name for name in self.names if name != "dense"]
        return next((n for n in ("merged", "gradpruner", *others) if n in others), None)

    @property
    def main(self) -> Row | None:
        """The row of the headline."""
        return self.first.row(self.main_name)

    @property
    def num_examples(self) -> int | None:
        """Fewest evaluated examples behind a row; None when that was not recorded."""
        found = [
            measured.n
            for row in self.rows
            for q in row.quality.values()
            for measured in (q.after, q.paired, q.rival)
            if measured is not None and measured.n is not None
        ]
        return min(found, default=None)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Pruned rows as the recipe means them: what worked first, GradPruner before others, never by results."""
    pruned = [row for row in rows if not row.is_dense and not row.is_smaller]

    def rank(row: Row) -> tuple[bool, ...]:
        measured = [(q.after is not None, q.before is not None) for q in row.quality.values()]
        after, before = any(a for a, _ in measured), any(b for _, b in measured)
        return row.error is not None, not after, not before, row.name.partition("@")[0] != "merged"

    return sorted(pruned, key=rank)


def choose(view: View) -> tuple[Row | None, str]:
    """The row to ship, of those that worked and fit the budget, and what the choice rests on.

    'validation': the best figures on validation rows. 'certified': the smallest model whose loss is
    certified. 'only': there is no other. 'recipe': the order of the recipe, because nothing but test rows
    was measured, and those choose nothing. (None, '') if no row worked.
    """
    done = [
        row
        for row in in_order(view.first.rows)
        if row.error is None
        and row.after(view.metric) is not None
        and (row.removed_share is None or row.removed_share > 0)
    ]
    if view.kind == "run":  # what the recipe asks for is within its budget, and so is what is no larger
        asked = [row.num_parameters for row in done if row.name in view.record.rows.values()]
        limit = max((size for size in asked if size is not None), default=None)
        fits = [row for row in done if limit is None or (row.num_parameters or 0) <= limit]
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
    certified = [row for row in fits if row.plan and row.plan.recorded.search.best is not None]
    if certified:
        return min(certified, key=lambda row: row.num_parameters or 0), "certified"
    if not fits:
        return None, ""
    return fits[0], "only" if len(fits) == 1 else "recipe"


def metric_label(name: str) -> str:
    """Turns a metric's name into words: exact_match -> 'Exact match'."""
    proper = {"rouge_l": "ROUGE-L", "bert_score": "BERTScore"}
    return proper.get(name) or text(name).replace("_", " ").capitalize()
