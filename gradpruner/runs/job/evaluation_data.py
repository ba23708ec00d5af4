"""The rows a recipe reads, their wording, and its metrics; checked before any model is loaded."""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.data.chat_templates import choose_template, template_mark
from gradpruner.data.encoding import usable
from gradpruner.data.examples import Example, ExampleSet, as_conversation, question
from gradpruner.data.folders import has_split
from gradpruner.data.layouts import Layout
from gradpruner.data.loading import load_examples, split_sample_suffix
from gradpruner.data.numbers import final_number
from gradpruner.data.rows import NoSplitError, read_rows
from gradpruner.data.tasks import TASKS, load_task
from gradpruner.evaluation.options import AskingSection, EvaluateOptions
from gradpruner.evaluation.quality import TASK_METRICS
from gradpruner.models.loading import load_tokenizer
from gradpruner.runs.recipe.recipe import Recipe
from gradpruner.runs.recipe.sections import AlsoSection, DataSection

HELD_OUT = "rows held out for"
"""In notes of training rows: "40 rows held out for validation"."""
_SHORT = 200  # characters of a command that a message may hold
MOST_TO_CHOOSE = 200
"""At most this many training rows, and at most a tenth of them, are held out to decide whether a recovery is
kept. To certify a loss, up to a fifth is held out, and at most data.validation_limit rows."""
LONG_ANSWER = 10
"""Tokens. Models that write longer answers lose more by pruning; see docs/quality.md."""
_FIRST = 200
"""Answers whose length is looked at."""
MOST_HELD_OUT = 1000
"""At most this many training rows, and at most a tenth of them, are held out for evaluation."""


def metrics_of(recipe: Recipe) -> tuple[str, ...]:
    """What is measured on the recipe's own rows: the metrics it names, else those of its task."""
    named = recipe.evaluate.metrics
    return tuple(named) if named is not None else metrics_of_task(recipe.data.task)


def metrics_of_task(name: str | None) -> tuple[str, ...]:
    """What is measured on a named task; on rows of one's own (None), the same as on a task with labels."""
    return TASK_METRICS[TASKS.find(name).metric if name is not None else "accuracy"]


def with_metrics(recipe: Recipe, rows: ExampleSet, tokenizer: Any) -> Recipe:
    """Returns the recipe with a metric for sentences, if answers are some and it names no metric and no task.

    Exact match is 0 for nearly every sentence. Answers are sentences if they have `LONG_ANSWER` tokens on
    average, most of them occur once, and no row has options. ROUGE-L measures them or, if each has a number
    after "####" (GSM8K), that number.
    """
    answers = [example.answer for example in rows.examples]
    named = recipe.evaluate.metrics is not None or recipe.data.task is not None
    if named or len(set(answers)) <= len(answers) / 2 or any(len(e.choices) > 1 for e in rows.examples):
        return recipe
    first = answers[:_FIRST]
    tokens = sum(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in first)
    if tokens < LONG_ANSWER * len(first):
        return recipe
    numbers = all("####" in answer and final_number(answer) is not None for answer in answers)
    return recipe.with_values(evaluate={"metrics": ["final_number" if numbers else "rouge_l"]})


def options_of(recipe: Recipe, metrics: Sequence[str], max_length: int) -> EvaluateOptions:
    """The options of an evaluation: the recipe's, with these metrics and this length."""
    settings = recipe.evaluate.model_dump(include=set(AskingSection.model_fields))
    run = {"metrics": list(metrics), "max_length": max_length, "seed": recipe.seed}
    return EvaluateOptions.model_validate(settings | run)


def check_evaluation(recipe: Recipe) -> None:
    """Refuses metrics that cannot be computed here, before data and model are read.

    Raises:
        ConfigError: If a library, an encoder or a task of lm-eval is missing, or `data.chat` is "always" for
            rows of the user's own.
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
            "data.chat is 'always', but only named tasks can be turned into conversations.",
            hint="Leave data.chat out; rows of your own are conversations if they have 'messages'.",
        )


def asked_of_harness(recipe: Recipe, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Evaluates a model with lm-evaluation-harness on the recipe's `lm_eval` tasks."""
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
    """Loads the tokenizer of a model folder, with the chat template that the recipe names.

    Raises:
        ConfigError: If there is no such template.
        ModelError: If the folder has no usable tokenizer.
    """
    tokenizer = load_tokenizer(folder, recipe.model.trust_remote_code)
    return choose_template(tokenizer, recipe.data.chat_template)


def load_split(recipe: Recipe, split: str, tokenizer: Any, max_length: int | None = None) -> ExampleSet:
    """Reads one set of the recipe's rows.

    Args:
        recipe: Says where the rows are.
        split: "train", "eval", "validation", or the name of a further task (`evaluate.also`).
        tokenizer: Its chat template decides whether a named task is asked in conversations; with
            `data.skip_bad`, rows it cannot encode in `max_length` tokens are dropped.
        max_length: None takes the recipe's.

    Raises:
        ConfigError: If the task or a limit is unknown or out of range.
        DataError: If rows are missing or unusable.
    """
    data, also = recipe.data, {entry.task: entry for entry in recipe.evaluate.also}
    if split in also:
        found = _load_task(recipe, also[split], split, also[split].limit, tokenizer)
    elif data.task is not None and (split != "validation" or _in_schema(recipe)):
        found = _load_task(recipe, data, split, getattr(data, f"{split}_limit"), tokenizer)
    else:
        source = data.train if getattr(data, split) is None else getattr(data, split)
        assert source is not None
        found = load_examples(
            source,
            split=split,
            format=data.format,
            limit=getattr(data, f"{split}_limit"),
            seed=recipe.seed,
            skip_bad=data.skip_bad,
            layout=Layout(data.columns, data.prompt, data.completion, data.labels),
        )
        if data.task is not None:
            other = f"not in the schema of the task '{data.task}', so asked in their own words"
            found = replace(found, notes=(*found.notes, other))
    kept = usable(tokenizer, found, max_length or data.max_length, skip_bad=data.skip_bad)
    if data.chat_template is not None and not any(example.messages for example in kept.examples):
        unused = f"data.chat_template is not used for the rows of '{split}', which are no conversations"
        return replace(kept, notes=(*kept.notes, unused))
    return replace(kept, format=kept.format + template_mark(data.chat_template))


def _in_schema(recipe: Recipe) -> bool:
    """Whether the validation rows are in the schema of the recipe's task, by the columns of the first row."""
    data = recipe.data
    path = split_sample_suffix(str(data.validation), None)[0]
    if not Path(path).expanduser().exists():
        return False
    rows = read_rows(path, "validation", skip_bad=data.skip_bad).rows
    return bool(rows) and set(TASKS.find(str(data.task)).columns) <= rows[0].fields.keys()


def _load_task(
    recipe: Recipe, source: DataSection | AlsoSection, split: str, limit: int | None, tokenizer: Any
) -> ExampleSet:
    """Reads the training, validation or evaluation rows (any other split) of a named task."""
    assert source.task is not None
    task = TASKS.find(source.task)
    if split == "train":
        named, limit = task.train_split, task.train_limit if limit is None else limit
    else:
        named = task.eval_split
    folder = source.folder
    if split == "validation":  # a file or folder of its own, in the task's schema
        named = split
        folder, limit = split_sample_suffix(str(recipe.data.validation), limit)
    rows = load_task(source.task, folder, named, limit, recipe.seed, skip_bad=recipe.data.skip_bad)
    return worded(rows, tokenizer, recipe.data.chat)


def load_rows(recipe: Recipe, tokenizer: Any, max_length: int | None = None) -> tuple[ExampleSet, ExampleSet]:
    """Reads the training rows and the evaluation rows; holds these out of the former if none are named.

    Raises:
        ConfigError: If the task or a limit is unknown or out of range.
        DataError: If rows are missing or unusable, or too few to hold any out.
    """
    train = load_split(recipe, "train", tokenizer, max_length)
    if not holds_out(recipe):
        try:
            return train, load_split(recipe, "eval", tokenizer, max_length)
        except NoSplitError:
            if recipe.data.task is not None or recipe.data.eval is not None:
                raise
    count = min(recipe.data.eval_limit or MOST_HELD_OUT, len(train) // 10)
    return _held_out(recipe, train, count, "evaluation", "eval")


def holds_out(recipe: Recipe) -> bool:
    """Whether evaluation rows are held out of the training rows because there are no others."""
    data = recipe.data
    if data.task is not None or data.eval is not None:
        return False
    assert data.train is not None
    source = Path(split_sample_suffix(data.train, None)[0]).expanduser()
    return source.is_file() or (source.is_dir() and not has_split(source, "eval"))


def was_held_out(train: ExampleSet, what: str) -> bool:
    """Whether rows for `what` ("evaluation", "validation") were held out of these training rows."""
    return any(note.endswith(f"{HELD_OUT} {what}") for note in train.notes)


def unequal_labels(train: ExampleSet, others: Mapping[str, ExampleSet]) -> list[str]:
    """Returns a warning for each set of a user's rows whose labels are not those of the training rows.

    Args:
        train: The training rows.
        others: The other rows by name, such as "evaluation".
    """
    learned, asked = _labels(train), {name: _labels(rows) for name, rows in others.items()}
    if not learned:
        return []
    # Choices of a template have its words around the labels. JSON, since a bare `no` is false in YAML.
    known = json.dumps(sorted(learned.union(*asked.values())), ensure_ascii=False)
    listed = shlex.quote(f"data.labels={known}")
    as_command = train.format.startswith("labelled_text") and len(listed) < _SHORT
    place = f": --set {listed}" if as_command else " in data.labels"
    return [
        f"Training rows have {len(learned)} labels, {name} rows {len(labels)} (not in both: "
        f"{', '.join(sorted(learned ^ labels)[:8])}), so they offer different choices. "
        f"List all labels{place}."
        for name, labels in asked.items()
        if labels and labels != learned
    ]


def _labels(rows: ExampleSet) -> set[str]:
    """Returns the labels that rows with labels offer as choices; empty for other rows."""
    if not rows.format.startswith(("labelled_text", "templates")):
        return set()
    return {choice.strip() for example in rows.examples[:1] for choice in example.choices}


def with_validation(
    recipe: Recipe, train: ExampleSet, tokenizer: Any, max_length: int | None = None
) -> tuple[ExampleSet, ExampleSet]:
    """Returns training rows and validation rows, which are read, or else held out of the given `train` rows.

    The other arguments are those of `load_split`.

    Raises:
        DataError: If there are too few rows to hold any out.
    """
    data = recipe.data
    if data.validation is not None:
        return train, load_split(recipe, "validation", tokenizer, max_length)
    count = min(data.validation_limit, len(train) // 5)
    if recipe.chooses_recovery and recipe.plan.max_loss is None:
        count = min(count, MOST_TO_CHOOSE, max(1, len(train) // 10))
    return _held_out(recipe, train, count, "validation", "validation")


def _held_out(
    recipe: Recipe, train: ExampleSet, count: int, what: str, key: str
) -> tuple[ExampleSet, ExampleSet]:
    """Splits training rows into the rows that stay and `count` random rows for `what`, at most.

    Rows with the same prompt go together: none of them would be new to a model that learned the others.
    """
    if count == 0:
        raise DataError(
            f"{len(train)} training rows are too few to hold {what} rows out of them.",
            hint=f"Give data.{key}: a file of rows that the model is not tuned on.",
        )
    held_out = _by_prompt(train.examples, count, recipe.seed)
    count = len(held_out)

    def part(wanted: bool) -> tuple[Example, ...]:
        return tuple(row for i, row in enumerate(train.examples) if (i in held_out) == wanted)

    notes = (*train.notes, f"{count} {HELD_OUT} {what}")
    others = replace(
        train, examples=part(True), num_dropped=0, notes=(f"{count} of {len(train)} training rows",)
    )
    return replace(train, examples=part(False), notes=notes), others


def _by_prompt(examples: Sequence[Example], count: int, seed: int) -> set[int]:
    """Returns the indices of at most `count` random rows, and with each row those with its prompt.

    If that gives less than half of `count`, because prompts have too many rows each, single rows are taken.
    """
    rows: dict[Any, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(question(example), []).append(index)
    groups, chance, chosen = list(rows.values()), random.Random(seed), set[int]()
    drawn = chance.sample(groups, min(count, len(groups)))
    for group in (*drawn, *chance.sample(groups, len(groups))):  # the others in turn, if a group is too large
        if len(chosen) + len(group) <= count:
            chosen.update(group)
    enough = 2 * len(chosen) >= count
    return chosen if enough else set(random.Random(seed).sample(range(len(examples)), count))


def worded(found: ExampleSet, tokenizer: Any, chat: str) -> ExampleSet:
    """Turns the rows of a named task into conversations if the tokenizer has a chat template.

    Raises:
        ConfigError: If `chat` is "always" and the tokenizer has no chat template.
    """
    if chat == "always" and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat is 'always', but the tokenizer has no chat template.",
            hint="Use 'auto' or 'never', or an instruction-tuned model.",
        )
    if chat == "never" or not tokenizer.chat_template:
        return found
    examples = tuple(map(as_conversation, found.examples))
    return replace(found, examples=examples, format=f"{found.format}, chat template")


def data_identity(examples: ExampleSet) -> dict[str, Any]:
    """What identifies a set of examples: the hash of their source, the format, and the ids of the rows."""
    ids = [example.id for example in examples.examples]
    return {"sha256": examples.sha256, "format": examples.format, "rows": ids}
