"""The command line: one short function per command; everything heavy is imported inside."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from gradpruner._version import __version__
from gradpruner.cli import cost, evaluate, export, init, listing, models, serve, shrink, studies
from gradpruner.cli.executing import execute, prepare, resolve
from gradpruner.cli.messages import complain, console, stop
from gradpruner.cli.options import ENDING, KEYS, ROWS, Chosen, JsonOption, takes
from gradpruner.common.errors import GradPrunerError

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


def _stage(name: str, summary: str) -> None:
    """Adds the command for one stage; all share their options, because all read one recipe."""

    @takes(
        f"recipe {ROWS} out plan name num_prune layer_fraction learning_rate find_lr epochs lora train_limit "
        f"seed overrides trust_remote_code portable_to skip_bad {ENDING}"
    )
    def command(chosen: Chosen) -> None:
        if name == "rate":
            chosen.values[KEYS["find_lr"]] = True
        execute(resolve(chosen.recipe, chosen, chosen.out), name, chosen)

    command.__doc__ = summary
    app.command(name)(command)


_stage(
    "run",
    "Do everything and write the report.\n\nBy default the dense model is tuned, pruned and repaired, and "
    "then teaches the pruned one. Both are measured, side by side.",
)
_stage(
    "rate",
    "Find the learning rate.\n\nTunes the dense model briefly at several rates and reads their losses on "
    "held-out training rows.",
)
_stage(
    "record",
    "Record the LoRA gradients of the first steps.\n\nBy default the dense model is tuned first; "
    "--set effort=fast records the model as it is.",
)
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
    from gradpruner.common.files import working_in
    from gradpruner.common.json_files import read_object
    from gradpruner.reports.html import render_html
    from gradpruner.reports.markdown import markdown_table
    from gradpruner.reports.terminal import print_summary

    record = read_object(run_directory / "run.json", "run record", dict[str, Any])
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
    from gradpruner.cli.doctor import diagnose, print_findings

    findings = diagnose()
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


for _command_of in (
    init.init,
    listing.ls,
    shrink.shrink,
    evaluate.evaluate,
    models.prune,
    models.verify,
    models.diff,
    models.rebuild,
    export.export,
    export.push,
    serve.serve,
    cost.cost,
    studies.compare,
    studies.ablate,
):
    app.command()(_command_of)


def main() -> None:
    """Entry point: our errors become one clear message and their exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    # Libraries make a million objects while they are imported; looking through them time and again for
    # garbage takes a fifth of every start.
    gc.set_threshold(20_000, 10, 10)
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
        from gradpruner.common.files import os_failure

        if error.filename is None:
            raise
        raise os_failure(error) from error


def _in_its_world() -> None:
    """Carries out the command; of several processes the first does, and the others help where it says so."""
    from gradpruner.common.world import launched, this_world

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
