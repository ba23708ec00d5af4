"""evaluate_folder: the model in a folder, or the server that serves it, measured as a recipe says."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from gradpruner.common.errors import ConfigError, IntegrityError
from gradpruner.common.files import LOCK_FILE, working_in
from gradpruner.common.json_files import read_object, write_json
from gradpruner.common.provenance import provenance, sha256_json
from gradpruner.common.world import World, this_world
from gradpruner.data.examples import Example, ExampleSet
from gradpruner.evaluation.endpoint import Endpoint
from gradpruner.evaluation.outputs import read_examples
from gradpruner.evaluation.quality import Evaluation, evaluate
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import check_loadable
from gradpruner.runs.job.evaluation_data import (
    asked_of_harness,
    check_evaluation,
    load_split,
    metrics_of,
    options_of,
    tokenizer_of,
    with_metrics,
)
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.row.together import jointly

SCORES, ANSWERS = "evaluation.json", "examples.jsonl"


class Server(NamedTuple):
    """A server that answers for the model: its address, and the model's name there (None: its only one)."""

    address: str
    served_name: str | None = None


def evaluate_folder(
    recipe: Recipe,
    *,
    asks_rows: bool = True,
    server: Server | None = None,
    out: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Evaluates the model folder `model.path` of a recipe, by its `evaluate` section.

    Args:
        recipe: Says which model, rows and metrics.
        asks_rows: Whether it is measured on the evaluation rows, besides the tasks of lm-eval.
        server: Asked instead of the model in the folder, of which only the tokenizer is read then.
        out: Folder for evaluation.json and examples.jsonl; None writes nothing. An interrupted evaluation
            resumes there.
        dry_run: Only check everything.

    Returns:
        JSON values: what was measured, the `metrics` and the scores of `lm_eval`.

    Raises:
        GradPrunerError: If the recipe, the rows, the model or the server cannot be used.
    """
    results = Path(out) if out is not None else None
    in_a_run = results is not None and not dry_run and (results / LOCK_FILE).exists()
    with working_in(results) if results is not None and in_a_run else nullcontext():
        return _measured(recipe, asks_rows, server, results, dry_run)


def _measured(
    recipe: Recipe, asks_rows: bool, server: Server | None, out: Path | None, dry_run: bool
) -> dict[str, Any]:
    check_evaluation(recipe)
    if recipe.evaluate.also:
        raise ConfigError(
            "evaluate.also names further tasks, and one evaluation of a folder measures one.",
            hint="Call it once per task, with --task and another --out; a run measures evaluate.also.",
        )
    folder = locate_model(recipe.model.path)
    if server is None:
        check_loadable(folder, recipe.model.trust_remote_code)
    tokenizer = tokenizer_of(recipe, folder)
    rows = load_split(recipe, "eval", tokenizer) if asks_rows else None
    recipe = with_metrics(recipe, rows, tokenizer) if rows is not None else recipe
    found: dict[str, Any] = {"model": str(folder), "endpoint": server.address if server else None}
    if rows is not None:
        found |= {"source": rows.source, "format": rows.format, "rows": len(rows), "sha256": rows.sha256}
        found |= {"rows_dropped": rows.num_dropped, "notes": list(rows.notes)}
        found["metrics_asked"] = list(metrics_of(recipe))
    if out is not None:
        _check_folder(out, rows)
    if dry_run:
        return found
    if rows is not None:
        journal = _journal(out, folder, recipe, server, rows) if out else None
        if server is None:
            model, result = jointly(measure_folder, recipe, folder, rows.examples, journal)
        else:
            answering = Endpoint(server.address, server.served_name, recipe.evaluate.batch_size)
            result = _asked(recipe, answering, tokenizer, rows.examples, journal)
        found |= result.summary(ANSWERS if out else None)
        if out:
            result.write_examples(out / ANSWERS)
    elif recipe.evaluate.lm_eval:
        model = recipe.model.load(folder)
    if recipe.evaluate.lm_eval:
        found["lm_eval"] = asked_of_harness(recipe, model, tokenizer)
    found["provenance"] = provenance(recipe.seed)
    if out:
        write_json(out / SCORES, found)
        for part in out.glob(f"{ANSWERS}.*.part*"):
            part.unlink()
    return found


def _check_folder(out: Path, rows: ExampleSet | None) -> None:
    """Refuses to replace files that no evaluation wrote, or that the rows come from."""
    given = Path(rows.source.partition("#")[0]).resolve() if rows is not None else None
    for path in (out / SCORES, out / ANSWERS):
        if not path.is_file():
            continue
        try:
            if path.name == SCORES:
                ours = "provenance" in read_object(path, "evaluation", dict[str, Any])
            else:
                ours = path.stat().st_size == 0 or bool(read_examples(path))
        except IntegrityError:
            ours = False
        if not ours or path.resolve() == given:
            raise ConfigError(
                f"{path} would be replaced, and it "
                + ("holds the rows." if path.resolve() == given else "was not written by an evaluation."),
                hint="Choose another folder with --out.",
            )


def measure_folder(
    recipe: Recipe, folder: Path, rows: Sequence[Example], journal: Path | None
) -> tuple[Any, Evaluation]:
    """Loads and evaluates the model of a folder; each process evaluates its share of the rows."""
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
    options = options_of(recipe, metrics_of(recipe), recipe.data.max_length)
    return evaluate(model, tokenizer, rows, options, journal=journal, world=world)


def _journal(out: Path, folder: Path, recipe: Recipe, server: Server | None, rows: ExampleSet) -> Path:
    """Returns the file that keeps the answers so far, so that an interrupted evaluation can resume.

    Its name is a hash of model, server, rows and options: another evaluation never reuses the answers.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file())
    asked = {
        "files": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "model": recipe.model.model_dump() | {"path": str(folder.resolve())},
        "server": list(server or (None, None)),
        "rows": [rows.sha256, rows.format, [example.id for example in rows.examples]],
        "evaluate": recipe.evaluate.model_dump(),
        "max_length": recipe.data.max_length,
    }
    return out / f"{ANSWERS}.{sha256_json(asked)[:12]}.part"
