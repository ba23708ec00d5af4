"""run.json as typed views. A missing part reads as empty: an interrupted run still has a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gradpruner.errors import IntegrityError
from gradpruner.files import shown
from gradpruner.json_files import read_json
from gradpruner.reports.formats import number, text

_ACCURACIES = ("exact_match", "choice_accuracy", "choice_accuracy_normalised")
FEW_EXAMPLES = 100
"""Below this many evaluated examples a result is marked: its interval is about 20 points wide."""


@dataclass(frozen=True)
class Measured:
    """One metric of one model.

    Attributes:
        value: Fraction, 0-1.
        low: Lower end of the 95 % interval, or None.
        high: Upper end, or None.
        n: Evaluated examples, or None.
    """

    value: float
    low: float | None
    high: float | None
    n: int | None

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return self.low is not None and self.high is not None

    @property
    def is_small(self) -> bool:
        """Whether too few examples were evaluated to rely on the value."""
        return self.n is not None and self.n < FEW_EXAMPLES


@dataclass(frozen=True)
class LayerAction:
    """What a plan does with one layer: keep, drop or merge (then `into` names the target)."""

    layer: int
    action: str
    into: int | None


@dataclass(frozen=True)
class Plan:
    """A pruning plan as recorded.

    Attributes:
        name: Key in run.json.
        actions: One entry per layer, in layer order.
        num_kept: Layers that remain.
        savings: Unit -> (before, after).
    """

    name: str
    actions: tuple[LayerAction, ...]
    num_kept: int | None
    savings: dict[str, tuple[float | None, float | None]]

    @property
    def merges(self) -> tuple[LayerAction, ...]:
        """The merged layers that have a target."""
        return tuple(a for a in self.actions if a.action == "merge" and a.into is not None)

    @property
    def targets(self) -> dict[int, list[int]]:
        """Target layer -> the layers merged into it, in layer order."""
        found: dict[int, list[int]] = {}
        for action in self.merges:
            if action.into is not None:
                found.setdefault(action.into, []).append(action.layer)
        return found

    def role(self, layer: int) -> str:
        """Returns 'keep', 'drop', 'merge', or 'receive': kept and the target of a merge."""
        for action in self.actions:
            if action.layer == layer and action.action != "keep":
                return action.action if action.action in ("drop", "merge") else "keep"
        return "receive" if any(a.into == layer for a in self.merges) else "keep"


@dataclass(frozen=True)
class Variant:
    """One model of the comparison: the dense one or a pruned one.

    `paired` holds differences to the dense model, example by example: -1 to 1, by metric.
    """

    name: str
    label: str
    is_dense: bool
    error: str | None
    num_layers: int | None
    num_parameters: int | None
    plan: Plan | None
    before: dict[str, Measured]
    after: dict[str, Measured]
    finetune: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    paired: dict[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True)
class RunView:
    """Everything the report shows, found in run.json once.

    Attributes:
        run: The record itself, for the parts that need no view.
        variants: In recorded order.
        dense: The reference, or None.
        main: The pruned variant of the headline, or None: `merged` when it worked, else the first
            that did. Never the best one, which would flatter the method.
        metric: Name of the headline metric.
        metrics: Every metric recorded, headline first.
        plans: By name.
        majority: Accuracy of always giving the most frequent answer; None where the headline is no accuracy.
    """

    run: dict[str, Any]
    variants: tuple[Variant, ...]
    dense: Variant | None
    main: Variant | None
    metric: str
    metrics: tuple[str, ...]
    plans: dict[str, Plan]
    majority: float | None


def mapping(source: Any, *keys: str) -> dict[str, Any]:
    """Follows `keys` into nested dictionaries; {} as soon as one is missing or is no dictionary."""
    for key in keys:
        source = source.get(key) if isinstance(source, Mapping) else None
    return dict(source) if isinstance(source, Mapping) else {}


def sequence(source: Any, *keys: str) -> list[Any]:
    """Follows `keys` to a list; [] when there is none."""
    parent = mapping(source, *keys[:-1])
    found = parent.get(keys[-1])
    return list(found) if isinstance(found, list | tuple) else []


def count(value: Any) -> int | None:
    """Returns a whole number, or None."""
    finite = number(value)
    return None if finite is None else round(finite)


def read_record(path: Path, kind: str) -> dict[str, Any]:
    """Reads run.json or study.json. What is in it is looked at value by value by whoever shows it.

    Raises:
        IntegrityError: If it is missing, no JSON, or no object.
    """
    found = read_json(path, kind)
    if not isinstance(found, dict):
        raise IntegrityError(f"{path} is not a readable {kind}: it is {shown(found)}, not an object.")
    return found


def read_run(run: dict[str, Any]) -> RunView:
    """Finds the variants, the plans and the metrics of one run."""
    plans = {name: read_plan(name, mapping(run, "plans", name)) for name in mapping(run, "plans")}
    recorded = mapping(run, "variants")
    variants = tuple(_read_variant(name, mapping(recorded, name), plans) for name in recorded)
    dense = next((v for v in variants if v.is_dense), None)
    metrics = _metric_names(variants)
    return RunView(
        run=run,
        variants=variants,
        dense=dense,
        main=_main_variant(variants),
        metric=metrics[0] if metrics else "exact_match",
        metrics=metrics,
        plans=plans,
        majority=number(mapping(run, "reference").get("majority_class"))
        if not metrics or metrics[0] in _ACCURACIES
        else None,
    )


def metric_label(name: str) -> str:
    """Turns a metric's name into words: exact_match -> 'Exact match'."""
    proper = {"rouge_l": "ROUGE-L", "bert_score": "BERTScore"}
    if name in proper:
        return proper[name]
    return text(name).replace("_", " ").capitalize()


def pairs(rows: list[Any], x: str, y: str) -> list[tuple[float, float]]:
    """Reads (x, y) from a list of dictionaries, leaving out what is not finite."""
    found = ((number(mapping(row).get(x)), number(mapping(row).get(y))) for row in rows)
    return [(a, b) for a, b in found if a is not None and b is not None]


def read_plan(name: str, recorded: dict[str, Any]) -> Plan:
    """Reads a pruning plan; what is no layer's action is left out."""
    actions = []
    for entry in sequence(recorded, "actions"):
        layer = count(mapping(entry).get("layer"))
        if layer is not None:
            action = str(mapping(entry).get("action"))
            actions.append(LayerAction(layer, action, count(mapping(entry).get("into"))))
    savings = {
        str(unit): (number(mapping(pair).get("before")), number(mapping(pair).get("after")))
        for unit, pair in mapping(recorded, "savings").items()
    }
    ordered = tuple(sorted(actions, key=lambda a: a.layer))
    return Plan(str(name), ordered, count(recorded.get("num_kept")), savings)


def _read_variant(name: str, recorded: dict[str, Any], plans: dict[str, Plan]) -> Variant:
    error = recorded.get("error")
    return Variant(
        name=str(name),
        label=text(recorded.get("label") or name),
        is_dense=name == "dense",
        error=None if not error else str(error),
        num_layers=count(recorded.get("num_layers")),
        num_parameters=count(recorded.get("num_parameters")),
        plan=plans.get(str(recorded.get("plan"))),
        before=read_metrics(mapping(recorded, "before", "metrics")),
        after=read_metrics(mapping(recorded, "evaluation", "metrics")),
        finetune=mapping(recorded, "finetune"),
        evaluation=mapping(recorded, "evaluation"),
        paired=read_metrics(mapping(recorded, "paired", "task")),
    )


def read_metrics(recorded: dict[str, Any]) -> dict[str, Measured]:
    """Reads metrics, in the order they were recorded: the most telling first."""
    measured = {}
    for name, entry in recorded.items():
        value = number(mapping(entry).get("value"))
        if value is not None:
            low, high = number(mapping(entry).get("low")), number(mapping(entry).get("high"))
            measured[str(name)] = Measured(value, low, high, count(mapping(entry).get("n")))
    return measured


def _metric_names(variants: tuple[Variant, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for v in variants for name in (*v.after, *v.before)))


def _main_variant(variants: tuple[Variant, ...]) -> Variant | None:
    pruned = [v for v in variants if not v.is_dense]
    pruned.sort(
        key=lambda v: (v.error is not None, not v.after, not v.before, v.name.partition("@")[0] != "merged")
    )
    return pruned[0] if pruned else None
