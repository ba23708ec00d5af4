"""`gradpruner shrink`: fewer layers for a model that is tuned already, in minutes and without training."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gradpruner.cli.options import (
    DataOption,
    DryOption,
    EvalOption,
    FolderOption,
    JsonOption,
    OutOption,
    QuietOption,
    SeedOption,
    SetOption,
    SkipOption,
    TaskOption,
    TrustOption,
)


def add_to(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(shrink)


def shrink(
    model: Annotated[str, typer.Argument(help="The tuned model: a folder or hub id, adapters merged.")],
    data: DataOption = None,
    eval_data: EvalOption = None,
    validation_data: Annotated[
        str | None,
        typer.Option("--validation-data", help="Rows for --max-loss that the model was not tuned on."),
    ] = None,
    task: TaskOption = None,
    task_folder: FolderOption = None,
    out: OutOption = None,
    num_prune: Annotated[int | None, typer.Option("--num-prune", help="Layers to remove.")] = None,
    layer_fraction: Annotated[
        float | None, typer.Option("--layer-fraction", help="Share of the layers to remove; 0.4 by default.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss", help="Remove as many as lose at most this share of the score, certified: 0.01."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="How layers are chosen (`gradpruner ls methods`).")
    ] = "gradpruner",
    repair: Annotated[str, typer.Option("--repair", help="auto, least_squares, linear or none.")] = "auto",
    recover: Annotated[
        int | None,
        typer.Option(
            "--recover", metavar="STEPS", help="Train the result for so many steps; none by default."
        ),
    ] = None,
    seed: SeedOption = None,
    overrides: SetOption = None,
    trust_remote_code: TrustOption = False,
    skip_bad: SkipOption = False,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Remove layers of a tuned model: gradpruner shrink TUNED --data train.jsonl --eval-data test.jsonl.

    Records a few steps, chooses layers, removes them, refits the linear before every cut on your rows, and
    measures both models. The result is a plain model folder: variants/<method>/pruned in the run directory,
    with --recover variants/<method>/model.
    """
    from gradpruner.cli import main as cli
    from gradpruner.runs.recipe import shrinking

    values: dict[str, Any] = shrinking(model, method, repair) | {
        "data.train": data,
        "data.eval": eval_data,
        "data.validation": validation_data,
        "data.task": task,
        "data.folder": task_folder,
        "plan.num_prune": num_prune,
        "plan.layer_fraction": layer_fraction,
        "plan.max_loss": max_loss,
        "recover.steps": recover,
        "seed": seed,
        "model.trust_remote_code": trust_remote_code or None,
        "data.skip_bad": skip_bad or None,
    }
    recipe = cli.resolve(None, out, overrides, values)
    cli.carry_out(recipe, "run", dry_run=dry_run, as_json=as_json, quiet=quiet)
