"""`gradpruner shrink`: removes layers from an already fine-tuned model, in minutes and without training."""

from __future__ import annotations

from typing import Annotated

import typer

from gradpruner.cli.executing import execute, resolve
from gradpruner.cli.options import ENDING, KEYS, Chosen, Number, Text, takes
from gradpruner.common.errors import ConfigError


@takes(
    "model data eval_data validation_data task task_folder out plan num_prune layer_fraction max_loss method "
    f"repair recover learning_rate lora train_limit seed overrides trust_remote_code skip_bad {ENDING}",
    validation_data=Annotated[
        Text,
        typer.Option("--validation-data", help="Rows the model was not tuned on, to check --max-loss with."),
    ],
    max_loss=Annotated[
        float | None,
        typer.Option(
            "--max-loss",
            help="Remove as many layers as possible, certified to lose at most this fraction of the score, "
            "e.g. 0.01.",
        ),
    ],
    repair=Annotated[
        Text,
        typer.Option(
            "--repair",
            help="How to repair the cuts: auto, layer_wise, least_squares, linear, none.",
            show_default="auto",
        ),
    ],
    recover=Annotated[
        Number,
        typer.Option(
            "--recover",
            metavar="STEPS",
            help="Train the pruned model for this many steps, a pass over the rows: less may do harm. "
            "Default: none.",
        ),
    ],
)
def shrink(
    model: Annotated[str, typer.Argument(help="The tuned model, with adapters merged: folder or hub id.")],
    chosen: Chosen,
    method: Annotated[
        str, typer.Option("--method", help="How to choose the layers (`gradpruner ls methods`).")
    ] = "either",
) -> None:
    """Remove layers from a model you have already tuned.

    Example: gradpruner shrink TUNED --data train.jsonl --eval-data test.jsonl

    Records a few training steps, chooses layers, removes them, repairs the model by refitting one linear in
    each layer behind the first cut on your rows, and evaluates both models. The result is a plain model
    folder in the run directory: variants/<method>/pruned, or variants/<method>/model with --recover.
    """
    from gradpruner.runs.recipe.recipe import shrinking

    recipe = resolve(None, chosen, chosen.out, shrinking(model, method))
    if {KEYS["learning_rate"], KEYS["lora"]} & set(chosen.values) and not recipe.recover.trains:
        raise ConfigError(
            "--learning-rate, --lora and --full say how to train the pruned model, but nothing is trained.",
            hint="Add --recover STEPS, or leave them out.",
        )
    execute(recipe, "run", chosen)
