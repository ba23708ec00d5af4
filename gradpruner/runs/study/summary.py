"""From the run.json files of a study to study.json: means, ranges and differences; runs nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gradpruner.common.provenance import provenance, utc_now
from gradpruner.common.version import __version__
from gradpruner.runs.folder.plan_names import method_of
from gradpruner.runs.study.design import DENSE, GRADPRUNER, Point, Study, StudyRow
from gradpruner.runs.study.pairing import Answers, paired_over_seeds, read_answers


@dataclass
class Found:
    """What is known so far about the runs of a study.

    Attributes:
        records: Folder of a run -> its run record.
        errors: Folder of a run -> why it, or one of its rows, failed.
        budgets: Folder of a point -> what is removed there.
        created: When the study was first started.
        warnings: Warnings about the study itself.
    """

    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    created: str = ""
    warnings: list[str] = field(default_factory=list)


def summarise(study: Study, found: Found, command: str = "") -> dict[str, Any]:
    """Returns the content of study.json, which reports read, as JSON values."""
    runs = study.runs()
    finished = [run for run in runs if run.folder in found.records]
    first = next((found.records[run.folder] for run in finished), {})
    base = next((r for r in found.records.values() if _at(r, "variants", DENSE, "evaluation")), first)
    rows = (row for record in found.records.values() for row in record["variants"].values())
    points = [_Point(study, point, found) for point in study.points]
    return {
        "schema_version": 1,
        "kind": study.kind,
        "title": study.title or _title(study, str(first.get("title", ""))),
        "figure": study.figure,
        "what": study.what,
        "command": command,
        "gradpruner_version": __version__,
        "created": found.created or utc_now(),
        "finished": utc_now(),
        "runs": {
            "planned": len(runs),
            "finished": len(finished),
            "failed": sum(run.folder in found.errors for run in runs),
        },
        "provenance": provenance(study.seeds[0]) | {"seed": list(study.seeds)},
        "recipe": study.recipe.model_dump(mode="json"),
        "seeds": list(study.seeds),
        "mode": study.recipe.finetune.mode,
        "sweep": study.sweep,
        "plot": study.plot,
        "task": study.recipe.task_name,
        "model": base.get("model"),
        "budget": next(iter(found.budgets.values()), None),
        "metrics": _metric_names(filter(is_measured, rows)),
        "points": [point.summary() for point in points if point.is_begun],
        "reference": first.get("reference", {}),
        "warnings": _warnings(found),
    }


class _Point:
    """One point: its rows over the seeds."""

    def __init__(self, study: Study, point: Point, found: Found) -> None:
        self.study, self.point, self.found = study, point, found
        self.entries = {row.name: self._entries(row) for row in study.rows}
        self.answers = {row.name: self._answers(row) for row in study.rows}

    def _entries(self, row: StudyRow) -> dict[int, dict[str, Any]]:
        """Seed -> the row in that seed's run, for the runs that are done."""
        found = {seed: _at(self._record(row, seed), "variants", row.variant) for seed in self.study.seeds}
        return {seed: entry for seed, entry in found.items() if entry}

    def _record(self, row: StudyRow, seed: int) -> dict[str, Any]:
        """The record of the run that has a row; {} if there is none yet."""
        return self.found.records.get(self.study.folder(self.point, row, seed), {})

    def _answers(self, row: StudyRow) -> dict[int, Answers]:
        found = {}
        for seed, entry in self.entries[row.name].items():
            file = _at(entry, "evaluation", "per_example")
            if file and not entry.get("error"):
                folder = self.study.folder(self.point, row, seed)
                answers = read_answers(self.study.out / folder / file)
                if answers is not None:
                    found[seed] = answers
        return found

    @property
    def is_begun(self) -> bool:
        """Whether a run of the point itself has been tried; shared rows do not count."""
        rows = [row for row in self.study.rows if not self.study.is_shared(row)] or self.study.rows
        folders = [self.study.folder(self.point, row, seed) for row in rows for seed in self.study.seeds]
        return any(folder in self.found.records or folder in self.found.errors for folder in folders)

    def summary(self) -> dict[str, Any]:
        """The entry of the point in study.json."""
        return {
            "value": self.point.value,
            "label": self.point.label,
            "budget": self.found.budgets.get(self.point.folder),
            "rows": [self._row(row) for row in self.study.rows],
        }

    def _row(self, row: StudyRow) -> dict[str, Any]:
        good = {seed: e for seed, e in self.entries[row.name].items() if is_measured(e)}
        per_seed = [self._seed(row, seed) for seed in self.study.seeds]
        errors = [entry["error"] for entry in per_seed if entry["error"]]
        plans = self._facts(row, good, "plans")
        # Sizes are compared with the study's dense model, even if the row is another model.
        left, dense = [entry["num_parameters"] for entry in good.values()], self.dense_parameters
        removed = [] if dense is None else [dense - size for size in left]
        return {
            "name": row.name,
            "label": row.label,
            "description": row.description,
            "error": (errors[0] if errors else None) if not good else None,
            "num_parameters": _rounded(_mean(left)),
            "removed_parameters": _rounded(_mean(removed)),
            "removed_share": _mean(size / dense for size in removed) if dense else None,
            "num_layers": _rounded(_mean(entry.get("num_layers") for entry in good.values())),
            "uniform": next((plan["uniform"] for plan in plans if "uniform" in plan), None),
            "metrics": {name: self._metric(row, name, good) for name in _metric_names(good.values())},
            "validation": _validation(good.values()),
            "costs": self._costs(row, good),
            "per_seed": per_seed,
            "plans": plans,
            "scores": self._facts(row, good, "scores"),
        }

    def _seed(self, row: StudyRow, seed: int) -> dict[str, Any]:
        folder = self.study.folder(self.point, row, seed)
        entry = self.entries[row.name].get(seed)
        if entry is not None:
            error = entry.get("error") or (None if is_measured(entry) else "not finished")
        else:
            error = self.found.errors.get(folder, "not run yet")
        return {"seed": seed, "run": folder, "error": error}

    @property
    def dense_parameters(self) -> int | None:
        """Number of parameters of the model that the study prunes."""
        rows = [row for row in self.study.rows if row.model is None]
        records = (self._record(row, seed) for row in rows for seed in self.study.seeds)
        return next((int(record["model"]["num_parameters"]) for record in records if record), None)

    def _metric(self, row: StudyRow, name: str, good: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        def value(entry: dict[str, Any] | None, part: str) -> Any:
            return _at(entry, part, "metrics", name, "value")

        per_seed = [value(good.get(seed), "evaluation") for seed in self.study.seeds]
        there = [found for found in per_seed if found is not None]
        dense = [value(entry, "evaluation") for entry in self.entries[DENSE].values() if is_measured(entry)]
        mean, whole = _mean(there), _mean(dense)
        return {
            "mean": mean,
            "low": min(there),
            "high": max(there),
            "per_seed": per_seed,
            "before": _mean(value(entry, "before") for entry in good.values()),
            "recovery": mean / whole if mean is not None and whole else None,
            "paired": self._paired(row, DENSE, name),
            "paired_gradpruner": self._paired(row, GRADPRUNER, name),
        }

    def _paired(self, row: StudyRow, other: str, metric: str) -> dict[str, Any] | None:
        if row.name == other or other not in self.answers:
            return None
        return paired_over_seeds(self.answers[row.name], self.answers[other], metric)

    def _costs(self, row: StudyRow, good: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
        wholes = self.entries[DENSE]

        def mean(*keys: str) -> float | None:
            return _mean(_at(entry, *keys) for entry in good.values())

        def ratio(*keys: str) -> float | None:
            """Mean over the seeds of a cost divided by the dense model's."""
            pairs = [(_at(entry, *keys), _at(wholes.get(seed), *keys)) for seed, entry in good.items()]
            return _mean(mine / whole for mine, whole in pairs if mine is not None and whole)

        return {
            "total_seconds": mean("cost", "seconds", "total"),
            "total_ratio": ratio("cost", "seconds", "total"),
            "trained_tokens": _rounded(mean("cost", "tokens")),
            "method_seconds": mean("cost", "method_seconds"),
            "method_peak_memory_bytes": _rounded(mean("cost", "method_peak_memory_bytes")),
            "training_seconds": mean("finetune", "seconds"),
            "training_ratio": ratio("finetune", "seconds"),
            "training_peak_memory_bytes": _rounded(mean("finetune", "peak_memory_bytes")),
            "inference_seconds": mean("evaluation", "seconds"),
            "inference_ratio": ratio("evaluation", "seconds"),
        }

    def _facts(self, row: StudyRow, good: Mapping[int, dict[str, Any]], part: str) -> list[dict[str, Any]]:
        """The plans, or the scores, of every seed."""
        found = []
        for seed in good:
            record, name = self._record(row, seed), row.variant
            if part == "scores":
                name = _at(record, "plans", name, "scores") or method_of(name)
            facts = _at(record, part, name)
            if facts is not None and row.variant != DENSE:
                kept = {k: v for k, v in facts.items() if k not in ("savings", "portability")}
                found.append({"seed": seed, **kept})
        return found


def is_measured(entry: Mapping[str, Any]) -> bool:
    """Whether a row of a run is evaluated and has no error."""
    return not entry.get("error") and bool(entry.get("evaluation"))


def _title(study: Study, of_run: str) -> str:
    what = study.sweep["label"] if study.sweep is not None else "methods compared"
    return f"{of_run}: {what}".removeprefix(": ")


def _metric_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of all metrics that were measured, the main one first."""
    return list(dict.fromkeys(name for row in rows for name in _at(row, "evaluation", "metrics") or ()))


def _validation(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over the seeds on validation rows, by which a row is recommended; {} if none were measured."""
    measured = [_at(row, "also", "validation", "metrics") or {} for row in rows]
    return {
        name: {"mean": _mean(_at(metrics, name, "value") for metrics in measured), "n": first["n"]}
        for found in measured[:1]
        for name, first in found.items()
    }


def _warnings(found: Found) -> list[str]:
    said = [warning for record in found.records.values() for warning in record.get("warnings", [])]
    return list(dict.fromkeys([*found.warnings, *said]))


def _at(values: Any, *keys: str) -> Any:
    """The value at these keys of nested JSON objects; None if a key is missing."""
    for key in keys:
        values = (values or {}).get(key)
    return values


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _rounded(value: float | None) -> int | None:
    return None if value is None else round(value)
