"""What a task is: a public dataset, its prompt and its answers, with a version.

Spacing is the same in all tasks: a prompt ends without a space ("Answer:") and an answer begins with one
(" positive"). This is how byte-level vocabularies store a word inside a sentence, so prompt and answer,
tokenised separately, give the tokens of the joined text. Evaluation compares stripped answers. The rule
does not apply to a user's own prompt/completion rows.

Order is the same too: a prompt that does not fit is cut at its beginning, so long material comes first
and the question last.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.common.registry import Registry, suggest
from gradpruner.data.examples import Example, ExampleSet, sample
from gradpruner.data.rows import RowSet, read_hub, read_rows

METRICS = ("accuracy", "exact_match", "similarity", "final_number")
"""Metrics a task can be scored by."""

TASKS: Registry[Task] = Registry("task")
"""Every task, by name."""

CONVERTED = "refs/convert/parquet"
"""A branch of parquet files, for datasets with a loading script on the main branch: `datasets` runs none."""

Row = Mapping[str, Any]
Build = Callable[[Row, str], Example]
"""Makes an example from a row and its id."""

FIX = "Fix or remove this row."
"""Hint for a row that cannot be used."""

_HOLD_OUT_SEED = 0  # not the run's seed, so that evaluation rows are the same in every run


@dataclass(frozen=True)
class Task:
    """A dataset and the prompt it is asked with.

    Attributes:
        name: Registered name.
        description: One sentence for lists.
        columns: Required columns of the hub schema; the column of the answer comes last.
        build: Makes an example from a row; raises DataError naming the row.
        hub_id: "owner/name" on the Hugging Face hub.
        version: >= 1; raised whenever a prompt or an answer changes, because scores before and
            after cannot be compared.
        hub_config: Configuration on the hub; None for the default one.
        hub_revision: Branch, tag or commit; None for the main branch.
        hub_files: File pattern per split, for repositories that must be read file by file.
        hold_out: Rows of the hub's only split to hold out for evaluation; 0 if the hub has an evaluation
            split.
        metric: "accuracy": the answer must match exactly, up to surrounding space and case. "exact_match":
            the same, for so many options that scoring each one would cost more than generating the answer.
            "similarity": the mean of BERTScore F1 and ROUGE-L F1. "final_number": the last number must be
            right.
        train_split: Split to train on.
        eval_split: Split to evaluate on, one with public answers.
        other_splits: Further splits on the hub that have answers.
        train_limit: Number of rows the paper samples for training; None if it takes all or does not use the
            task.
        probe: Whether this is a reasoning probe: evaluated next to the user's own task to show what depth
            pruning costs, but not a task to prune for.
        paper: Where the paper reports it, e.g. "Table 1"; "" if nowhere.

    Raises:
        ConfigError: If the metric is unknown, a split is named twice, or `hub_files` lacks a split.
    """

    name: str
    description: str
    columns: tuple[str, ...]
    build: Build
    hub_id: str
    version: int = 1
    hub_config: str | None = None
    hub_revision: str | None = None
    hub_files: Mapping[str, str] = field(default_factory=dict)
    hold_out: int = 0
    metric: str = "accuracy"
    train_split: str = "train"
    eval_split: str = "test"
    other_splits: tuple[str, ...] = ()
    train_limit: int | None = None
    probe: bool = False
    paper: str = ""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ConfigError(
                f"Task '{self.name}' has the unknown metric '{self.metric}'.{suggest(self.metric, METRICS)}",
                hint=f"Allowed: {', '.join(METRICS)}.",
            )
        if len(set(self.splits)) != len(self.splits):
            raise ConfigError(f"Task '{self.name}' names a split twice: {', '.join(self.splits)}.")
        read = (self.train_split,) if self.hold_out else self.splits
        lacking = [split for split in read if self.hub_files and split not in self.hub_files]
        if lacking:
            raise ConfigError(
                f"Task '{self.name}' has hub_files, but none for {', '.join(lacking)}.",
                hint="Add a pattern to hub_files.",
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits that can be read: for training, for evaluation, and others."""
        return (self.train_split, self.eval_split, *self.other_splits)

    def example(self, row: Row, row_id: str) -> Example:
        """Makes an example from a row in the hub schema.

        Raises:
            DataError: If a column is missing or a value is not allowed; the message names the row.
        """
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            raise DataError(
                f"{row_id}: task '{self.name}' needs '{missing[0]}'; "
                f"found columns: {', '.join(map(str, row)) or 'none'}.",
                hint=f"Rows need the columns of the hub dataset {self.hub_id}: {', '.join(self.columns)}.",
            )
        return self.build(row, row_id)

    def examples(self, rows: Iterable[Row], split: str) -> tuple[Example, ...]:
        """Makes examples from rows in the hub schema, with ids "split[index]"."""
        return tuple(self.example(row, f"{split}[{index}]") for index, row in enumerate(rows))


def add(*tasks: Task) -> None:
    """Registers tasks under their names."""
    for task in tasks:
        TASKS.register(task.name)(task)


def load_task(
    name: str,
    folder: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    *,
    skip_bad: bool = False,
) -> ExampleSet:
    """Reads one split of a named task.

    Args:
        name: A registered task.
        folder: Local folder (or file) in the hub schema, with train.jsonl, test.jsonl and so on;
            None reads from the hub.
        split: One of the task's `splits`; with a folder, any split it has files for.
        limit: Largest number of rows to sample, >= 1; None takes all.
        seed: Seed of the sampling.
        skip_bad: Drop and count rows that are not in the hub schema instead of refusing them.

    Raises:
        ConfigError: If the task or, on the hub, the split is unknown.
        DataError: If the data are missing or not in the hub schema.
    """
    task = TASKS.find(name)
    notes = []
    if folder is not None:
        if not Path(folder).expanduser().exists():
            raise DataError(
                f"Task '{name}': there is no folder {Path(folder).absolute()}.",
                hint=f"Give a folder with {split}.jsonl, with the columns {', '.join(task.columns)}.",
            )
        table = read_rows(folder, split, skip_bad=skip_bad)
    else:
        # The hub may have this split, but splits that are not in the list have no answers.
        if split not in task.splits:
            raise ConfigError(
                f"Task '{name}' has no split '{split}' to read.{suggest(split, task.splits)}",
                hint=f"Allowed: {', '.join(task.splits)}.",
            )
        hub_split = task.train_split if task.hold_out else split
        table = read_hub(
            task.hub_id,
            hub_split,
            config=task.hub_config,
            revision=task.hub_revision,
            data_files=task.hub_files.get(hub_split),
        )
    built, faults = _built(task, table, skip_bad)
    if faults:
        total = len(table.rows) + len(table.faults)
        notes.append(f"{table.source}: dropped {len(faults)} of {total} rows as unusable, first: {faults[0]}")
    examples: Sequence[Example]
    examples, note = _with_a_choice(built)
    notes += [note] if note else []
    if folder is None and task.hold_out:
        total = len(examples)
        examples = _held_out(examples, task.hold_out, evaluation=split == task.eval_split)
        notes.append(
            f"{table.source} has one split: {len(examples)} of its {total} rows are used for {split}; "
            f"{task.hold_out} are held out for evaluation, and repeated rows are left out"
        )
    examples, note = sample(examples, limit, seed)
    notes += [note] if note else []
    return ExampleSet(
        tuple(examples),
        f"{name}: {table.source}",
        f"task:{name}@{task.version}",
        table.sha256,
        len(faults),
        tuple(notes),
    )


def _built(task: Task, table: RowSet, skip_bad: bool) -> tuple[list[Example], list[str]]:
    """Returns the rows as examples, and the faults of rows that were skipped."""
    found: list[Example] = []
    faults: list[DataError] = []
    for row in table.rows:
        try:
            found.append(task.example(row.fields, row.id))
        except DataError as error:
            if not skip_bad:
                raise
            faults.append(error)
    if not found:
        raise faults[0]
    unread = [f"{row_id}: {reason}" for row_id, reason in table.faults]
    return found, unread + [fault.message for fault in faults]


def _with_a_choice(examples: Sequence[Example]) -> tuple[Sequence[Example], str]:
    """Returns the examples without questions whose options are all equal (MedMCQA has a few), and a note."""
    kept = [example for example in examples if len(example.choices) != 1]
    if len(kept) == len(examples):
        return examples, ""
    if not kept:
        raise DataError(
            f"All {len(examples)} rows have a single option.", hint="Check the options in the file."
        )
    count = len(examples) - len(kept)
    return kept, f"left out {count} of {len(examples)} rows: all their options are equal"


def _held_out(examples: Sequence[Example], count: int, *, evaluation: bool) -> list[Example]:
    """Returns one of two parts of the examples that share no prompt; both keep the order of the examples."""
    unique = list({example.prompt: example for example in reversed(examples)}.values())[::-1]
    if len(unique) <= count:
        raise DataError(f"{len(unique)} different rows are too few to hold out {count} for evaluation.")
    chosen = set(random.Random(_HOLD_OUT_SEED).sample(range(len(unique)), count))
    return [one for index, one in enumerate(unique) if (index in chosen) == evaluation]


def filled(prompt: str, row: Row, row_id: str) -> str:
    """Fills the texts of columns into a prompt that names them in braces; raises as `text_of`."""
    names = [name for _, name, _, _ in Formatter().parse(prompt) if name]
    return prompt.format_map({name: text_of(row, name, row_id) for name in names})


def text_of(row: Row, column: str, row_id: str) -> str:
    """Returns the text in `column`, stripped.

    Raises:
        DataError: If the value is empty or not text.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row_id}: '{column}' is {value!r}; a text is expected.", hint=FIX)
    return value.strip()


def texts_of(row: Row, column: str, row_id: str) -> list[str]:
    """Returns the list of texts in `column`, stripped and without empty ones.

    Raises:
        DataError: If the value is not a list of texts, or all of them are empty.
    """
    value = row[column]
    texts = list(value) if isinstance(value, list | tuple) else []
    found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not found or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{row_id}: '{column}' is {value!r}; a list of texts is expected.", hint=FIX)
    return found


def label_of(row: Row, column: str, names: Sequence[str], row_id: str) -> str:
    """Returns the name of the class number in `column` (an integer, or an integer as text from CSV).

    Raises:
        DataError: If the value is not an integer from 0 to len(names) - 1.
    """
    meanings = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    return names[number_of(row, column, range(len(names)), row_id, meanings)]


def number_of(row: Row, column: str, allowed: range, row_id: str, meanings: str = "") -> int:
    """Returns the integer in `column`, which may be text; `meanings` explains `allowed` in an error.

    Raises:
        DataError: If the value is not an integer, or not allowed.
    """
    value = row[column]
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number not in allowed:
        meanings = meanings or f"{allowed[0]} to {allowed[-1]}"
        raise refusal(row, column, row_id, meanings)
    return number


def refusal(row: Row, column: str, row_id: str, allowed: str) -> DataError:
    """Returns the error for a label that is not allowed."""
    return DataError(f"{row_id}: label '{column}' is {row[column]!r}; allowed: {allowed}.", hint=FIX)


def spaced(word: str) -> str:
    """Returns an answer or choice with the leading space that follows a prompt."""
    return f" {word}"
