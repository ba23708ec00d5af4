"""`gradpruner evaluate`: evaluates a model folder on a task, or all variants of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.bundled import recipe_file
from gradpruner.cli.executing import execute, prepare, resolve
from gradpruner.cli.messages import console
from gradpruner.cli.options import ENDING, KEYS, TUNING, Chosen, Number, Text, takes
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.common.world import World
    from gradpruner.data.examples import Example, ExampleSet
    from gradpruner.evaluation.quality import Evaluation
    from gradpruner.runs.recipe.recipe import Recipe

SCORES, ANSWERS = "evaluation.json", "examples.jsonl"


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
    prepare(chosen.quiet)
    found = _evaluate_folder(what, chosen, (endpoint, served_name))
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


def _evaluate_folder(what: str, chosen: Chosen, server: tuple[str | None, str | None]) -> dict[str, Any]:
    """Evaluates a model folder, or the `server` that serves it (its address and the model's name there)."""
    from gradpruner.common.files import LOCK_FILE, working_in

    rows = chosen.values.get("data.eval")
    # A recipe must name data, even when only --lm-eval is asked for; "-" is never read.
    stand_in = {} if "data.task" in chosen.values else {"data.train": rows or "-", "data.eval": rows or "-"}
    recipe = resolve(None, chosen, defaults={"model.path": what, **stand_in})
    results = Path(chosen.out) if chosen.out else None
    in_a_run = results is not None and not chosen.dry_run and (results / LOCK_FILE).exists()
    with working_in(results) if results is not None and in_a_run else nullcontext():
        return _measure(recipe, chosen, server, results)


def _measure(
    recipe: Recipe, chosen: Chosen, server: tuple[str | None, str | None], out: Path | None
) -> dict[str, Any]:
    """Evaluates one model folder by the recipe's `evaluate` section; returns what is shown."""
    from gradpruner.common.json_files import write_json
    from gradpruner.common.provenance import provenance
    from gradpruner.evaluation.endpoint import Endpoint
    from gradpruner.models.folder import locate_model
    from gradpruner.models.loading import check_loadable
    from gradpruner.runs.job.evaluation_data import (
        asked_of_harness,
        check_evaluation,
        load_split,
        metrics_of,
        tokenizer_of,
    )
    from gradpruner.runs.row.together import jointly

    options, choice, endpoint = recipe.evaluate, recipe.model, server[0]
    measures_task = bool({"data.task", "data.eval"} & set(chosen.values))
    check_evaluation(recipe)
    folder = locate_model(choice.path)
    if endpoint is None:  # with a server, only the tokenizer is read from the folder
        check_loadable(folder, choice.trust_remote_code)
    tokenizer = tokenizer_of(recipe, folder)
    rows = load_split(recipe, "eval", tokenizer) if measures_task else None
    found: dict[str, Any] = {"model": str(folder), "endpoint": endpoint}
    if rows is not None:
        found |= {"source": rows.source, "format": rows.format, "rows": len(rows), "sha256": rows.sha256}
        found |= {"rows_dropped": rows.num_dropped, "notes": list(rows.notes)}
        found["metrics_asked"] = list(metrics_of(recipe))
    if endpoint is not None and options.lm_eval:
        raise ConfigError("--lm-eval loads the model itself, so it cannot be combined with --endpoint.")
    if chosen.dry_run:
        return found
    journal = _journal(out, folder, recipe, server, rows) if out and rows else None
    if rows is not None:
        if endpoint is None:
            model, result = jointly(measure_folder, recipe, folder, rows.examples, journal)
        else:
            answering = Endpoint(endpoint, server[1], options.batch_size)
            result = _asked(recipe, answering, tokenizer, rows.examples, journal)
        found |= result.summary(ANSWERS if out else None)
        if out:
            result.write_examples(out / ANSWERS)
    elif options.lm_eval:
        model = recipe.model.load(folder)
    if options.lm_eval:
        found["lm_eval"] = asked_of_harness(recipe, model, tokenizer)
    found["provenance"] = provenance(recipe.seed)
    if out:
        write_json(out / SCORES, found)
        for part in out.glob(f"{ANSWERS}.*.part*"):
            part.unlink()
    return found


def measure_folder(
    recipe: Recipe, folder: Path, rows: Sequence[Example], journal: Path | None
) -> tuple[Any, Evaluation]:
    """Loads and evaluates the model of a folder; each process evaluates its share of the rows."""
    from gradpruner.common.world import this_world
    from gradpruner.runs.job.evaluation_data import tokenizer_of

    tokenizer = tokenizer_of(recipe, folder)
    model = recipe.model.load(folder)
    return model, _asked(recipe, model, tokenizer, rows, journal, this_world())


def _asked(
    recipe: Recipe,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Example],
    journal: Path | None,
    world: World | None = None,
) -> Evaluation:
    """Evaluates a model, or an `Endpoint`, on rows with the recipe's options."""
    from gradpruner.evaluation.quality import evaluate
    from gradpruner.runs.job.evaluation_data import metrics_of, options_of

    options = options_of(recipe, metrics_of(recipe), recipe.data.max_length)
    return evaluate(model, tokenizer, rows, options, journal=journal, world=world)


def _journal(
    out: Path, folder: Path, recipe: Recipe, server: tuple[str | None, str | None], rows: ExampleSet
) -> Path:
    """Returns the file that keeps the answers so far, so that an interrupted evaluation can resume.

    Its name is a hash of model, server, rows and options: another evaluation never reuses the answers.
    """
    from gradpruner.common.provenance import sha256_json

    files = sorted(path for path in folder.iterdir() if path.is_file())
    asked = {
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "model": recipe.model.model_dump() | {"path": str(folder.resolve())},
        "server": server,
        "rows": [rows.sha256, rows.format, [example.id for example in rows.examples]],
        "evaluate": recipe.evaluate.model_dump(),
        "max_length": recipe.data.max_length,
    }
    return out / f"{ANSWERS}.{sha256_json(asked)[:12]}.part"


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
