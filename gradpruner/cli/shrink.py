"""`gradpruner shrink`: fewer layers for a model that is tuned already, in minutes and without training."""

from __future__ import annotations

from typing import Annotated

import typer

from gradpruner.cli.executing import execute, resolve
from gradpruner.cli.options import ENDING, KEYS, Chosen, Number, Text, takes
from gradpruner.common.errors import ConfigError


@takes(
    "model data eval_data validation_data task task_folder out num_prune layer_fraction max_loss method "
    f"repair recover learning_rate lora train_limit seed overrides trust_remote_code skip_bad {ENDING}",
    validation_data=Annotated[
        Text, typer.Option("--validation-data", help="Rows for --max-loss that the model was not tuned on.")
    ],
    max_loss=Annotated[
        float | None,
        typer.Option(
            "--max-loss", help="Remove as many as lose at most this share of the score, certified: 0.01."
        ),
    ],
    repair=Annotated[
        Text,
        typer.Option(
            "--repair", help="auto, layer_wise, least_squares, linear or none.", show_default="auto"
        ),
    ],
    recover=Annotated[
        Number,
        typer.Option(
            "--recover", metavar="STEPS", help="Train the result for so many steps; none by default."
        ),
    ],
)
def shrink(
    model: Annotated[str, typer.Argument(help="The tuned model: a folder or hub id, adapters merged.")],
    chosen: Chosen,
    method: Annotated[
        str, typer.Option("--method", help="How layers are chosen (`gradpruner ls methods`).")
    ] = "gradpruner",
) -> None:
    """Remove layers of a tuned model: gradpruner shrink TUNED --data train.jsonl --eval-data test.jsonl.

    Records a few steps, chooses layers, removes them, refits the linear before every cut on your rows, and
    measures both models. The result is a plain model folder: variants/<method>/pruned in the run directory,
    with --recover variants/<method>/model.
    """
    from gradpruner.runs.recipe import shrinking

    recipe = resolve(None, chosen, chosen.out, shrinking(model, method))
    if {KEYS["learning_rate"], KEYS["lora"]} & set(chosen.values) and not recipe.recover.trains:
        raise ConfigError(
            "--learning-rate, --lora and --full say how the result is trained, and nothing is trained.",
            hint="Give --recover STEPS too, or leave them out.",
        )
    execute(recipe, "run", chosen)
