"""`gradpruner shrink`: fewer layers for a model that is tuned already, in minutes and without training."""

from __future__ import annotations

from typing import Annotated

import typer

from gradpruner.cli.options import (
    DataOption,
    DryOption,
    EvalOption,
    FolderOption,
    FractionOption,
    JsonOption,
    LoraOption,
    NumPruneOption,
    OutOption,
    QuietOption,
    RateOption,
    SeedOption,
    SetOption,
    SkipOption,
    TaskOption,
    TrainLimitOption,
    TrustOption,
    given,
)
from gradpruner.errors import ConfigError


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
    num_prune: NumPruneOption = None,
    layer_fraction: FractionOption = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            "--max-loss", help="Remove as many as lose at most this share of the score, certified: 0.01."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="How layers are chosen (`gradpruner ls methods`).")
    ] = "gradpruner",
    repair: Annotated[
        str | None,
        typer.Option("--repair", help="auto, least_squares, linear or none.", show_default="auto"),
    ] = None,
    recover: Annotated[
        int | None,
        typer.Option(
            "--recover", metavar="STEPS", help="Train the result for so many steps; none by default."
        ),
    ] = None,
    learning_rate: RateOption = None,
    lora: LoraOption = None,
    train_limit: TrainLimitOption = None,
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

    defaults = shrinking(model, method)
    values = given(
        model=model,
        data=data,
        eval_data=eval_data,
        validation_data=validation_data,
        task=task,
        task_folder=task_folder,
        num_prune=num_prune,
        layer_fraction=layer_fraction,
        max_loss=max_loss,
        repair=repair,
        recover=recover,
        learning_rate=learning_rate,
        lora=lora,
        train_limit=train_limit,
        seed=seed,
        trust_remote_code=trust_remote_code,
        skip_bad=skip_bad,
    )
    recipe = cli.resolve(None, out, overrides, values, defaults)
    if (learning_rate is not None or lora is not None) and not recipe.recover.trains:
        raise ConfigError(
            "--learning-rate, --lora and --full say how the result is trained, and nothing is trained.",
            hint="Give --recover STEPS too, or leave them out.",
        )
    cli.carry_out(recipe, "run", dry_run=dry_run, as_json=as_json, quiet=quiet)
