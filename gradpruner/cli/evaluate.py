"""`gradpruner evaluate`: evaluates a model folder on a task, or all variants of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gradpruner.cli.bundled import recipe_file
from gradpruner.cli.executing import execute, prepare, resolve
from gradpruner.cli.messages import console
from gradpruner.cli.options import ENDING, KEYS, TUNING, Chosen, Number, Text, takes
from gradpruner.common.errors import ConfigError

_MEASURED = {"data.task", "data.eval", "evaluate.lm_eval"}
_OF_A_RUN = f"model data plan num_prune layer_fraction {TUNING}"


@takes(
    f"what task task_folder eval_data limit lm_eval lm_eval_folder endpoint served_name out {_OF_A_RUN} seed "
    f"overrides skip_bad trust_remote_code {ENDING}",
    task=Annotated[Text, typer.Option("--task", help="A named task (`gradpruner ls tasks`).")],
    eval_data=Annotated[
        Text,
        typer.Option("--eval-data", help="Your own rows, instead of --task: file, folder or hub dataset."),
    ],
    limit=Annotated[Number, typer.Option("--limit", help="Use only this many rows, drawn at random.")],
    lm_eval=Annotated[
        Text,
        typer.Option("--lm-eval", metavar="TASKS", help="Tasks of lm-evaluation-harness, comma-separated."),
    ],
    lm_eval_folder=Annotated[
        Text, typer.Option("--lm-eval-folder", help="Folder with your own lm-eval task files.")
    ],
    out=Annotated[
        Text, typer.Option("--out", help="Run directory. For a model folder: where to write the results.")
    ],
    model=Annotated[Text, typer.Option("--model", help="For a run: model folder or hub id.")],
    data=Annotated[Text, typer.Option("--data", help="For a run: training data.")],
    plan=Annotated[Text, typer.Option("--plan", help="For a run: plan file.")],
)
def evaluate(
    chosen: Chosen,
    what: Annotated[
        str | None, typer.Argument(help="A model folder, or a recipe to run up to its evaluation.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Ask a server that serves this model, e.g. vLLM at http://localhost:8000/v1.",
        ),
    ] = None,
    served_name: Annotated[str | None, typer.Option(help="Name of the model on the server.")] = None,
) -> None:
    """Evaluate a model folder on a task or on your own rows.

    Example: gradpruner evaluate MODEL --task arc_easy

    --lm-eval adds tasks of lm-evaluation-harness. With a recipe or --out RUN instead of a model folder,
    fine-tunes the variants of the run if needed and evaluates each of them.
    """
    from gradpruner.models.checking import is_model_folder

    is_model = what is not None and (is_model_folder(what) or _is_missing_model(what, chosen))
    if what is None or not is_model:
        if endpoint is not None or served_name is not None:
            raise ConfigError(
                "--endpoint and --served-name need the folder of the served model, for its tokenizer."
            )
        execute(resolve(what, chosen, chosen.out), "evaluate", chosen)
        return
    of_a_run = {KEYS[name] for name in _OF_A_RUN.split()}
    if strange := [key for key in chosen.values if key in of_a_run]:
        raise ConfigError(
            f"Options that set {', '.join(strange)} belong to a run; a model folder is only evaluated.",
            hint="Leave them out, or give a recipe or --out RUN instead of the model folder.",
        )
    if not _MEASURED & set(chosen.values):
        raise ConfigError(f"Nothing to evaluate {what} on.", hint="Give --task, --eval-data or --lm-eval.")
    if served_name is not None and endpoint is None:
        raise ConfigError(
            f"--served-name {served_name} names a model on a server, and no server is given.",
            hint="Add --endpoint URL, or leave the name out to evaluate the folder itself.",
        )
    prepare(chosen.quiet)
    found = _evaluate_folder(what, chosen, endpoint, served_name)
    if chosen.as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def _is_missing_model(what: str, chosen: Chosen) -> bool:
    """Whether something that is no recipe is to be measured, so that it was meant to be a model."""
    try:
        recipe_file(what)
    except ConfigError:
        return bool(_MEASURED & set(chosen.values))
    return False


def _evaluate_folder(
    what: str, chosen: Chosen, endpoint: str | None, served_name: str | None
) -> dict[str, Any]:
    """Evaluates a model folder, or the server at `endpoint` that serves it."""
    from gradpruner.runs.evaluating import Server, evaluate_folder

    rows = chosen.values.get("data.eval")
    # A recipe must name data, even when only --lm-eval is asked for; "-" is never read.
    stand_in = {} if "data.task" in chosen.values else {"data.train": rows or "-", "data.eval": rows or "-"}
    recipe = resolve(None, chosen, defaults={"model.path": what, **stand_in})
    if endpoint is not None and recipe.evaluate.lm_eval:
        raise ConfigError("--lm-eval loads the model itself, so it cannot be combined with --endpoint.")
    asks_rows = bool({"data.task", "data.eval"} & set(chosen.values))
    server = Server(endpoint, served_name) if endpoint is not None else None
    return evaluate_folder(recipe, asks_rows=asks_rows, server=server, out=chosen.out, dry_run=chosen.dry_run)


def _show(found: Mapping[str, Any]) -> None:
    from rich.table import Table

    from gradpruner.common.printing import interval, percent
    from gradpruner.reports.fields import FEW_EXAMPLES
    from gradpruner.reports.view import metric_label

    screen = console()
    if "metrics_asked" in found and "metrics" not in found:
        screen.print(f"{found['rows']} rows of {found['source']}: {', '.join(found['metrics_asked'])}")
    for note in found.get("notes", ()):
        screen.print(note, highlight=False, markup=False)
    table = Table("Metric", "Value", "95% interval or ± standard error", "n")
    for name, entry in found.get("metrics", {}).items():
        mark = "*" if entry["n"] < FEW_EXAMPLES else ""
        shown = interval(entry["low"], entry["high"])
        table.add_row(metric_label(name), percent(entry["value"]), shown, f"{entry['n']}{mark}")
    for task, scored in found.get("lm_eval", {}).get("tasks", {}).items():
        for name, entry in scored["metrics"].items():
            error = f"± {entry['stderr']:.4f}" if entry["stderr"] is not None else ""
            table.add_row(f"{task}: {name} (lm-eval)", f"{entry['value']:.4f}", error, str(scored["n"]))
    if table.rows:
        screen.print(table)
    if any(entry["n"] < FEW_EXAMPLES for entry in found.get("metrics", {}).values()):
        screen.print(f"* fewer than {FEW_EXAMPLES} examples: a difference of several points may be chance")
