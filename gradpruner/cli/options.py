"""Options several commands share, so that they are called and explained alike, and the recipe key of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gradpruner.errors import ConfigError

KEYS = {
    "model": "model.path",
    "trust_remote_code": "model.trust_remote_code",
    "data": "data.train",
    "eval_data": "data.eval",
    "validation_data": "data.validation",
    "task": "data.task",
    "task_folder": "data.folder",
    "train_limit": "data.train_limit",
    "limit": "data.eval_limit",
    "skip_bad": "data.skip_bad",
    "plan": "plan.file",
    "name": "plan.name",
    "num_prune": "plan.num_prune",
    "layer_fraction": "plan.layer_fraction",
    "max_loss": "plan.max_loss",
    "repair": "plan.repair",
    "portable_to": "plan.portable_to",
    "unit": "plan.unit",
    "find_lr": "find_rate",
    "learning_rate": "finetune.learning_rate",
    "epochs": "finetune.epochs",
    "lora": "finetune.mode",
    "recover": "recover.steps",
    "lm_eval": "evaluate.lm_eval",
    "lm_eval_folder": "evaluate.lm_eval_folder",
    "seed": "seed",
}
"""Option -> the recipe key it sets."""
_BUDGETS = (
    "plan.num_prune",
    "plan.layer_fraction",
    "plan.parameter_fraction",
    "plan.layers",
    "plan.max_loss",
)


def given(**options: Any) -> dict[str, Any]:
    """The recipe keys of those options that were given."""
    if options.get("lora") is not None:
        options["lora"] = "lora" if options["lora"] else "full"
    return {KEYS[name]: value for name, value in options.items() if value is not None and value is not False}


def settled(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The keys that options set, and those of a recipe that they exclude, as null.

    Raises:
        ConfigError: If --set sets one of them too.
    """
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key in values:
            flag = next(name for name, own in KEYS.items() if own == key).replace("_", "-")
            raise ConfigError(f"--{flag} and --set {item} both set {key}.", hint="Give one of them.")
    gone: tuple[str, ...] = ()
    rows = {"data.train", "data.eval"} & set(values)
    if "data.task" in values and not rows:
        gone = ("data.train", "data.eval")
    elif rows and "data.task" not in values:
        gone = ("data.task", "data.folder")
    if set(_BUDGETS) & set(values):
        gone += _BUDGETS
    return dict.fromkeys(gone) | values


RecipeArgument = Annotated[
    str | None, typer.Argument(help="Recipe: a YAML file or the name of one (`gradpruner ls recipes`).")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Model folder or hub id.")]
DataOption = Annotated[
    str | None, typer.Option("--data", help="Training data: file, folder or hub dataset; #N samples.")
]
EvalOption = Annotated[str | None, typer.Option("--eval-data", help="Evaluation data.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="A named task (`gradpruner ls tasks`) instead of files.")
]
FolderOption = Annotated[
    str | None, typer.Option("--task-folder", help="Local folder with the named task's splits.")
]
OutOption = Annotated[str | None, typer.Option("--out", help="Run directory.")]
PlanOption = Annotated[
    str | None, typer.Option("--plan", help="A plan file, perhaps edited, instead of the scores.")
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="What this plan is called in the run directory: variants/<row>@NAME."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of everything random.")]
RateOption = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Peak learning rate; by the model's size if not given."),
]
FindRateOption = Annotated[
    bool, typer.Option("--find-lr", help="Try learning rates on held-out training rows first.")
]
EpochsOption = Annotated[float | None, typer.Option("--epochs", help="Passes over the training rows.")]
NumPruneOption = Annotated[int | None, typer.Option("--num-prune", help="Layers to remove.")]
FractionOption = Annotated[
    float | None, typer.Option("--layer-fraction", help="Share of the layers to remove; 0.4 by default.")
]
LoraOption = Annotated[bool | None, typer.Option("--lora/--full", help="Train adapters, or every weight.")]
TrainLimitOption = Annotated[
    int | None, typer.Option("--train-limit", help="This many random training rows.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any recipe key, e.g. plan.num_prune=13."),
]
PortableOption = Annotated[
    str | None,
    typer.Option(
        "--portable-to",
        metavar="ENGINES",
        help="Choose layers so that these serve the result right: vllm, sglang, llama.cpp, with commas.",
    ),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that comes with the model.")
]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Drop unusable rows instead of stopping.")]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, show what would happen, load no weights.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress.")]
