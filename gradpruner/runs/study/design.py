"""What a study runs: its rows, points and seeds, before anything is loaded.

A row is a line of the table. A point is a setting in which the rows are compared: a plain comparison has one
point, a sweep one for each value. Each point is an ordinary run per seed. Rows that no point can change have
a run of their own and are shown at every point.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from gradpruner.common.errors import ConfigError
from gradpruner.common.registry import check_known
from gradpruner.methods import METHODS
from gradpruner.plans.options import BUDGETS
from gradpruner.runs.recipe.effects import effect_of
from gradpruner.runs.recipe.recipe import Recipe, assign, check_recipe, resolve_paths
from gradpruner.runs.study.file import NamedPoint, Sweep

# Keys that the study itself sets.
OWN_KEYS = ("out", "seed", "variants", "title")
DENSE, GRADPRUNER = "dense", "merged"
GRADPRUNER_ROWS = (GRADPRUNER, "dropped")
# Rows without a method: name -> label and description.
FIXED_ROWS = {
    DENSE: ("Dense", "The whole model, fine-tuned."),
    GRADPRUNER: ("GradPruner", "Layers with the least LoRA-gradient energy go; the best of them are merged."),
    "dropped": ("GradPruner, no merging", "The same layers go; none is merged."),
}


@dataclass(frozen=True)
class Point:
    """One setting in which rows are compared.

    Attributes:
        value: Value of the swept key; None without a sweep.
        label: Its name; "" for the only point of a plain comparison.
        changes: Dotted recipe keys -> values.
        folder: Folder of its runs, relative to the study's; "" for the study's folder itself.
    """

    value: Any = None
    label: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    folder: str = ""


@dataclass(frozen=True)
class StudyRow:
    """One line of the table.

    Attributes:
        name: Unique in the study: "dense", "merged", "last", "smaller:qwen".
        variant: Its name in its runs.
        part: Folder of its own runs; "" if it belongs to the run of its point.
        model: Folder or hub id of its own model; None for the recipe's.
    """

    name: str
    label: str
    description: str
    variant: str
    part: str = ""
    model: str | None = None


@dataclass(frozen=True)
class StudyRun:
    """One run; `folder` is relative to the study's, `title` appears in progress and messages."""

    folder: str
    seed: int
    recipe: Recipe
    title: str


@dataclass(frozen=True)
class Study:
    """Everything a study runs.

    Attributes:
        recipe: The recipe that all runs start from.
        rows: Lines of the table, dense first.
        points: At least one.
        seeds: At least one.
        out: Folder of the study.
        kind: "compare" or "ablation".
        title: Title of the report; "" takes a default.
        figure: The table or figure of the paper that the study repeats, or "".
        what: What is done, in a sentence, or "".
        sweep: "key", "label", "values" and "log" of the swept key; None without a sweep.
        plot: Hints for the figure.
        base_folder: Folder that relative paths in the points start from.
    """

    recipe: Recipe
    rows: tuple[StudyRow, ...]
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    out: Path
    kind: str = "compare"
    title: str = ""
    figure: str = ""
    what: str = ""
    sweep: dict[str, Any] | None = None
    plot: dict[str, Any] = field(default_factory=dict)
    base_folder: Path = Path()

    @property
    def only_pruning_changes(self) -> bool:
        """Whether the points change nothing that a dense model depends on."""
        return all(
            effect_of(key.partition(".")[0]) == "pruning" for point in self.points for key in point.changes
        )

    def folder(self, point: Point, row: StudyRow, seed: int) -> str:
        """Returns the folder of the run that has a row at a point, relative to the study's."""
        parts = ["" if self.is_shared(row) else point.folder, row.part, f"seed-{seed}"]
        return "/".join(part for part in parts if part)

    def is_shared(self, row: StudyRow) -> bool:
        """Whether one run per seed serves the row at all points."""
        return bool(row.part) and self.only_pruning_changes

    def pruning_runs(self) -> list[tuple[Point, str]]:
        """Returns each point with the folder of its first run that prunes; [] if no row is pruned."""
        pruned = [row for row in self.rows if row.name != DENSE and row.model is None]
        return [
            (point, self.folder(point, row, self.seeds[0])) for point in self.points for row in pruned[:1]
        ]

    def runs(self) -> list[StudyRun]:
        """Returns every run once; all points of the first seed come first.

        Raises:
            ConfigError: If the recipe of a point is not valid.
        """
        found: dict[str, StudyRun] = {}
        for seed in self.seeds:
            for point in self.points:
                for row in self.rows:
                    folder = self.folder(point, row, seed)
                    if folder not in found:
                        found[folder] = self._run(folder, point, row, seed)
        return list(found.values())

    def _run(self, folder: str, point: Point, row: StudyRow, seed: int) -> StudyRun:
        raw = self.recipe.model_dump(mode="json")
        if not self.is_shared(row):
            change(raw, point.changes)
        if row.model is not None:
            # Nothing is pruned here, and the larger model's budget may be impossible for this one.
            raw["model"]["path"], raw["plan"] = row.model, {"num_prune": 0}
        raw |= {
            "variants": [other.variant for other in self.rows if other.part == row.part],
            "seed": seed,
            "out": str(self.out / folder),
        }
        resolve_paths(raw, self.base_folder)
        where = [text for text in ("" if self.is_shared(row) else point.label, row.part) if text]
        recipe = check_recipe(raw, " ".join(["The recipe", *(f"({text})" for text in where)]))
        return StudyRun(folder, seed, recipe, ", ".join([*where, f"seed {seed}"]))

    def to_yaml(self) -> str:
        """Returns the study as a file for `gradpruner ablate`, to repeat it elsewhere."""
        named = [{"label": p.label, "set": p.changes} for p in self.points if p.changes]
        values = {
            "title": self.title,
            "figure": self.figure,
            "what": self.what,
            "methods": [row.name for row in self.rows if row.model is None],
            "smaller": [row.model for row in self.rows if row.model is not None],
            "seeds": list(self.seeds),
            "sweep": self.sweep,
            "points": named if self.sweep is None and named else None,
            "plot": self.plot,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        text: str = yaml.safe_dump(values, sort_keys=False, width=100)
        return text


def change(raw: dict[str, Any], changes: dict[str, Any]) -> None:
    """Sets dotted keys in a recipe's values; a new budget replaces the old one."""
    budgets = [f"plan.{name}" for name in ("file", *BUDGETS)]
    if set(budgets) & set(changes):
        for key in budgets:
            assign(raw, key, None)
    for key, value in changes.items():
        assign(raw, key, value)


def make_study(
    recipe: Recipe,
    *,
    out: str | Path,
    methods: Sequence[str] | None = None,
    smaller: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    sweep: Sweep | None = None,
    points: Sequence[NamedPoint] | None = None,
    **others: Any,
) -> Study:
    """Makes a study and checks the recipes of all its runs.

    Args:
        recipe: The recipe that all runs start from; its `out`, `seed` and `variants` are replaced.
        out: Folder of the study.
        methods: Methods, each a row. "gradpruner" makes two rows, with and without merging; "all" is every
            method; None takes the recipe's variants. The dense model is always the first row.
        smaller: Smaller models to fine-tune for comparison: folders or hub ids.
        seeds: Seeds; each is a run at every point.
        sweep: A recipe key and its values; each value is a point.
        points: Points with several changes, instead of a sweep.
        others: Further fields of `Study`.

    Raises:
        ConfigError: If a method, a key or a value is unknown, or something is listed twice.
    """
    study = Study(
        recipe=recipe,
        rows=_rows(methods if methods is not None else recipe.variants, smaller),
        points=_points(sweep, points),
        seeds=checked_seeds(seeds),
        out=Path(out),
        sweep=sweep.model_dump() | {"label": sweep.label or sweep.key} if sweep is not None else None,
        **others,
    )
    # Where pruned models start from the tuned one, every point needs the dense row; its training is adopted.
    if len(study.points) > 1 and study.only_pruning_changes and not recipe.tunes_first:
        own = tuple(replace(row, part=DENSE) if row.name == DENSE else row for row in study.rows)
        study = replace(study, rows=own)
    study.runs()
    return study


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Returns the seeds if there is at least one and none is repeated.

    Raises:
        ConfigError: If there are none, or one is given twice.
    """
    if not seeds:
        raise ConfigError("A study needs seeds.", hint="Give one or more: --seeds 0,1,2.")
    twice = sorted({seed for seed in seeds if list(seeds).count(seed) > 1})
    if twice:
        raise ConfigError(
            f"Seed {', '.join(map(str, twice))} is given more than once.",
            hint="The same seed gives the same numbers again; give different ones: --seeds 0,1,2.",
        )
    return tuple(seeds)


def _rows(methods: Sequence[str], smaller: Sequence[str]) -> tuple[StudyRow, ...]:
    names = dict.fromkeys([DENSE, *(name for word in methods for name in _row_names(word))])
    rows = []
    for name in names:
        if name in FIXED_ROWS:
            label, description = FIXED_ROWS[name]
        else:
            method = METHODS.find(name)
            label, description = method.label or name.replace("_", " "), method.description
        rows.append(StudyRow(name, label, description, name))
    for model in smaller:
        name = Path(model).name
        description = f"A smaller model fine-tuned instead: {model}."
        part = f"smaller-{_slug(name)}"
        rows.append(StudyRow(f"smaller:{name}", f"{name}, fine-tuned", description, DENSE, part, model))
    doubled = [row.name for row in rows if sum(row.part == other.part != "" for other in rows) > 1]
    if doubled:  # their runs would share a folder
        raise ConfigError(
            f"Two smaller models are called {doubled[0].partition(':')[2]}.",
            hint="Give each model once, or rename one of the folders.",
        )
    return tuple(rows)


def _row_names(method: str) -> Sequence[str]:
    """The rows that an entry of `--methods` stands for."""
    if method == "gradpruner":
        return GRADPRUNER_ROWS
    if method == "all":
        return [row for name in ("gradpruner", *METHODS.names()) for row in _row_names(name)]
    check_known("method", method, [*METHODS.names(), *FIXED_ROWS, "all"])
    return [method]


def _points(sweep: Sweep | None, named: Sequence[NamedPoint] | None) -> tuple[Point, ...]:
    if sweep is not None:
        key, name = sweep.key, sweep.label or sweep.key
        given = [
            Point(value, f"{name} {_shown(value)}", {key: value}, _slug(f"{key}={_shown(value)}"))
            for value in sweep.values
        ]
    elif named is not None:
        given = [Point(None, point.label, point.changes, f"point-{_slug(point.label)}") for point in named]
    else:
        return (Point(),)
    for point in given:
        for key in point.changes:
            if key.partition(".")[0] in OWN_KEYS:
                raise ConfigError(
                    f"A study cannot sweep over {key}.",
                    hint="Seeds and rows are set by `seeds` and `methods`; sweep over another key.",
                )
    folders = [point.folder for point in given]
    for point in given:
        if folders.count(point.folder) > 1:
            raise ConfigError(
                f"The study has the point '{point.label}' more than once.", hint="Give each point once."
            )
    return tuple(given)


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _slug(text: str) -> str:
    """The text as a folder name that every system allows."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text).strip("._") or "point"
