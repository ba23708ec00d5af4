"""What commands share: resolving a recipe, running it, and printing."""

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
from gradpruner.cli.messages import Spoken, console, speaking
from gradpruner.cli.options import Chosen, in_use, settled, spoken
from gradpruner.cli.suggestions import suggest_after_run
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.common.printing import Printed
    from gradpruner.runs.recipe.recipe import Recipe


def resolve(
    recipe: str | None, chosen: Chosen, out: str | None = None, defaults: dict[str, Any] | None = None
) -> Recipe:
    """Returns the recipe of a file, a built-in name, or a run directory, with all overrides applied.

    Later sources win: the file, `defaults`, the command's options, --set. The recipe of a run directory is
    read only if model or data are left out: a command that gives both says all it wants.

    Raises:
        ConfigError: If there is nothing to run, an option and --set give the same key, or a value is wrong.
    """
    from gradpruner.runs.recipe.recipe import load_recipe

    path: Path | None = None
    if recipe is not None:
        path = recipe_file(recipe)
    elif out is not None and not _is_whole(chosen, defaults or {}):
        stored = Path(out) / "recipe.yaml"
        path = stored if stored.exists() else None
    values = (defaults or {}) | settled(chosen) | ({"out": out} if out is not None else {})
    if path is None and "model.path" not in values:
        raise ConfigError(
            "Nothing to run: give a recipe, or --model with --data and --eval-data (or --task).",
            hint="To try it out, `gradpruner run demo` runs the built-in demo model.",
        )
    return load_recipe(path, chosen.overrides, values, in_use)


def _is_whole(chosen: Chosen, defaults: dict[str, Any]) -> bool:
    """Whether a command says what to run without a recipe."""
    if chosen.values.get("model.path") is not None:
        return True
    data = chosen.values.get("data.train") or chosen.values.get("data.task")
    return "model.path" in defaults and data is not None


def execute(recipe: Recipe, name: str, chosen: Chosen) -> None:
    """Runs a recipe up to the stage `name`; with --dry-run, only shows what would happen."""
    prepare(chosen.quiet)
    if chosen.dry_run:
        from gradpruner.runs.before.preview import dry_run

        found = dry_run(recipe)
        found.facts["warnings"] = [spoken(warning) for warning in found.facts["warnings"]]
        tell(found, found.facts, chosen.as_json)
        if found.error is not None:
            raise found.error
        return
    _run(recipe, "report" if name == "run" else name, chosen.as_json)


def _run(recipe: Recipe, until: str, as_json: bool) -> None:
    from rich.text import Text

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

            print_summary(record, speaking(), decisions=until in ("record", "score", "plan"))
        where = Path(recipe.out) / ("report.html" if until in ("evaluate", "report") else "")
        console().print(Text.assemble((until, "bold"), f" done: {where}"))
        if error is None:
            suggest_after_run(until, record, recipe.out)
    if error is not None:
        raise error


def tell(found: Printed, values: dict[str, Any], as_json: bool) -> None:
    """Prints `found`, or `values` as JSON."""
    if as_json:
        typer.echo(json.dumps(values, indent=2))
    else:
        found.show(console())


def command_line() -> str:
    """Returns the command line as the user typed it."""
    import shlex

    return shlex.join(["gradpruner", *sys.argv[1:]])


def prepare(quiet: bool) -> None:
    """Sets up progress and logging for this process; libraries print errors only."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from gradpruner.common.progress import set_mode

    if quiet:
        set_mode("quiet")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    messages = logging.StreamHandler()
    messages.setFormatter(Spoken())
    logging.basicConfig(handlers=[messages], level=logging.ERROR, force=True)
    logging.getLogger("gradpruner").setLevel(logging.WARNING if quiet else logging.INFO)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
