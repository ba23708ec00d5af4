"""The command-line app: one short function per command, with heavy imports inside the functions."""

from __future__ import annotations

import gc
import io
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from gradpruner.cli import cost, evaluate, export, init, listing, models, serve, shrink, studies
from gradpruner.cli.executing import execute, prepare, resolve
from gradpruner.cli.messages import complain, console, stop
from gradpruner.cli.options import ENDING, KEYS, ROWS, Chosen, JsonOption, takes
from gradpruner.common.errors import GradPrunerError
from gradpruner.common.printing import SUBSTITUTE
from gradpruner.common.version import __version__

EXIT_CODES = (
    "Exit codes: 0 done, 2 command line, recipe or plan, 3 data, 4 model, 5 disk, memory or NaN, "
    "6 damaged or unsafe file, 130 or 143 interrupted."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Make an open LLM about 40 % smaller for your own task.\n\n"
    "GradPruner records the LoRA gradients of a few training steps, scores the layers by them, removes the "
    "least important ones, fine-tunes and evaluates the smaller model, and writes a report.\n\n"
    "Start with `gradpruner run demo`. For your own model and data: `gradpruner init`, or `gradpruner "
    f"shrink` if the model is already tuned for your task.\n\n{EXIT_CODES}",
)


def _stage(name: str, summary: str) -> Callable[..., None]:
    """Returns the command that runs a recipe up to one stage; these commands share all their options."""

    @takes(
        f"recipe {ROWS} out plan name num_prune layer_fraction learning_rate find_lr epochs lora train_limit "
        f"seed overrides trust_remote_code portable_to skip_bad {ENDING}"
    )
    def command(chosen: Chosen) -> None:
        if name == "rate":
            chosen.values[KEYS["find_lr"]] = True
        execute(resolve(chosen.recipe, chosen, chosen.out), name, chosen)

    command.__name__, command.__doc__ = name, summary
    return command


def report(
    folder: Annotated[Path, typer.Argument(help="A run directory, or the folder of a study.")],
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the results as Markdown instead of a summary.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write report.html again and print the results."""
    from gradpruner.common.files import working_in
    from gradpruner.common.json_files import read_object
    from gradpruner.reports.folders import REPORT
    from gradpruner.reports.html import render_html, write_study_report
    from gradpruner.reports.markdown import markdown_table
    from gradpruner.reports.terminal import print_summary
    from gradpruner.runs.folder.directory import unfinished_stages

    files = {path.name for path in folder.glob("*.*")}
    study = "study.json" in files or ("study.yaml" in files and "run.json" not in files)
    kind = "study" if study else "run"
    record = read_object(folder / f"{kind}.json", f"{kind} record", dict[str, Any])
    with working_in(folder):
        path = write_study_report(record, folder) if study else render_html(record, folder / REPORT)
    if not study and (left := unfinished_stages(folder)):
        stages = ", ".join(f"{name} ({state})" for name, state in left.items())
        typer.echo(
            f"warning: this run was stopped before it was finished: {stages}. Figures may be of earlier "
            f"models. Start it again: gradpruner run --out {folder}",
            err=True,
        )
    if as_json:
        typer.echo(json.dumps({"report": str(path)}))
    elif markdown:
        typer.echo(markdown_table(record, folder))
    else:
        print_summary(record, console(), folder)
        typer.echo(f"report: {path}")


def doctor(as_json: JsonOption = False) -> None:
    """Check versions, devices and free disk space."""
    from gradpruner.cli.doctor import diagnose, print_findings

    findings = diagnose()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings, console())
    if findings["problems"]:
        raise typer.Exit(1)


def schema() -> None:
    """Print the JSON schema of recipes, with every key."""
    from gradpruner.runs.recipe.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


for _command in (
    init.init,
    _stage(
        "run",
        "Run a whole recipe and write the report.\n\nBy default, tunes the dense model, prunes and repairs "
        "it, and lets it teach the pruned one. The report compares the two.",
    ),
    shrink.shrink,
    evaluate.evaluate,
    report,
    serve.serve,
    export.export,
    export.push,
    # Single stages of a run.
    _stage(
        "rate",
        "Find a good learning rate.\n\nFine-tunes the dense model briefly at several rates and compares "
        "their losses on held-out training rows.",
    ),
    _stage(
        "record",
        "Record the LoRA gradients of the first training steps.\n\nBy default, the dense model is tuned "
        "first; --set effort=fast records the model as it is.",
    ),
    _stage("score", "Score every layer; records first if needed."),
    _stage(
        "plan",
        "Decide which layers to remove; scores first if needed.\n\nYou can run it again with other --set "
        "plan.* options: the recording and the results of other plans are kept.",
    ),
    models.prune,
    _stage("finetune", "Fine-tune every variant; prunes first if needed."),
    # Model folders.
    models.verify,
    models.diff,
    models.rebuild,
    cost.cost,
    # Studies.
    studies.compare,
    studies.ablate,
    listing.ls,
    schema,
    doctor,
):
    app.command()(_command)


def main() -> None:
    """Runs the command line; an error of ours becomes one clear message and its exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it cannot show must not end a run
        sys.stdout.reconfigure(errors=SUBSTITUTE)
    # Importing the libraries creates a million objects; scanning them for garbage again and again takes a
    # fifth of every start.
    gc.set_threshold(20_000, 10, 10)
    try:
        _run_processes()
    except GradPrunerError as error:
        complain(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)


def _run_app() -> None:
    """Runs the command; a path that the system refuses becomes an error like any other."""
    try:
        app()
    except OSError as error:  # writing our own files raises errors with messages of their own
        from gradpruner.common.files import os_failure

        if error.filename is None:
            raise
        raise os_failure(error) from error


def _run_processes() -> None:
    """Runs the command. Under a launcher the first process runs it and the others help when it asks."""
    from gradpruner.common.world import launched, this_world

    if not launched():
        _run_app()
        return
    from gradpruner.runs.row.together import follow, leading

    if this_world().is_first:
        with leading():
            _run_app()
        return
    prepare(True)
    logging.disable(logging.WARNING)
    try:
        code = follow()
    except GradPrunerError as error:  # the first process prints it
        code = error.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
