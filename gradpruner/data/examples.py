"""The usable rows of a file as examples, sampled, with what the user should know of them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gradpruner.data.rows import Row, RowSet, read_rows
from gradpruner.data.shapes import FORMATS, BadRow, Example, Message, Shape
from gradpruner.errors import ConfigError, DataError
from gradpruner.registry import suggest

__all__ = [
    "FORMATS",
    "Example",
    "ExampleSet",
    "Message",
    "as_conversation",
    "load_examples",
    "overlap",
    "sample",
]

_ROWS_LOOKED_AT = 20  # to tell the shape; more than one, because the first may be the bad one
_ROWS_NAMED = 3  # in an error about many rows


@dataclass(frozen=True)
class ExampleSet:
    """The usable rows of one source.

    Attributes:
        examples: At least one, in the order of the file.
        source: Path, hub id or task.
        format: One of `FORMATS`, or "task:<name>@<version>".
        sha256: Of the file's bytes; of the canonical rows for a hub dataset.
        num_dropped: Unusable rows left out on request.
        notes: What the user should know: sampling, unused columns, dropped rows.
    """

    examples: tuple[Example, ...]
    source: str
    format: str
    sha256: str
    num_dropped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)


def load_examples(
    source: str | Path,
    *,
    split: str = "train",
    format: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> ExampleSet:
    """Reads a user's own data.

    Args:
        source: A file (JSON Lines, JSON, CSV, TSV, parquet), a folder with a file per split, or a
            hub dataset id ("owner/name", "owner/name:config"). "path#N" samples N rows.
        split: The file of a folder, key of a JSON object or split of a hub dataset.
        format: "auto" or one of `FORMATS`.
        limit: Sample this many rows at most, >= 1; None takes all. With "#N", the smaller counts.
        seed: Of the sampling.
        skip_bad: Drop and count unusable rows instead of refusing the file.

    Raises:
        ConfigError: If `format` or `limit` is not allowed.
        DataError: If nothing is found, a file is malformed, the columns are not recognised, or rows
            are unusable; the message names file, row, field and what to do.
    """
    if format != "auto" and format not in FORMATS:
        raise ConfigError(
            f"Unknown data format '{format}'.{suggest(format, FORMATS)}",
            hint=f"Allowed: auto, {', '.join(FORMATS)}.",
        )
    path, sample_size = _split_sample_suffix(str(source), limit)
    rows = read_rows(path, split, skip_bad=skip_bad)
    name = _detect(rows) if format == "auto" else format
    shape = FORMATS[name]
    examples: list[Example] = []
    faults = list(rows.faults)
    for row in rows.rows:
        try:
            examples.append(shape.build(row.id, row.fields))
        except BadRow as fault:
            faults.append((row.id, str(fault)))
    total = len(rows.rows) + len(rows.faults)
    _check_faults(rows, name, faults, skip_bad)
    notes = [_unused_note(rows.rows, shape)]
    if faults:
        notes.append(f"{rows.source}: dropped {len(faults)} of {total} rows as unusable")
    chosen, note = sample(examples, sample_size, seed)
    notes.append(note)
    return ExampleSet(tuple(chosen), rows.source, name, rows.sha256, len(faults), tuple(filter(None, notes)))


def sample(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Sequence[Example], str]:
    """Returns `limit` random examples in their old order (all, if None or too few) and a note.

    Raises:
        ConfigError: If `limit` is below 1.
    """
    if limit is None:
        return examples, ""
    if limit < 1:
        raise ConfigError(f"Cannot sample {limit} rows.", hint="Give a number of at least 1.")
    if limit >= len(examples):
        return examples, f"asked for {limit} rows, there are {len(examples)}: all are used"
    kept = sorted(random.Random(seed).sample(range(len(examples)), limit))
    return [examples[i] for i in kept], f"sampled {limit} of {len(examples)} rows with seed {seed}"


def as_conversation(example: Example) -> Example:
    """The same question as a conversation: the prompt is the user's turn, the answer the assistant's."""
    if example.messages:
        return example
    answer = example.answer.strip()
    turns = (Message("user", example.prompt), Message("assistant", answer))
    choices = tuple(choice.strip() for choice in example.choices)
    return replace(example, prompt="", answer=answer, choices=choices, messages=turns)


def overlap(train: Iterable[Example], evaluation: Iterable[Example]) -> int:
    """Counts evaluation examples whose exact prompt (or conversation) was trained on too."""

    def key(example: Example) -> tuple[str, tuple[Message, ...]]:
        return example.prompt, example.messages[:-1]

    seen = {key(example) for example in train}
    return sum(key(example) in seen for example in evaluation)


def _split_sample_suffix(source: str, limit: int | None) -> tuple[str, int | None]:
    """Separates "path#N" into path and N, unless a file is really called that."""
    match = re.fullmatch(r"(.+)#(\d{1,15})", source)
    if not match or Path(source).expanduser().exists():
        return source, limit
    count = int(match[2])
    return match[1], count if limit is None else min(count, limit)


def _detect(rows: RowSet) -> str:
    """The name of the shape whose required columns the first rows have."""
    found: dict[str, None] = {}
    for row in rows.rows[:_ROWS_LOOKED_AT]:
        found.update(dict.fromkeys(row.fields))
    for name, shape in FORMATS.items():
        if found.keys() >= set(shape.required):
            return name
    from gradpruner.data.tasks import TASKS  # tasks are made of examples: they import this module

    # The most columns win: MMLU's rows have those of GSM8K too.
    fitting = {n: len(c) for n in TASKS.names() if found.keys() >= set(c := TASKS.find(n).columns)}
    names = [f"'{n}'" for n, count in fitting.items() if count == max(fitting.values())]
    hint = "Rename the columns."
    if names:
        hint = f"These are the columns of the task {' or '.join(names)}: name that task instead."
    shapes = "; ".join(f"({i}) {shape.columns()}" for i, shape in enumerate(FORMATS.values(), 1))
    raise DataError(
        f"{rows.source}: columns not recognised: {', '.join(map(str, found)) or 'none'}. Accepted: {shapes}.",
        hint=hint,
    )


def _check_faults(rows: RowSet, name: str, faults: Sequence[tuple[str, str]], skip_bad: bool) -> None:
    total = len(rows.rows) + len(rows.faults)
    if not faults or (skip_bad and len(faults) < total):
        return
    named = "; ".join(f"{row_id}: {reason}" for row_id, reason in faults[:_ROWS_NAMED])
    more = len(faults) - _ROWS_NAMED
    named += f"; and {more} more" if more > 0 else ""
    hint = "Fix these rows" + ("." if skip_bad else ", or drop them with --skip-bad.")
    if len(faults) == total:
        hint = f"No row can be read as {name}; its columns are {FORMATS[name].columns()}."
    raise DataError(f"{rows.source}: {len(faults)} of {total} rows cannot be used: {named}.", hint)


def _unused_note(rows: Sequence[Row], shape: Shape) -> str:
    """Names the columns that hold something and are not looked at, and in how many rows they do."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, value in row.fields.items():
            if name not in shape.used(row.fields) and value not in (None, "", [], {}):
                counts[str(name)] = counts.get(str(name), 0) + 1
    named = ", ".join(f"{name} ({count} rows)" for name, count in counts.items())
    return f"columns not used: {named}" if named else ""
