"""A first recipe, filled in from the model's config and the rows; `gradpruner init` writes it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from gradpruner.common.printing import readable_bytes, short
from gradpruner.data.encoding import encode_all
from gradpruner.data.examples import ExampleSet
from gradpruner.data.layouts import UnnamedLabels
from gradpruner.evaluation.costing.per_device import Training, hold_training
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import load_config, resolve_device
from gradpruner.models.sizes import ModelSizes
from gradpruner.runs.before.fitting import device_memory
from gradpruner.runs.job.evaluation_data import (
    HELD_OUT,
    load_rows,
    metrics_of,
    tokenizer_of,
    with_metrics,
    with_validation,
)
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.training.finetuning import WANTED_STEPS, chosen_accumulation, planned_steps
from gradpruner.training.options import FinetuneSection
from gradpruner.training.rates import default_rate, default_rate_source

_MOST_EPOCHS = 10
_UNNAMED = "label: what the model should answer; replace the numbers by names, which mean more to it"
_NOT_GIVEN = "the test split of that folder or hub dataset, else a tenth of the training rows"

TEMPLATE = """\
# Written by `gradpruner init`.
# {model_note}
# {data_note}
# gradpruner run {name} --dry-run    checks everything and shows what the model would learn; loads no weights
# gradpruner run {name}              runs it; run it again to resume
# For all other keys: `gradpruner schema`.
title: {title}
out: {out}  # the run directory, for recordings, models and report.html

model:
  path: {model}  # a folder, or a hub id (org/name)

data:
{data}
  # Number of training rows, drawn at random; null uses all. Fewer rows are faster but worse.
  train_limit: null
  # Most tokens per sample, prompt and answer together; longer prompts lose their beginning.
  # {longest}
  max_length: {max_length}

# best: tunes the dense model, prunes and repairs it, and lets it teach the pruned one; takes about twice
# the time of tuning it.
# fast: removes the last layers of the base model (the gate's choice where answers are sentences), repairs
# it, then fine-tunes it, in less time than tuning it dense.
effort: best

plan:
  # Layers to remove, of {layers}. Removing fewer keeps more quality; removing more saves more size and time.
  num_prune: {num_prune}  # {removed}

finetune:
  # full trains all weights: the best quality, but {full_memory} for weights, gradients and optimizer.
  # lora trains small adapters: {lora_memory}; needs a learning rate several times as high.
  # qlora is lora on 4-bit weights: {qlora_memory} (pip install 'gradpruner[quant]'). To record gradients
  # in 4 bits too, set record.adapter: qlora. Models are evaluated as they are saved, not in 4 bits.
  mode: {mode}
  # {rate_note}.
  # Too low learns nothing, too high forgets or diverges; --find-lr tries some on held-out training rows.
  learning_rate: {rate}
  # Passes over the training rows. More passes learn more, until the model has memorised the rows.
  epochs: {epochs}
  # Samples per batch, and batches per optimizer step: {batch} x {accumulation} samples, {steps} steps in all.
  # More steps suit small data sets; larger steps are steadier.
  batch_size: {batch}
  accumulation: {accumulation}

evaluate:
  # exact_match for classes and short answers, rouge_l for sentences, final_number for sums; or several.
  metrics: {metrics}
"""


def first_recipe(target: Path, values: dict[str, Any]) -> str:
    """Returns the text of the recipe to write at `target`; `values` holds its model and data keys."""
    recipe = load_recipe(None, (), values)
    folder = locate_model(recipe.model.path, weights=False)
    config = load_config(folder, recipe.model.trust_remote_code, weights=False)
    sizes = ModelSizes(config)
    try:
        rows, longest, metrics = _rows(recipe, folder)
    except UnnamedLabels as error:  # the recipe lists the numbers, for the user to name
        values = values | {"data.labels": {label: label for label in error.labels}}
        recipe.data.labels = values["data.labels"]
        rows, longest, metrics = _rows(recipe, folder)
    held_out = [note for note in rows.notes if HELD_OUT in note]
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
        "metrics": metrics,
        "max_length": min(2048, int(getattr(config, "max_position_embeddings", None) or 2048)),
        "layers": layers,
        "num_prune": gone,
        "removed": f"40 % of the layers, {short(lost)} parameters",
        "model_note": f"Model: {name}, type {config.model_type}, {layers} layers, "
        f"{short(sizes.parameters)} parameters.",
        "data_note": "; ".join([f"Data: {len(rows):,} training rows, format {rows.format}", *held_out]) + ".",
    }
    text = TEMPLATE.format(**facts, **trained)
    trusted = "  trust_remote_code: true\n" if recipe.model.trust_remote_code else ""
    return text.replace("  path:", f"{trusted}  path:")


def _rows(recipe: Any, folder: Path) -> tuple[ExampleSet, str, str]:
    """Returns the training rows, how long the first ones are, and the metrics that suit the evaluation rows.

    Without a tokenizer beside the model, the dry run has to say the latter two.
    """
    local = any(folder.glob("tokenizer*"))
    tokenizer = tokenizer_of(recipe, folder) if local else None
    rows, evaluated = load_rows(recipe, tokenizer)
    if recipe.chooses_recovery:  # as the run will do
        rows, _ = with_validation(recipe, rows, tokenizer)
    if tokenizer is None:
        return rows, "The dry run shows how long yours are.", "null  # the dry run shows which"
    first = encode_all(tokenizer, rows.examples[:200], 10**6)
    metrics = ", ".join(metrics_of(with_metrics(recipe, evaluated, tokenizer)))
    longest = f"The longest of your first {len(first)} samples has {max(first.lengths)} tokens."
    return rows, longest, f"[{metrics}]"


def _training(sizes: ModelSizes, rows: int) -> dict[str, Any]:
    """Returns the template's training values for a model and this many rows."""
    decoder = sum(sizes.layer_parameters)
    full, lora = 16 * sizes.parameters, 2 * sizes.parameters
    qlora = hold_training(sizes.model, Training(mode="qlora")).weights
    _, memory = device_memory(resolve_device("auto"))
    mode = "full" if full < 0.8 * memory else "lora"

    accumulation = chosen_accumulation(rows, FinetuneSection(accumulation=None))

    def steps(epochs: int) -> int:
        return planned_steps(rows, FinetuneSection(accumulation=accumulation, epochs=epochs))

    epochs = next((n for n in range(3, _MOST_EPOCHS) if steps(n) >= WANTED_STEPS), _MOST_EPOCHS)
    note = default_rate_source(decoder, mode)
    return {
        "mode": mode,
        "full_memory": readable_bytes(full),
        "lora_memory": f"{readable_bytes(lora)} for the weights",
        "qlora_memory": readable_bytes(qlora),
        "rate_note": f"{note[0].upper()}{note[1:]}",
        "rate": f"{default_rate(decoder, mode):.1e}",
        "epochs": epochs,
        "batch": FinetuneSection().batch_size,
        "accumulation": accumulation,
        "steps": steps(epochs),
    }


def _data_lines(base: Path, values: dict[str, Any], labels: Any) -> str:
    """Returns the lines of the recipe's data section that name the rows."""
    keys = {
        "task": ("data.task", "a named task (`gradpruner ls tasks`)"),
        "folder": ("data.folder", "folder with its splits"),
        "train": ("data.train", "training rows: file, folder or hub dataset; file#2000 draws 2,000"),
        "eval": ("data.eval", "evaluation rows; must not be among the training rows"),
    }
    lines = []
    for key, (dotted, comment) in keys.items():
        if dotted in values:
            value = values[dotted] if key == "task" else _from(base, values[dotted])
            lines.append(f"  {key}: {_scalar(value)}  # {comment}")
    if "data.train" in values and "data.eval" not in values:
        lines.append(f"  # Evaluation rows; null: {_NOT_GIVEN}.\n  eval: null")
    if labels:
        lines.append(f"  labels: {json.dumps(labels)}  # {_UNNAMED}")
    return "\n".join(lines)


def _from(base: Path, source: str) -> str:
    """Returns a path relative to the recipe's folder `base`; absolute paths and hub ids stay as they are."""
    path, mark, count = source.partition("#")
    local = Path(path).expanduser()
    if local.is_absolute() or not local.exists():
        return source
    relative = os.path.relpath(local.resolve(), base)
    return (relative if relative.startswith("..") else f"./{relative}") + mark + count


def _scalar(text: str) -> str:
    """Returns a text as a YAML scalar, quoted if needed."""
    plain = re.fullmatch(r"[A-Za-z./][A-Za-z0-9_./ -]*[A-Za-z0-9]", text)
    ambiguous = text.lower() in ("null", "true", "false", "yes", "no", "on", "off")
    return text if plain and not ambiguous else json.dumps(text, ensure_ascii=False)
