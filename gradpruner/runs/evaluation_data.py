"""The rows of a recipe, how they are worded, and the metrics; checked before anything is loaded."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.chat_templates import choose_template, template_mark
from gradpruner.data.encoding import usable
from gradpruner.data.examples import Example, ExampleSet, as_conversation
from gradpruner.data.folders import has_split
from gradpruner.data.layouts import Layout
from gradpruner.data.loading import load_examples, split_sample_suffix
from gradpruner.data.tasks import TASKS, load_task
from gradpruner.evaluation.options import AskingSection, EvaluateOptions
from gradpruner.evaluation.quality import TASK_METRICS
from gradpruner.models.loading import load_tokenizer
from gradpruner.runs.recipe import Recipe

_SHORT = 200  # characters of a command that a message may hold
MOST_TO_CHOOSE = 200
"""Training rows that are held out to choose between a model and the same trained further, at most; of fewer
than ten times as many, a tenth. To certify a loss it is a fifth, and data.validation_limit at most."""
MOST_HELD_OUT = 1000
"""Rows that are held out of the training rows to be measured on, at most; of fewer than ten times as many, a
tenth."""


def metrics_of(recipe: Recipe) -> tuple[str, ...]:
    """What is measured on the recipe's own data: as it says, else as the task does."""
    named, task = recipe.evaluate.metrics, recipe.data.task
    if named is not None:
        return tuple(named)
    return TASK_METRICS[TASKS.find(task).metric if task is not None else "accuracy"]


def options_of(recipe: Recipe, metrics: Sequence[str], max_length: int) -> EvaluateOptions:
    """How models are asked: as the recipe says, for these metrics, in so many tokens."""
    asked = recipe.evaluate.model_dump(include=set(AskingSection.model_fields))
    run = {"metrics": list(metrics), "max_length": max_length, "seed": recipe.seed}
    return EvaluateOptions.model_validate(asked | run)


def metrics_of_task(name: str) -> tuple[str, ...]:
    """What is measured on a further task."""
    return TASK_METRICS[TASKS.find(name).metric]


def check_evaluation(recipe: Recipe) -> None:
    """Finds metrics that cannot be computed here before data and model are read.

    Raises:
        ConfigError: If a library, an encoder or a task of lm-eval is missing, or the wording cannot be
            chosen.
        ModelError: If the encoder cannot be read.
    """
    options = recipe.evaluate
    asked = [metrics_of(recipe), *(metrics_of_task(entry.task) for entry in options.also)]
    if any("bert_score" in metrics for metrics in asked):
        from gradpruner.evaluation.bertscore import check_encoder

        check_encoder(options.encoder)
    if options.lm_eval:
        from gradpruner.evaluation.harness import check_harness

        check_harness(options.lm_eval, options.lm_eval_folder)
    if recipe.data.chat == "always" and recipe.data.task is None:
        raise ConfigError(
            "data.chat is 'always', but only named tasks can be asked either way.",
            hint="Rows of your own are conversations when they have 'messages'.",
        )


def asked_of_harness(recipe: Recipe, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What lm-evaluation-harness measures of a model on the recipe's tasks."""
    from gradpruner.evaluation.harness import evaluate_harness

    options = recipe.evaluate
    return evaluate_harness(
        model,
        tokenizer,
        options.lm_eval,
        folder=options.lm_eval_folder,
        batch_size=options.batch_size,
        limit=options.lm_eval_limit,
        seed=recipe.seed,
    )


def tokenizer_of(recipe: Recipe, folder: Path) -> Any:
    """The tokenizer of a model folder, with the chat template that the recipe names.

    Raises:
        ConfigError: If there is no such template.
        ModelError: If the folder has no usable tokenizer.
    """
    tokenizer = load_tokenizer(folder, recipe.model.trust_remote_code)
    return choose_template(tokenizer, recipe.data.chat_template)


def load_split(recipe: Recipe, split: str, tokenizer: Any, max_length: int | None = None) -> ExampleSet:
    """The recipe's rows to learn from ("train") or to be measured on ("eval").

    Those that `max_length` tokens (None: as many as the recipe says) cannot hold are unusable.

    Raises:
        ConfigError: If the task or a limit is unknown or out of range.
        DataError: If rows are missing or unusable.
    """
    data, seed = recipe.data, recipe.seed
    limit = data.train_limit if split == "train" else data.eval_limit
    if data.task is not None:
        task = TASKS.find(data.task)
        if split == "train" and limit is None:
            limit = task.train_limit
        named = task.train_split if split == "train" else task.eval_split
        rows = load_task(data.task, data.folder, named, limit, seed, skip_bad=data.skip_bad)
        found = worded(rows, tokenizer, data.chat)
    else:
        source = data.train if split == "train" or data.eval is None else data.eval
        assert source is not None
        found = _own_rows(recipe, source, split, limit)
    return _usable(recipe, found, tokenizer, max_length)


def load_rows(recipe: Recipe, tokenizer: Any, max_length: int | None = None) -> tuple[ExampleSet, ExampleSet]:
    """The rows to learn from and those to be measured on, held out of the former where none are named.

    Raises:
        ConfigError: If the task or a limit is unknown or out of range.
        DataError: If rows are missing or unusable, or too few to hold any out.
    """
    train = load_split(recipe, "train", tokenizer, max_length)
    if not holds_out(recipe):
        return train, load_split(recipe, "eval", tokenizer, max_length)
    count = min(recipe.data.eval_limit or MOST_HELD_OUT, len(train) // 10)
    return _held_out(recipe, train, count, "evaluation", "eval")


def holds_out(recipe: Recipe) -> bool:
    """Whether the rows to be measured on are taken out of the training rows, since no others are there."""
    data = recipe.data
    if data.task is not None or data.eval is not None:
        return False
    assert data.train is not None
    source = Path(split_sample_suffix(data.train, None)[0]).expanduser()
    return source.is_file() or (source.is_dir() and not has_split(source, "eval"))


def unequal_labels(train: ExampleSet, evaluation: ExampleSet) -> str:
    """Warns of labelled rows of one's own that have other labels for evaluation than for training; or ""."""
    learned, asked = (
        {choice.strip() for example in found.examples[:1] for choice in example.choices}
        if found.format.startswith(("labelled_text", "templates"))
        else set()
        for found in (train, evaluation)
    )
    if learned == asked or not learned or not asked:
        return ""
    differing = ", ".join(sorted(learned ^ asked)[:8])
    # Choices of a template have its words around the labels. JSON, since a bare `no` is false in YAML.
    listed = shlex.quote(f"data.labels={json.dumps(sorted(learned | asked), ensure_ascii=False)}")
    as_command = train.format.startswith("labelled_text") and len(listed) < _SHORT
    place = f": --set {listed}" if as_command else " in data.labels"
    return (
        f"Training rows have {len(learned)} labels, evaluation rows {len(asked)} (not in both: {differing}), "
        f"so they offer different choices. List all labels{place}."
    )


def _own_rows(recipe: Recipe, source: str, split: str, limit: int | None) -> ExampleSet:
    data = recipe.data
    return load_examples(
        source,
        split=split,
        format=data.format,
        limit=limit,
        seed=recipe.seed,
        skip_bad=data.skip_bad,
        layout=Layout(data.columns, data.prompt, data.completion, data.labels),
    )


def _usable(recipe: Recipe, found: ExampleSet, tokenizer: Any, max_length: int | None) -> ExampleSet:
    data = recipe.data
    kept = usable(tokenizer, found, max_length or data.max_length, skip_bad=data.skip_bad)
    return replace(kept, format=kept.format + template_mark(data.chat_template))


def with_validation(
    recipe: Recipe, train: ExampleSet, tokenizer: Any, max_length: int | None = None
) -> tuple[ExampleSet, ExampleSet]:
    """Training rows and the rows on which choices are made, which are not training rows.

    Arguments are as for `load_split`; `train` is what that returned.

    Raises:
        DataError: If there are too few rows to hold any out.
    """
    data = recipe.data
    if data.validation is not None:
        found = _own_rows(recipe, data.validation, "validation", data.validation_limit)
        return train, _usable(recipe, found, tokenizer, max_length)
    count = min(data.validation_limit, len(train) // 5)
    if recipe.chooses_recovery and recipe.plan.max_loss is None:
        count = min(count, MOST_TO_CHOOSE, max(1, len(train) // 10))
    return _held_out(recipe, train, count, "validation", "validation")


def _held_out(
    recipe: Recipe, train: ExampleSet, count: int, what: str, key: str
) -> tuple[ExampleSet, ExampleSet]:
    """Training rows without `count` random ones, and those."""
    if count == 0:
        raise DataError(
            f"{len(train)} training rows are too few to hold {what} rows out of them.",
            hint=f"Give data.{key}: a file of rows that the model is not tuned on.",
        )
    held_out = set(random.Random(recipe.seed).sample(range(len(train)), count))

    def part(wanted: bool) -> tuple[Example, ...]:
        return tuple(row for i, row in enumerate(train.examples) if (i in held_out) == wanted)

    notes = (*train.notes, f"{count} rows held out for {what}")
    others = replace(
        train, examples=part(True), num_dropped=0, notes=(f"{count} of {len(train)} training rows",)
    )
    return replace(train, examples=part(False), notes=notes), others


def load_also(recipe: Recipe, tokenizer: Any, max_length: int | None = None) -> dict[str, ExampleSet]:
    """The rows of every further task, by its name; arguments as for `load_split`."""
    found = {}
    for entry in recipe.evaluate.also:
        split = TASKS.find(entry.task).eval_split
        rows = load_task(
            entry.task, entry.folder, split, entry.limit, recipe.seed, skip_bad=recipe.data.skip_bad
        )
        rows = worded(rows, tokenizer, recipe.data.chat)
        found[entry.task] = _usable(recipe, rows, tokenizer, max_length)
    return found


def worded(found: ExampleSet, tokenizer: Any, chat: str) -> ExampleSet:
    """A named task asked as the model is used to: in a conversation, if it has a template for one.

    Raises:
        ConfigError: If a conversation is wanted and the tokenizer has no template.
    """
    if chat == "always" and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat is 'always', and the tokenizer has no chat template.",
            hint="Use 'auto' or 'never', or an instruction-tuned model.",
        )
    if chat == "never" or not tokenizer.chat_template:
        return found
    examples = tuple(map(as_conversation, found.examples))
    return replace(found, examples=examples, format=f"{found.format}, chat template")


def data_identity(examples: ExampleSet) -> dict[str, Any]:
    """What makes two sets of examples the same: the bytes they came from and which rows were taken."""
    ids = [example.id for example in examples.examples]
    return {"sha256": examples.sha256, "format": examples.format, "rows": ids}
