"""The command line: one short function per command; everything heavy is imported inside."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from gradpruner._version import __version__
from gradpruner.cli import options
from gradpruner.cli.listing import RECIPES, recipe_names
from gradpruner.cli.messages import complain, stop, unusable
from gradpruner.cli.options import JsonOption, given, settled
from gradpruner.cli.suggestions import suggest_after_run
from gradpruner.errors import ConfigError, GradPrunerError

if TYPE_CHECKING:
    from rich.console import Console

    from gradpruner.printing import Printed
    from gradpruner.runs.recipe import Recipe

EXIT_CODES = (
    "Exit codes: 0 done, 2 command line, recipe or plan, 3 data, 4 model, 5 disk, memory or NaN, "
    "6 damaged or unsafe file, 130 or 143 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make an open LLM about 40 % smaller for your own task: record early LoRA gradients, score "
    f"layers, prune and merge, fine-tune, evaluate, report.\n\n{EXIT_CODES}",
)


def resolve(
    recipe: str | None,
    out: str | None,
    overrides: list[str] | None,
    values: dict[str, Any],
    defaults: dict[str, Any] | None = None,
) -> Recipe:
    """The recipe from a file, a name, or the run directory that holds one, with all overrides.

    Args:
        recipe: File or name.
        out: Run directory.
        overrides: What --set says; goes before everything else.
        values: Recipe keys set by options of their own (`options.given`).
        defaults: Recipe keys the command itself sets where nothing else does.

    Raises:
        ConfigError: If nothing says what to run, an option and --set say the same key, or a value is wrong.
    """
    from gradpruner.runs.recipe import load_recipe

    path: Path | None = None
    if recipe is not None:
        path = Path(recipe)
        if not path.is_file() and not recipe.endswith((".yaml", ".yml")):
            path = RECIPES / f"{recipe}.yaml"
            if not path.exists():
                _unknown_recipe(recipe)
    elif out is not None and values.get("model.path") is None:
        stored = Path(out) / "recipe.yaml"
        path = stored if stored.exists() else None
    chosen = (defaults or {}) | settled(values, overrides or ()) | ({"out": out} if out is not None else {})
    if path is None and "model.path" not in chosen:
        raise ConfigError(
            "Nothing to run: give a recipe, or --model with --data and --eval-data (or --task).",
            hint="`gradpruner run demo` runs the embedded miniature.",
        )
    return load_recipe(path, tuple(overrides or ()), chosen)


def _unknown_recipe(name: str) -> NoReturn:
    from gradpruner.registry import suggest

    names = recipe_names()
    if "/" in name and not any(known.startswith(name.split("/")[0]) for known in names):
        raise ConfigError(
            f"There is no recipe, model folder or other file at {name}.",
            hint=f"Recipes that come along: {', '.join(names)}.",
        )
    raise ConfigError(
        f"There is no recipe file or built-in recipe '{name}'.{suggest(name, names)}",
        hint=f"Built in: {', '.join(names)}.",
    )


def _stage(name: str, summary: str) -> None:
    """Adds the command for one stage; all share their options, because all read one recipe."""

    def command(
        recipe: options.RecipeArgument = None,
        model: options.ModelOption = None,
        data: options.DataOption = None,
        eval_data: options.EvalOption = None,
        task: options.TaskOption = None,
        task_folder: options.FolderOption = None,
        out: options.OutOption = None,
        plan: options.PlanOption = None,
        name_of_plan: options.NameOption = None,
        num_prune: options.NumPruneOption = None,
        layer_fraction: options.FractionOption = None,
        learning_rate: options.RateOption = None,
        find_lr: options.FindRateOption = False,
        epochs: options.EpochsOption = None,
        lora: options.LoraOption = None,
        train_limit: options.TrainLimitOption = None,
        seed: options.SeedOption = None,
        overrides: options.SetOption = None,
        trust_remote_code: options.TrustOption = False,
        portable_to: options.PortableOption = None,
        skip_bad: options.SkipOption = False,
        dry_run: options.DryOption = False,
        as_json: options.JsonOption = False,
        quiet: options.QuietOption = False,
    ) -> None:
        values = given(
            model=model,
            data=data,
            eval_data=eval_data,
            task=task,
            task_folder=task_folder,
            plan=plan,
            name=name_of_plan,
            num_prune=num_prune,
            layer_fraction=layer_fraction,
            learning_rate=learning_rate,
            find_lr=find_lr or name == "rate",
            epochs=epochs,
            lora=lora,
            train_limit=train_limit,
            seed=seed,
            trust_remote_code=trust_remote_code,
            skip_bad=skip_bad,
            portable_to=portable_to.split(",") if portable_to else None,
        )
        resolved = resolve(recipe, out, overrides, values)
        carry_out(resolved, name, dry_run=dry_run, as_json=as_json, quiet=quiet)

    command.__doc__ = summary
    app.command(name)(command)


def carry_out(recipe: Recipe, name: str, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Does a recipe up to the stage `name`, or says what it would do."""
    prepare(quiet)
    if dry_run:
        from gradpruner.runs.preview import dry_run as examined

        found = examined(recipe)
        tell(found, found.facts, as_json)
        if found.error is not None:
            raise found.error
        return
    _run(recipe, "report" if name == "run" else name, as_json)


def _run(recipe: Recipe, until: str, as_json: bool) -> None:
    from gradpruner.runs.pipeline import run

    error: GradPrunerError | None = None
    path = Path(recipe.out) / "run.json"
    before = _written(path)
    try:
        record = run(recipe, until=until, command=command_line())
    except GradPrunerError as failure:
        # When only some rows failed, the record of the others was written.
        if _written(path) == before or not _has_good_row(path):
            raise
        record, error = json.loads(path.read_text(encoding="utf-8")), failure
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    else:
        _print_record(record, until)
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


def _print_record(record: dict[str, Any], until: str) -> None:
    if until == "rate":
        found = record["learning_rate"]
        console().print(f"learning rate {found['value']:g}: {found['source']}", highlight=False)
        return
    from gradpruner.reports import print_summary

    print_summary(record, console())


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _has_good_row(path: Path) -> bool:
    rows = json.loads(path.read_text(encoding="utf-8"))["variants"].values()
    return not all(row["error"] for row in rows)


def console() -> Console:
    """Standard output; wide enough for the tables where nothing says how wide it is."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 110)


def command_line() -> str:
    """How the user called this process."""
    import shlex

    return shlex.join(["gradpruner", *sys.argv[1:]])


def prepare(quiet: bool) -> None:
    """Progress and log lines of the process; libraries speak only when something is wrong."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from gradpruner.progress import set_mode

    if quiet:
        set_mode("quiet")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s", level=logging.ERROR, force=True)
    logging.getLogger("gradpruner").setLevel(logging.WARNING if quiet else logging.INFO)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


_stage(
    "run",
    "Do everything and write the report.\n\nDense, pruned + merged and pruned without merging, side by side.",
)
_stage(
    "rate",
    "Find the learning rate.\n\nTunes the dense model briefly at several rates and reads their losses on "
    "held-out training rows.",
)
_stage("record", "Record the LoRA gradients of the first steps.")
_stage("score", "Record if needed, then score every layer.")
_stage(
    "plan",
    "Score if needed, then decide which layers go.\n\n"
    "Run it again with other --set plan.* options: the recording and all results of other plans are kept.",
)
_stage("finetune", "Prune if needed, then fine-tune every variant.")


@app.command()
def report(
    run_directory: Annotated[Path, typer.Argument(help="A run directory with run.json.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Render report.html again from run.json."""
    from gradpruner.files import working_in
    from gradpruner.reports import markdown_table, print_summary, render_html
    from gradpruner.reports.record import read_record

    record = read_record(run_directory / "run.json", "run record")
    with working_in(run_directory):
        path = render_html(record, run_directory / "report.html")
    if as_json:
        typer.echo(json.dumps({"report": str(path)}))
    elif markdown:
        typer.echo(markdown_table(record, run_directory))
    else:
        print_summary(record, console(), run_directory)
        typer.echo(f"report: {path}")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Versions, devices, free disk: what is missing here."""
    from gradpruner.cli.doctor import examine, print_findings

    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings, console())
    if findings["problems"]:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """The recipe's JSON schema, for editors and scripts."""
    from gradpruner.runs.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show version.")
    ] = False,
) -> None:
    pass


def _add_model_commands() -> None:
    from gradpruner.cli import cost as cli_cost
    from gradpruner.cli import evaluate as cli_evaluate
    from gradpruner.cli import export as cli_export
    from gradpruner.cli import init as cli_init
    from gradpruner.cli import listing as cli_listing
    from gradpruner.cli import models as cli_models
    from gradpruner.cli import shrink as cli_shrink
    from gradpruner.cli import studies as cli_compare

    cli_init.add_to(app)
    cli_listing.add_to(app)
    cli_shrink.add_to(app)
    cli_evaluate.add_to(app)
    cli_models.add_to(app)
    cli_export.add_to(app)
    cli_cost.add_to(app)
    cli_compare.add_to(app)


_add_model_commands()


def main() -> None:
    """Entry point: our errors become one clear message and their exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        _in_its_world()
    except GradPrunerError as error:
        complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)


def _command() -> None:
    """The command; a path somebody gave that the system refuses is an error like others."""
    try:
        app()
    except OSError as error:  # what we write ourselves has its own messages
        if error.filename is None:
            raise
        raise unusable(error) from error


def _in_its_world() -> None:
    """Carries out the command; of several processes the first does, and the others help where it says so."""
    from gradpruner.world import launched, this_world

    if not launched():
        _command()
        return
    from gradpruner.runs.together import follow, leading

    if this_world().is_first:
        with leading():
            _command()
        return
    prepare(True)
    logging.disable(logging.WARNING)
    try:
        code = follow()
    except GradPrunerError as error:  # the first process says it
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
