"""Options that several commands share: name, help text and the recipe key each one sets."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from gradpruner.common.errors import ConfigError

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
_LISTS = {"portable_to", "lm_eval"}  # comma-separated


def given(**options: Any) -> dict[str, Any]:
    """Returns recipe key -> value for the options that were given."""
    if options.get("lora") is not None:
        options["lora"] = "lora" if options["lora"] else "full"
    for name in _LISTS & set(options):
        options[name] = words(options[name]) if options[name] else None
    return {KEYS[name]: value for name, value in options.items() if value is not None and value is not False}


def words(text: str) -> list[str]:
    """Splits a comma-separated text; empty words are dropped."""
    return [word.strip() for word in text.split(",") if word.strip()]


in_use: dict[str, str] = {}
"""Recipe key -> the option that sets it, for the command in use."""


def spoken(text: str) -> str:
    """Returns a message with options of the command in use in place of the recipe keys that they set."""

    def option(found: re.Match[str]) -> str:
        return in_use.get(found[1], found[0])

    # Neither "--set plan.num_prune=3", nor a part of a path, nor a faulty key of a file, "  - plan.name:".
    # A quoted key is meant as one. An option that is named already is not repeated.
    return re.sub(
        r"(?<!  - )(?<!--set )(?<![\w./='-])([a-z]+\.[a-z_]+)(?: \(--[a-z-]+\))?(?![\w/=]|\.\w)", option, text
    )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _options(order: Iterable[str], keys: Mapping[str, str]) -> dict[str, str]:
    """Returns recipe key -> the option among those in `order` that sets it to the value it is given."""
    found = {keys[name]: _flag(name) for name in order if name in keys and name not in ("lora", "find_lr")}
    return found | ({"recover.epochs": "--recover STEPS"} if "recover.steps" in found else {})


def settled(chosen: Chosen) -> dict[str, Any]:
    """Returns the keys that options set, plus null for every recipe key that these options rule out.

    Raises:
        ConfigError: If --set sets one of the same keys.
    """
    values = chosen.values
    for item in chosen.overrides:
        key = item.partition("=")[0].strip()
        if key in values:
            flag = _flag(next(name for name, own in KEYS.items() if own == key))
            raise ConfigError(f"{flag} and --set {item} both set '{key}'.", hint="Give only one of them.")
    gone: tuple[str, ...] = ()
    rows = {"data.train", "data.eval"} & set(values)
    if "data.task" in values and not rows:
        gone = ("data.train", "data.eval")
    elif rows and "data.task" not in values:
        gone = ("data.task", "data.folder")
    return dict.fromkeys(gone) | values


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]
Text, Number = str | None, int | None
SHARED: dict[str, Any] = {
    "recipe": Annotated[
        Text,
        typer.Argument(help="Recipe: a YAML file, or the name of a built-in one (`gradpruner ls recipes`)."),
    ],
    "model": Annotated[Text, typer.Option("--model", help="Model folder or hub id.")],
    "data": Annotated[
        Text,
        typer.Option("--data", help="Training data: file, folder or hub dataset; append #N to draw N rows."),
    ],
    "eval_data": Annotated[
        Text,
        typer.Option(
            "--eval-data",
            help="Evaluation data. Default: the test split of the --data folder or hub dataset, else a tenth "
            "of the training rows.",
        ),
    ],
    "task": Annotated[
        Text, typer.Option("--task", help="A named task (`gradpruner ls tasks`) instead of --data.")
    ],
    "task_folder": Annotated[
        Text, typer.Option("--task-folder", help="Local folder with the splits of the named task.")
    ],
    "out": Annotated[Text, typer.Option("--out", help="Run directory.")],
    "plan": Annotated[
        Text, typer.Option("--plan", help="Prune by this plan file (edit it if you like), not by the scores.")
    ],
    "name": Annotated[
        Text,
        typer.Option("--name", help="Name of this plan in the run directory: variants/<row>@NAME."),
    ],
    "num_prune": Annotated[Number, typer.Option("--num-prune", help="Number of layers to remove.")],
    "layer_fraction": Annotated[
        float | None, typer.Option("--layer-fraction", help="Fraction of the layers to remove. Default: 0.4.")
    ],
    "learning_rate": Annotated[
        float | None,
        typer.Option("--learning-rate", help="Peak learning rate. Default: depends on the model's size."),
    ],
    "find_lr": Annotated[
        bool, typer.Option("--find-lr", help="First try several learning rates on held-out training rows.")
    ],
    "epochs": Annotated[float | None, typer.Option("--epochs", help="Passes over the training rows.")],
    "lora": Annotated[
        bool | None, typer.Option("--lora/--full", help="Train LoRA adapters, or all weights.")
    ],
    "train_limit": Annotated[
        Number, typer.Option("--train-limit", help="Use only this many training rows, drawn at random.")
    ],
    "seed": Annotated[Number, typer.Option("--seed", help="Random seed.")],
    "overrides": Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set any recipe key, e.g. plan.num_prune=13; repeatable."
        ),
    ],
    "trust_remote_code": Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow running the Python code in the model folder.")
    ],
    "portable_to": Annotated[
        Text,
        typer.Option(
            "--portable-to",
            metavar="ENGINES",
            help="Choose layers so that these engines serve the result correctly: vllm, sglang, llama.cpp; "
            "comma-separated.",
        ),
    ],
    "skip_bad": Annotated[bool, typer.Option("--skip-bad", help="Skip unusable rows instead of stopping.")],
    "dry_run": Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything and show what would happen; load no weights."),
    ],
    "as_json": JsonOption,
    "quiet": QuietOption,
}
ROWS = "model data eval_data task task_folder"
TUNING = "learning_rate epochs lora train_limit"
ENDING = "dry_run as_json quiet"


@dataclass(frozen=True)
class Chosen:
    """The values of the options that `takes` added to a command."""

    values: dict[str, Any]
    """Recipe key -> value."""
    recipe: str | None = None
    out: str | None = None
    overrides: tuple[str, ...] = ()
    dry_run: bool = False
    as_json: bool = False
    quiet: bool = False
    others: dict[str, Any] = field(default_factory=dict)
    """Options that set no recipe key."""


def takes(
    order: str, keys: Mapping[str, str] = KEYS, **others: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds options to a command, which receives their values as its parameter `chosen`.

    Args:
        order: Names from `SHARED`, from `others` and of the command's own parameters, separated by spaces,
            in the order `--help` lists them.
        keys: Option -> recipe key; {} for a command that reads no recipe.
        others: Options with a help text of this command's own: an annotation, or (annotation, default).
    """
    table = {name: (kind, False if kind.__origin__ is bool else None) for name, kind in SHARED.items()}
    table |= {name: value if isinstance(value, tuple) else (value, None) for name, value in others.items()}

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        parameters = []
        for name in order.split():
            kind, default = (own[name].annotation, own[name].default) if name in own else table[name]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            )

        @functools.wraps(command)
        def called(**values: Any) -> None:
            shared = {name: value for name, value in values.items() if name not in own}
            chosen = _chosen(dict(shared), keys)
            in_use.clear()
            in_use.update(_options(shared, keys))
            command(**{name: values[name] for name in values if name in own}, chosen=chosen)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return with_options


def _chosen(options: dict[str, Any], keys: Mapping[str, str]) -> Chosen:
    values = given(**{name: options.pop(name) for name in list(options) if name in keys})
    fields = {name: options.pop(name) for name in list(options) if name in Chosen.__dataclass_fields__}
    if "overrides" in fields:
        fields["overrides"] = tuple(fields["overrides"] or ())
    return Chosen(values, **fields, others=options)
