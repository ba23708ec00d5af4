"""`gradpruner init`: writes a first recipe, filled in from the model's config and the rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from gradpruner.cli.executing import prepare
from gradpruner.cli.options import ROWS, Chosen, takes
from gradpruner.cli.suggestions import suggest
from gradpruner.common.errors import ConfigError, GradPrunerError

RECIPE_NAME = "recipe.yaml"


@takes(f"where {ROWS} trust_remote_code")
def init(
    chosen: Chosen,
    where: Annotated[
        Path, typer.Argument(help=f"Recipe to write (NAME.yaml), or a folder to write {RECIPE_NAME} in.")
    ] = Path(),
) -> None:
    """Write a first recipe for your own model and data.

    Example: gradpruner init --model MODEL --data ROWS

    Fills in what suits the model's config and the rows; reads no weights. Without --model or --data, looks
    beside the recipe for a model folder and for files called train and test.
    """
    from gradpruner.common.files import write_text
    from gradpruner.runs.recipe.recipe import check_recipe
    from gradpruner.runs.recipe.yaml_files import parse_yaml
    from gradpruner.runs.starting import first_recipe

    target = where if where.suffix in (".yaml", ".yml") else where / RECIPE_NAME
    if target != where and where.suffix[1:].isalpha() and not where.is_dir():
        raise ConfigError(
            f"'{where}' looks like a file, and a recipe is a YAML file.",
            hint=f"Give {where.with_suffix('.yaml')}, or a folder to write {RECIPE_NAME} in.",
        )
    if os.path.lexists(target):
        raise ConfigError(
            f"{target} already exists, and is not overwritten.",
            hint="Give another name: gradpruner init other.yaml",
        )
    prepare(quiet=True)
    try:
        text = first_recipe(target, _found(target.parent, chosen.values))
    except GradPrunerError as error:
        if error.hint and any(option in error.hint for option in ("--set", "--skip-bad", "data.")):
            error.hint += " `gradpruner run` has these options (--set KEY=VALUE for keys); `init` has not."
        raise
    check_recipe(parse_yaml(text), str(target))
    write_text(target, text)
    typer.echo(f"written: {target}")
    suggest("init", recipe=target)


def _found(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Adds to the given keys the model and data files found in `folder`."""
    from gradpruner.data.folders import file_of, split_files
    from gradpruner.models.checking import is_model_folder

    if "model.path" not in values:
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        models = [path for path in inside if is_model_folder(path)]
        if len(models) != 1:
            named = ", ".join(map(str, models)) or "none"
            raise ConfigError(
                f"No --model given, and {folder} does not hold exactly one model folder (found: {named}).",
                hint="Give --model: a folder or a hub id.",
            )
        values["model.path"] = str(models[0])
    if "data.task" in values:
        return values
    if "data.train" not in values:
        files = split_files(folder, "train")
        values["data.train"] = str(files[0] if files == [file_of(folder, "train")] else folder)
    train = Path(values["data.train"])
    # Only in the same folder: a folder in it is probably another data set.
    beside = file_of(train.parent, "eval") if train.is_file() else None
    if "data.eval" not in values and beside is not None:
        values["data.eval"] = str(beside)
    return values
