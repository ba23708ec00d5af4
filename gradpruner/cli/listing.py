"""`gradpruner ls`: lists the names that a recipe can use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gradpruner.cli.bundled import ablation_names, recipe_file, recipe_names, study_file
from gradpruner.cli.options import JsonOption
from gradpruner.common.registry import check_known

KINDS = {
    "methods": "pruning methods",
    "tasks": "named tasks: data, prompts and metrics",
    "recipes": "built-in recipes: gradpruner run NAME",
    "ablations": "the paper's ablations: gradpruner ablate NAME",
    "rules": "merge rules",
    "families": "model types that can be pruned",
    "shapes": "models whose sizes are built in: gradpruner cost NAME",
}


def ls(
    kind: Annotated[
        str | None, typer.Argument(help=f"What to list: {', '.join(KINDS)}. Default: these kinds.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List methods, tasks, recipes and other names."""
    entries = dict(KINDS) if kind is None else _entries(kind)
    if as_json:
        typer.echo(json.dumps(entries, indent=2))
        return
    width = max(map(len, entries), default=0)
    for name, description in entries.items():
        typer.echo(f"{name:<{width}}  {description}")


def _entries(kind: str) -> dict[str, str]:
    check_known("kind", kind, KINDS)
    if kind == "methods":
        from gradpruner.methods import METHODS

        return {name: METHODS.find(name).description for name in METHODS.names()}
    if kind == "tasks":
        from gradpruner.data.tasks import TASKS

        return {name: TASKS.find(name).description for name in TASKS.names()}
    if kind == "rules":
        from gradpruner.plans.merging import MERGE_RULES, needs_importance

        rules = [name for name in MERGE_RULES.names() if needs_importance(name)]  # the rest belong to LaCo
        return {name: (MERGE_RULES.find(name).__doc__ or "").splitlines()[0] for name in rules}
    if kind == "recipes":
        return {name: _first_comment(recipe_file(name)) for name in recipe_names()}
    if kind == "ablations":
        return {name: _first_comment(study_file(name)) for name in ablation_names()}
    if kind == "families":
        from gradpruner.models.families import FAMILIES

        return {name: f"drop only: {row.no_merge}" if row.no_merge else "" for name, row in FAMILIES.items()}
    from gradpruner.evaluation.costing.shapes import describe_shape, shape_names

    return {name: describe_shape(name) for name in shape_names()}


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
