"""Which model of a run is the one to ship: chosen on validation rows, never on test rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.errors import ConfigError
from gradpruner.reports.formats import number
from gradpruner.reports.reading import mapping, metric_label

VALIDATION = "validation"
"""What a row's measurement on validation rows is called in `also`."""
_SPLIT_HINT = (
    "With data.validation in the recipe the rows are measured on validation rows, and the best is taken."
)


@dataclass(frozen=True)
class Shipped:
    """The model to ship.

    Attributes:
        row: Its row of the run.
        folder: Where it lies: relative to the run directory, or the model that was given.
        reason: Why this one, in a sentence.
    """

    row: str
    folder: str
    reason: str


def model_to_ship(record: dict[str, Any], wanted: str | None = None) -> Shipped:
    """The best pruned row by validation among those no larger than what the recipe asks for.

    Where no row was measured on validation rows nothing is compared: it is the row that the report is about.

    Args:
        record: run.json.
        wanted: A row to take instead.

    Raises:
        ConfigError: If there is no such row, it failed, or there is none to ship.
    """
    rows = {name: mapping(record, "variants", name) for name in mapping(record, "variants")}
    made = {name: row for name, row in rows.items() if not row.get("error")}
    if wanted is not None:
        if wanted not in made:
            state = "failed in this run" if wanted in rows else "is none of this run"
            raise ConfigError(
                f"The row '{wanted}' {state}.", hint=f"Rows that have a model: {', '.join(made) or 'none'}."
            )
        return Shipped(wanted, _folder(record, wanted), "You asked for it.")
    done = {
        name: row for name, row in made.items() if row.get("plan") and mapping(row, "evaluation", "metrics")
    }
    if not done:
        raise ConfigError(
            "This run has no pruned model that is measured.",
            hint="Start it again: it goes on where it stopped. A row may also be named.",
        )
    name, reason = _choice(record, done)
    return Shipped(name, _folder(record, name), reason)


def _choice(record: dict[str, Any], done: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """The row, and why."""
    asked = [name for name in mapping(record, "rows").values() if name in done]
    limit = max((_size(done[name]) for name in asked), default=float("inf"))
    fitting = {name: row for name, row in done.items() if _size(row) <= limit}
    if len(fitting) == 1:
        only = next(iter(fitting))
        return only, "It is the only pruned row" + (" that fits." if len(done) > 1 else ".")
    metric = next((str(m) for row in fitting.values() for m in mapping(row, "evaluation", "metrics")), "")
    scores = {
        name: value
        for name, row in fitting.items()
        if (value := number(mapping(row, "also", VALIDATION, "metrics", metric).get("value"))) is not None
    }
    if scores:
        best = max(scores, key=lambda name: (scores[name], -_size(fitting[name])))
        what = metric_label(metric).lower()
        return (
            best,
            f"It has the best {what} on validation rows ({scores[best]:.1%}) of {len(scores)} that fit.",
        )
    main = min(fitting, key=lambda name: (name.partition("@")[0] != "merged", name not in asked))
    return main, f"It is the row this run is about; nothing was compared on validation rows. {_SPLIT_HINT}"


def _size(row: dict[str, Any]) -> float:
    size = number(row.get("num_parameters"))
    return float("inf") if size is None else size


def _folder(record: dict[str, Any], row: str) -> str:
    """Where the finished model of a row is."""
    found = mapping(record, "variants", row)
    tuned = mapping(found, "finetune").get("output")
    if tuned:
        return str(tuned)
    if found.get("recovery"):
        return f"variants/{row}/recovered"
    if row == "dense":
        return str(mapping(record, "model").get("path"))
    return str(Path("variants", row, "pruned"))
