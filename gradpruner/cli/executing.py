"""What commands share: finding a recipe, carrying it out, and printing."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gradpruner.cli.bundled import recipe_file
from gradpruner.cli.messages import console
from gradpruner.cli.options import Chosen, settled
from gradpruner.cli.suggestions import suggest_after_run
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.common.printing import Printed
    from gradpruner.runs.recipe import Recipe


def resolve(
    recipe: str | None, chosen: Chosen, out: str | None = None, defaults: dict[str, Any] | None = None
) -> Recipe:
    """The recipe from a file, a name, or the run directory that holds one, with all overrides.

    Keys are taken from the file, then from `defaults` of the command, from its options, and from --set.

    Raises:
        ConfigError: If nothing says what to run, an option and --set say the same key, or a value is wrong.
    """
    from gradpruner.runs.recipe import load_recipe

    path: Path | None = None
    if recipe is not None:
        path = recipe_file(recipe)
    elif out is not None and chosen.values.get("model.path") is None:
        stored = Path(out) / "recipe.yaml"
        path = stored if stored.exists() else None
    values = (defaults or {}) | settled(chosen) | ({"out": out} if out is not None else {})
    if path is None and "model.path" not in values:
        raise ConfigError(
            "Nothing to run: give a recipe, or --model with --data and --eval-data (or --task).",
            hint="`gradpruner run demo` runs the embedded miniature.",
        )
    return load_recipe(path, chosen.overrides, values)


def execute(recipe: Recipe, name: str, chosen: Chosen) -> None:
    """Does a recipe up to the stage `name`, or says what it would do."""
    prepare(chosen.quiet)
    if chosen.dry_run:
        from gradpruner.runs.preview import dry_run as examined

        found = examined(recipe)
        tell(found, found.facts, chosen.as_json)
        if found.error is not None:
            raise found.error
        return
    _run(recipe, "report" if name == "run" else name, chosen.as_json)


def _run(recipe: Recipe, until: str, as_json: bool) -> None:
    from gradpruner.runs.pipeline import run_rows

    record, error = run_rows(recipe, until=until, command=command_line())
    if error is not None and all(row["error"] for row in record["variants"].values()):
        raise error
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        if until == "rate":
            found = record["learning_rate"]
            console().print(f"learning rate {found['value']:g}: {found['source']}", highlight=False)
        else:
            from gradpruner.reports.terminal import print_summary

            print_summary(record, console())
        where = Path(recipe.out) / ("report.html" if until in ("evaluate", "report") else "")
        console().print(f"[bold]{until}[/bold] done: {where}", highlight=False)
        if error is None:
            suggest_after_run(until, record, recipe.out)
    if error is not None:
        raise error


def tell(found: Printed, values: dict[str, Any], as_json: bool) -> None:
    """Prints a result, or its values as JSON."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        found.show(console())


def command_line() -> str:
    """How the user called this process."""
    import shlex

    return shlex.join(["gradpruner", *sys.argv[1:]])


def prepare(quiet: bool) -> None:
    """Progress and log lines of the process; libraries speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from gradpruner.common.progress import set_mode

    if quiet:
        set_mode("quiet")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", level=logging.ERROR, force=True)
    logging.getLogger("gradpruner").setLevel(logging.WARNING if quiet else logging.INFO)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
