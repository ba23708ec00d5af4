"""`gradpruner init`: a first recipe, filled in from the model's config and the rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gradpruner.cli.executing import prepare
from gradpruner.cli.options import ROWS, Chosen, takes
from gradpruner.cli.suggestions import suggest
from gradpruner.common.errors import ConfigError

if TYPE_CHECKING:
    from gradpruner.data.examples import ExampleSet
    from gradpruner.models.sizes import ModelSizes

RECIPE_NAME = "recipe.yaml"
_MOST_EPOCHS = 10
_UNNAMED = "number of the label: what the model is to answer; names tell it more than numbers do"
_NOT_GIVEN = "the split of that folder or hub dataset, else a tenth of the training rows is held out"

TEMPLATE = """\
# Written by `gradpruner init`.
# {model_said}
# {data_said}
# gradpruner run {name} --dry-run    checks everything, shows what would be learned, loads no weights
# gradpruner run {name}              does it; the same again goes on where it was
# Every other key: `gradpruner schema`.
title: {title}
out: {out}  # the run directory; recordings, models and report.html go there

model:
  path: {model}  # a folder, or a hub id (org/name)

data:
{data}
  # Rows to train on, drawn at random; null: all. Fewer: quicker, and worse.
  train_limit: null
  # Tokens of a sample, prompt and answer; longer prompts lose their beginning.
  # {longest}
  max_length: {max_length}

# best: the dense model is tuned, pruned, repaired, and teaches the pruned one; about twice its own tuning.
# fast: the base model is pruned and repaired, then fine-tuned; with many rows cheaper than tuning it dense.
effort: best

plan:
  # Layers that go, of {layers}. Fewer keep more of the quality, more make it smaller and faster.
  num_prune: {num_prune}  # {removed}

finetune:
  # full trains every weight: best, and {full_memory} for weights, gradients and optimizer.
  # lora trains small adapters: {lora_memory}, and it wants a learning rate several times as high.
  # qlora is lora on weights in 4 bits: {qlora_memory} (pip install 'gradpruner[quant]'). Recording
  # does the same with record.adapter: qlora; models are evaluated as they are kept, not in 4 bits.
  mode: {mode}
  # {rate_said}.
  # Too low learns nothing, too high forgets or diverges; --find-lr tries some on held-out training rows.
  learning_rate: {rate}
  # Passes over the training rows. More learn more, until the rows are known by heart.
  epochs: {epochs}
  # Samples in memory at a time, and how many such batches make an optimizer step: {batch} x {accumulation}
  # samples, {steps} steps in all. More steps teach a small data set better; larger ones are steadier.
  batch_size: {batch}
  accumulation: {accumulation}
"""


@takes(f"where {ROWS} trust_remote_code")
def init(
    chosen: Chosen,
    where: Annotated[
        Path, typer.Argument(help=f"The recipe to write (NAME.yaml), or a folder for {RECIPE_NAME}.")
    ] = Path(),
) -> None:
    """Write a first recipe for a model and rows of your own: gradpruner init --model MODEL --data ROWS.

    Looks at the model's config and at the rows, never at weights, and fills in what suits them. What is not
    given is looked for beside the recipe: a model folder, and files called train and test.
    """
    from gradpruner.common.files import write_text
    from gradpruner.runs.recipe import check_recipe
    from gradpruner.runs.yaml_files import parse_yaml

    target = where if where.suffix in (".yaml", ".yml") else where / RECIPE_NAME
    if os.path.lexists(target):
        raise ConfigError(
            f"{target} is there already, and is not overwritten.",
            hint="Give another name: gradpruner init other.yaml.",
        )
    prepare(quiet=True)
    text = written(target, _found(target.parent, chosen.values))
    check_recipe(parse_yaml(text), str(target))
    write_text(target, text)
    typer.echo(f"written: {target}")
    suggest("init", recipe=target)


def _found(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What was given, completed by what lies beside the recipe."""
    from gradpruner.data.folders import has_split, split_files
    from gradpruner.models.checking import is_model_folder

    if "model.path" not in values:
        inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        models = [path for path in inside if is_model_folder(path)]
        if len(models) != 1:
            named = ", ".join(map(str, models)) or "none"
            raise ConfigError(
                f"Which model? Model folders in {folder}: {named}.",
                hint="Give --model: a folder or a hub id.",
            )
        values["model.path"] = str(models[0])
    if "data.task" in values:
        return values
    if "data.train" not in values:
        values["data.train"] = str(split_files(folder, "train")[0])
    beside = Path(values["data.train"]).parent
    if "data.eval" not in values and Path(values["data.train"]).is_file() and has_split(beside, "eval"):
        values["data.eval"] = str(split_files(beside, "eval")[0])
    return values


def written(target: Path, values: dict[str, Any]) -> str:
    """The text of the recipe that will be at `target`; `values` are its keys of model and data."""
    from gradpruner.common.printing import short
    from gradpruner.data.layouts import UnnamedLabels
    from gradpruner.models.folder import locate_model
    from gradpruner.models.loading import load_config
    from gradpruner.models.sizes import ModelSizes
    from gradpruner.runs.recipe import load_recipe

    recipe = load_recipe(None, (), values)
    folder = locate_model(recipe.model.path, weights=False)
    config = load_config(folder, recipe.model.trust_remote_code, weights=False)
    sizes = ModelSizes(config)
    try:
        rows, longest = _rows(recipe, folder)
    except UnnamedLabels as error:  # written as they are, to be named by who knows what they stand for
        values = values | {"data.labels": {label: label for label in error.labels}}
        recipe.data.labels = values["data.labels"]
        rows, longest = _rows(recipe, folder)
    trained = _training(sizes, len(rows))
    layers = len(sizes.layer_parameters)
    gone = round(0.4 * layers)
    lost = sum(sizes.layer_parameters) * gone // layers
    base = target.parent.resolve()
    name = Path(recipe.model.path).name
    facts = {
        "name": target.name,
        "title": _scalar(f"{name} on {recipe.data.task or Path(rows.source).stem}"),
        "out": _scalar(f"runs/{re.sub(r'[^A-Za-z0-9._-]+', '-', target.stem)}"),
        "model": _scalar(_from(base, values["model.path"])),
        "data": _data_lines(base, values, recipe.data.labels),
        "longest": longest,
        "max_length": min(2048, int(getattr(config, "max_position_embeddings", None) or 2048)),
        "layers": layers,
        "num_prune": gone,
        "removed": f"40 % of the layers, {short(lost)} parameters",
        "model_said": f"{name} is a {config.model_type} of {layers} layers and "
        f"{short(sizes.parameters)} parameters",
        "data_said": f"{len(rows):,} training rows of the kind {rows.format}",
    }
    text = TEMPLATE.format(**facts, **trained)
    trusted = "  trust_remote_code: true\n" if recipe.model.trust_remote_code else ""
    return text.replace("  path:", f"{trusted}  path:")


def _rows(recipe: Any, folder: Path) -> tuple[ExampleSet, str]:
    """The training rows, and how long the first of them are where a tokenizer is at hand."""
    from gradpruner.data.encoding import encode_all
    from gradpruner.runs.evaluation_data import load_rows, tokenizer_of

    local = any(folder.glob("tokenizer*"))
    tokenizer = tokenizer_of(recipe, folder) if local else None
    rows, _ = load_rows(recipe, tokenizer)
    if tokenizer is None:
        return rows, "How long yours are, the dry run says."
    first = encode_all(tokenizer, rows.examples[:200], 10**6)
    return rows, f"The longest of the first {len(first)}: {max(first.lengths)}."


def _training(sizes: ModelSizes, rows: int) -> dict[str, Any]:
    """Mode, rate and steps for a model and so many rows."""
    from gradpruner.common.files import readable_bytes
    from gradpruner.evaluation.costing.per_device import Training, hold_training
    from gradpruner.models.loading import resolve_device
    from gradpruner.runs.fitting import device_memory
    from gradpruner.training.finetuning import WANTED_STEPS, chosen_accumulation, planned_steps
    from gradpruner.training.options import FinetuneSection
    from gradpruner.training.rates import default_rate, default_rate_source

    decoder = sum(sizes.layer_parameters)
    full, lora = 16 * sizes.parameters, 2 * sizes.parameters
    qlora = hold_training(sizes.model, Training(mode="qlora")).weights
    _, memory = device_memory(resolve_device("auto"))
    mode = "full" if full < 0.8 * memory else "lora"

    accumulation = chosen_accumulation(rows, FinetuneSection(accumulation=None))

    def steps(epochs: int) -> int:
        return planned_steps(rows, FinetuneSection(accumulation=accumulation, epochs=epochs))

    epochs = next((n for n in range(3, _MOST_EPOCHS) if steps(n) >= WANTED_STEPS), _MOST_EPOCHS)
    said = default_rate_source(decoder, mode)
    return {
        "mode": mode,
        "full_memory": readable_bytes(full),
        "lora_memory": f"{readable_bytes(lora)} for the weights",
        "qlora_memory": readable_bytes(qlora),
        "rate_said": f"{said[0].upper()}{said[1:]}",
        "rate": f"{default_rate(decoder, mode):.1e}",
        "epochs": epochs,
        "batch": FinetuneSection().batch_size,
        "accumulation": accumulation,
        "steps": steps(epochs),
    }


def _data_lines(base: Path, values: dict[str, Any], labels: Any) -> str:
    """The rows, as lines of the recipe."""
    said = {
        "task": ("data.task", "a named task (`gradpruner ls tasks`)"),
        "folder": ("data.folder", "its splits"),
        "train": ("data.train", "rows to train on: file, folder or hub dataset; file#2000 draws 2,000"),
        "eval": ("data.eval", "rows to measure on, none of which are trained on"),
    }
    lines = []
    for key, (dotted, comment) in said.items():
        if dotted in values:
            value = values[dotted] if key == "task" else _from(base, values[dotted])
            lines.append(f"  {key}: {_scalar(value)}  # {comment}")
    if "data.train" in values and "data.eval" not in values:
        lines.append(f"  # Rows to measure on; null: {_NOT_GIVEN}.\n  eval: null")
    if labels:
        lines.append(f"  labels: {json.dumps(labels)}  # {_UNNAMED}")
    return "\n".join(lines)


def _from(base: Path, source: str) -> str:
    """A path as it is to be written in a recipe that lies in `base`; a hub id as it is."""
    path, mark, count = source.partition("#")
    local = Path(path).expanduser()
    if local.is_absolute() or not local.exists():
        return source
    relative = os.path.relpath(local.resolve(), base)
    return (relative if relative.startswith("..") else f"./{relative}") + mark + count


def _scalar(text: str) -> str:
    """A text as YAML writes it, quoted where it must be."""
    plain = re.fullmatch(r"[A-Za-z./][A-Za-z0-9_./ -]*[A-Za-z0-9]", text)
    ambiguous = text.lower() in ("null", "true", "false", "yes", "no", "on", "off")
    return text if plain and not ambiguous else json.dumps(text, ensure_ascii=False)
