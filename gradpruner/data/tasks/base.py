"""What a task is: a public dataset, its prompt and its answers, under a version.

Spacing, decided once for all tasks: a prompt ends without a space ("Answer:") and an answer begins
with one (" positive"). That is how byte-level vocabularies hold a word inside a sentence, so that
prompt and answer, tokenised apart, give the tokens of the joined text. Evaluation compares answers
stripped. A user's own prompt/completion rows are not touched by this rule.

Order, too: a prompt that does not fit loses its beginning, so long material stands first and what is
asked of it stands last.
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
"""What a task can be scored by."""

TASKS: Registry[Task] = Registry("task")
"""Every task, by name."""

CONVERTED = "refs/convert/parquet"
"""A branch of parquet files, for datasets whose main branch holds a loading script: `datasets` runs none."""

Row = Mapping[str, Any]
Build = Callable[[Row, str], Example]
"""Makes an example of (row, row id)."""

FIX = "Fix or remove this row."
"""What to do about a row that cannot be used."""

_HOLD_OUT_SEED = 0  # not the run's seed: the evaluation rows stay the same in every run


@dataclass(frozen=True)
class Task:
    """One dataset with one way of asking.

    Attributes:
        name: As registered.
        description: One sentence for lists.
        columns: Columns of the hub schema that are needed, the one that holds the answer last.
        build: Makes the examples; raises DataError naming the row.
        hub_id: "owner/name" on the Hugging Face hub.
        version: >= 1; raised whenever a prompt or an answer changes, because scores before and
            after cannot be compared.
        hub_config: Configuration there; None is the default one.
        hub_revision: Branch, tag or commit; None is the main branch.
        hub_files: File pattern per split, for repositories that have to be read file by file.
        hold_out: Rows kept out of the hub's only split for evaluation; 0 where the hub has its own
            evaluation split.
        metric: "accuracy": the answer must match exactly, up to surrounding space and case. "exact_match":
            the same where the options are so many that scoring each would cost more than the answer.
            "similarity": the mean of BERTScore F1 and ROUGE-L F1. "final_number": the last number must be
            the right one.
        train_split: Split to learn from.
        eval_split: Split to measure on; one whose answers are public.
        other_splits: Further splits on the hub that hold answers.
        train_limit: Rows the paper samples to train on; None where it takes all, or does not use the task.
        probe: Whether it is a reasoning probe: run beside the user's own task to show what depth pruning
            costs, not a task one prunes for.
        paper: Where the paper reports it, e.g. "Table 1"; "" if nowhere.

    Raises:
        ConfigError: If the metric is unknown, a split stands twice, or `hub_files` lacks one.
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
                f"Task '{self.name}' reads the hub file by file, but names none for {', '.join(lacking)}.",
                hint="Add its pattern to hub_files.",
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that can be read: to learn from, to measure on, and others."""
        return (self.train_split, self.eval_split, *self.other_splits)

    def example(self, row: Row, row_id: str) -> Example:
        """Returns a row in the hub schema as an example.

        Raises:
            DataError: If a column is missing or a value is not allowed; the row is named.
        """
        missing = [column for column in self.columns if row.get(column) is None]
        if missing:
            raise DataError(
                f"{row_id}: task '{self.name}' needs '{missing[0]}'; "
                f"found columns: {', '.join(map(str, row)) or 'none'}.",
                hint=f"Rows must be as on the hub ({self.hub_id}): {', '.join(self.columns)}.",
            )
        return self.build(row, row_id)

    def examples(self, rows: Iterable[Row], split: str) -> tuple[Example, ...]:
        """Returns rows in the hub schema as examples called "split[index]"."""
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
            None reads the hub.
        split: One of the task's `splits`; from a folder, any file's name.
        limit: Sample this many rows at most, >= 1; None takes all.
        seed: Of the sampling.
        skip_bad: Drop and count rows that are not in the hub's schema instead of refusing them.

    Raises:
        ConfigError: If the task or, on the hub, the split is unknown.
        DataError: If the data are missing or not in the hub schema.
    """
    task = TASKS.find(name)
    notes = []
    if folder is not None:
        if not Path(folder).expanduser().exists():
            raise DataError(
                f"Task '{name}': no folder {Path(folder).absolute()}.",
                hint=f"It must hold {split}.jsonl with the columns {', '.join(task.columns)}.",
            )
        table = read_rows(folder, split, skip_bad=skip_bad)
    else:
        # Also where the hub has such a split: those left out here come without answers.
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
            f"{table.source} has one split: {len(examples)} of its {total} rows are {split}, "
            f"repeated rows left out, {task.hold_out} held out for evaluation"
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
    """The rows as examples, and the faults of the rows that were skipped."""
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
    """Leaves out questions whose options are all one text, as MedMCQA has a few; a note says how many."""
    kept = [example for example in examples if len(example.choices) != 1]
    if len(kept) == len(examples):
        return examples, ""
    if not kept:
        raise DataError(f"All {len(examples)} rows offer one option only.", hint="Check the file's options.")
    count = len(examples) - len(kept)
    return kept, f"left out {count} of {len(examples)} rows: their options are all the same text"


def _held_out(examples: Sequence[Example], count: int, *, evaluation: bool) -> list[Example]:
    """Splits one table in two that share no prompt; both keep the order of the table."""
    unique = list({example.prompt: example for example in reversed(examples)}.values())[::-1]
    if len(unique) <= count:
        raise DataError(f"{len(unique)} different rows are too few to hold {count} out for evaluation.")
    chosen = set(random.Random(_HOLD_OUT_SEED).sample(range(len(unique)), count))
    return [one for index, one in enumerate(unique) if (index in chosen) == evaluation]


def filled(prompt: str, row: Row, row_id: str) -> str:
    """Returns a prompt with the texts of the columns it names in braces; raises as `text_of`."""
    names = [name for _, name, _, _ in Formatter().parse(prompt) if name]
    return prompt.format_map({name: text_of(row, name, row_id) for name in names})


def text_of(row: Row, column: str, row_id: str) -> str:
    """Returns the text in `column`, stripped.

    Raises:
        DataError: If it is not text, or empty.
    """
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{row_id}: '{column}' is {value!r}, not a text.", hint=FIX)
    return value.strip()


def texts_of(row: Row, column: str, row_id: str) -> list[str]:
    """Returns the list of texts in `column`, stripped, the empty ones left out.

    Raises:
        DataError: If it is not a list of texts, or none of them holds anything.
    """
    value = row[column]
    texts = list(value) if isinstance(value, list | tuple) else []
    found = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    if not found or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{row_id}: '{column}' is {value!r}, not a list of texts.", hint=FIX)
    return found


def label_of(row: Row, column: str, names: Sequence[str], row_id: str) -> str:
    """Returns the name of the class number in `column` (a whole number, also as text from CSV).

    Raises:
        DataError: If it is not a whole number from 0 to len(names) - 1.
    """
    meanings = ", ".join(f"{index} {name}" for index, name in enumerate(names))
    return names[number_of(row, column, range(len(names)), row_id, meanings)]


def number_of(row: Row, column: str, allowed: range, row_id: str, meanings: str = "") -> int:
    """Returns the whole number in `column`, also written as text; `meanings` explains `allowed` in an error.

    Raises:
        DataError: If it is not a whole number, or not allowed.
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
    """Returns an answer or choice as it follows a prompt: with one leading space."""
    return f" {word}"
