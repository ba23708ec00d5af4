"""Loads the rows of a user's own file as examples, sampled, with notes for the user."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gradpruner.common.errors import DataError
from gradpruner.common.registry import check_known
from gradpruner.data import advice
from gradpruner.data.examples import Example, ExampleSet, sample
from gradpruner.data.layouts import LABELS, TEXTS, Layout, column_names, labelled_columns, renamed, templated
from gradpruner.data.parsing import DataRow
from gradpruner.data.rows import RowSet, read_rows
from gradpruner.data.shapes import FORMATS, BadRow, Shape
from gradpruner.data.tasks import TASKS

LABELLED = "labelled_text"
"""The fifth format: a text and its label."""

_ROWS_LOOKED_AT = 20  # to detect the shape; more than one, because the first row may be a bad one
_ROWS_NAMED = 3  # in an error about many rows
_AS_WRITTEN = Layout()


def load_examples(
    source: str | Path,
    *,
    split: str = "train",
    format: str = "auto",
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    layout: Layout = _AS_WRITTEN,
) -> ExampleSet:
    """Reads a user's own data.

    Args:
        source: A file (JSON Lines, JSON, CSV, TSV, parquet), a folder with a file per split, or a
            hub dataset id ("owner/name", "owner/name:config"). "path#N" samples N rows.
        split: The file of a folder, key of a JSON object, or split of a hub dataset.
        format: "auto", "labelled_text" or one of `FORMATS`.
        limit: Largest number of rows to sample, >= 1; None takes all. With "#N", the smaller number applies.
        seed: Seed of the sampling.
        skip_bad: Drop and count unusable rows instead of refusing the file.
        layout: What the columns mean: other names, templates, names of labels.

    Raises:
        ConfigError: If `format`, `limit` or a template is not allowed.
        DataError: If nothing is found, a file is malformed, the columns are not recognised, or rows
            are unusable. The message names file, row and field, and says what to do.
    """
    allowed = ("auto", *FORMATS, LABELLED)
    check_known("data format", format, allowed)
    path, sample_size = split_sample_suffix(str(source), limit)
    rows = renamed(read_rows(path, split, skip_bad=skip_bad), layout)
    name, shape, note = _shape_of(rows, format, layout)
    examples: list[Example] = []
    faults, hints = list(rows.faults), {"" for _ in rows.faults}
    for row in rows.rows:
        try:
            examples.append(shape.build(row.id, row.fields))
        except BadRow as fault:
            faults.append((row.id, str(fault)))
            hints.add(fault.hint)
    total = len(rows.rows) + len(rows.faults)
    _check_faults(rows, name, shape, faults, hints, skip_bad)
    notes = [note, _unused_note(rows.rows, shape)]
    if faults:
        notes.append(f"{rows.source}: dropped {len(faults)} of {total} rows as unusable")
    chosen, note = sample(examples, sample_size, seed)
    notes.append(note)
    return ExampleSet(
        tuple(chosen),
        rows.source,
        name + layout.mark(),
        rows.sha256,
        len(faults),
        tuple(filter(None, notes)),
    )


def _shape_of(rows: RowSet, format: str, layout: Layout) -> tuple[str, Shape, str]:
    """Returns the name of the rows' shape, the shape, and a note about it."""
    if layout.has_templates:
        return "templates", *templated(rows, layout)
    name = _detect(rows) if format == "auto" else format
    if name != LABELLED:
        unused = f"data.labels is not used: it is for a text and its label, and these rows are {name}"
        return name, FORMATS[name], unused if layout.labels else ""
    if labelled_columns(column_names(rows)) is None:
        raise _unrecognised(rows, column_names(rows), "Rename the columns, or map them in data.columns.")
    tasks = _tasks_with(column_names(rows))
    try:
        shape, note = templated(rows, layout)
    except DataError as error:
        if tasks:  # their labels have names
            error.hint = f"{error.hint} If these are rows of the task {tasks}, give data.task instead."
        raise
    if tasks:
        note += f"; the task {tasks} has these columns too: if these are its rows, give data.task instead"
    return name, shape, note


def split_sample_suffix(source: str, limit: int | None) -> tuple[str, int | None]:
    """Splits "path#N" into path and N, unless a file has that name."""
    match = re.fullmatch(r"(.+)#(\d{1,15})", source)
    if not match or Path(source).expanduser().exists():
        return source, limit
    count = int(match[2])
    return match[1], count if limit is None else min(count, limit)


def _detect(rows: RowSet) -> str:
    """Returns the name of the shape whose required columns the first rows have."""
    found: dict[str, None] = {}
    for row in rows.rows[:_ROWS_LOOKED_AT]:
        found.update(dict.fromkeys(row.fields))
    for name, shape in FORMATS.items():
        if found.keys() >= set(shape.required):
            return name
    labelled = labelled_columns(tuple(found))
    tasks = _tasks_with(tuple(found))
    # Rows with the columns of a task that needs more than text and label are not a text and its label.
    if labelled and not _tasks_with(tuple(found), more_than=len(labelled)):
        return LABELLED
    hint = f"These are the columns of the task {tasks}: give data.task instead." if tasks else ""
    hint = hint or advice.on_columns(rows, list(map(str, found)))
    raise _unrecognised(rows, tuple(found), hint)


_COMMON = {"text", "label"}  # too common to tell which task the rows are from


def _tasks_with(columns: Sequence[str], more_than: int = 0) -> str:
    """Returns the tasks whose columns are all present and more than `more_than`; "" if there are none."""
    if set(columns) == _COMMON:
        return ""
    needed = {name: TASKS.find(name).columns for name in TASKS.names()}
    fitting = {n: len(c) for n, c in needed.items() if len(c) > more_than and set(columns) >= set(c)}
    # Tasks that need the most columns win: MMLU's rows also have the columns of GSM8K.
    return " or ".join(f"'{n}'" for n, count in fitting.items() if count == max(fitting.values()))


def _unrecognised(rows: RowSet, found: Sequence[str], hint: str) -> DataError:
    accepted = [shape.columns() for shape in FORMATS.values()]
    accepted.append(f"one of {'/'.join(TEXTS)} with one of {'/'.join(LABELS)}")
    shapes = "; ".join(f"({i}) {columns}" for i, columns in enumerate(accepted, 1))
    named = ", ".join(map(str, found)) or "none"
    return DataError(f"{rows.source}: columns not recognised: {named}. Accepted: {shapes}.", hint=hint)


def _check_faults(
    rows: RowSet,
    name: str,
    shape: Shape,
    faults: Sequence[tuple[str, str]],
    hints: set[str],
    skip_bad: bool,
) -> None:
    """Raises DataError if there are faults that may not be skipped; `hints` says what to do about each."""
    total = len(rows.rows) + len(rows.faults)
    if not faults or (skip_bad and len(faults) < total):
        return
    named = "; ".join(f"{row_id}: {reason}" for row_id, reason in faults[:_ROWS_NAMED])
    more = len(faults) - _ROWS_NAMED
    named += f"; and {more} more" if more > 0 else ""
    hint = "Fix these rows" + ("." if skip_bad else ", or drop them with --skip-bad.")
    other = advice.on_other_layouts(rows, shape, [row_id for row_id, _ in faults])
    if other and len(faults) < total:
        hint = other
    elif len(hints) == 1 and (same := "".join(hints)):
        hint = same if len(faults) == total else f"{same} Or drop these rows with --skip-bad."
    elif len(faults) == total:
        hint = f"No row can be read as {name}, which has the columns {shape.columns()}."
    raise DataError(f"{rows.source}: {len(faults)} of {total} rows cannot be used: {named}.", hint)


def _unused_note(rows: Sequence[DataRow], shape: Shape) -> str:
    """Returns a note of columns that are not empty but not used, with their numbers of rows."""
    counts: dict[str, int] = {}
    for row in rows:
        for name, value in row.fields.items():
            if name not in shape.used(row.fields) and value not in (None, "", [], {}):
                counts[str(name)] = counts.get(str(name), 0) + 1
    named = ", ".join(f"{name} ({count} rows)" for name, count in counts.items())
    return f"columns not used: {named}" if named else ""
