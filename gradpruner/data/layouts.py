"""Rows with a user's own columns: other names, templates over columns, and texts with a label.

A labelled text becomes `LABELLED_PROMPT` and `LABELLED_COMPLETION`, filled with its columns. The names of all
labels are the choices of every row, so that likelihoods of labels can be measured besides greedy answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from string import Formatter
from typing import Any

from gradpruner.common.errors import ConfigError, DataError
from gradpruner.common.provenance import sha256_json
from gradpruner.data.examples import Example
from gradpruner.data.parsing import DataRow, kind_of
from gradpruner.data.rows import RowSet
from gradpruner.data.shapes import BadRow, Shape, text_field

TEXTS = ("text", "sentence", "review", "question", "content", "body")
"""Columns a labelled text may be in; the first one present is used."""

LABELS = ("label_text", "label", "category", "intent", "class")
"""Columns its label may be in; the first one present is used."""

LABELLED_PROMPT = "{%s}\nLabel:"
LABELLED_COMPLETION = " {%s}"

_MOST_CHOICES = 200  # different labels; a column with more is free text
_NAMED = 8  # labels in a message


@dataclass(frozen=True)
class Layout:
    """What the user says about the meaning of columns.

    Attributes:
        columns: Name a shape knows ("prompt", "completion", "system", "text" ...) -> column of the file.
        prompt: Text with columns in braces, e.g. "Question: {question}\\nAnswer:"; None: as the shape does.
        completion: The same for the answer.
        labels: Names of labels: a list, counted from 0, or label -> name; None takes them from the file.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None
    completion: str | None = None
    labels: Sequence[str] | Mapping[int | str, str] | None = None

    @property
    def has_templates(self) -> bool:
        """Whether the user gives templates."""
        return self.prompt is not None or self.completion is not None

    def mark(self) -> str:
        """Returns a mark of the layout, by its hash, for the format of a set; "" if the user says nothing."""
        if not any((self.columns, self.prompt, self.completion, self.labels)):
            return ""
        labels = _names_given(self.labels) if self.labels else None
        return f", layout {sha256_json([dict(self.columns), self.prompt, self.completion, labels])[:12]}"


def column_names(rows: RowSet) -> tuple[str, ...]:
    """Returns every column that any row has, in order of appearance."""
    return tuple(dict.fromkeys(str(name) for row in rows.rows for name in row.fields))


def renamed(rows: RowSet, layout: Layout) -> RowSet:
    """Returns the rows with their columns renamed by `layout.columns`.

    Raises:
        DataError: If a column does not exist.
    """
    if not layout.columns:
        return rows
    _refuse_unknown(rows, layout.columns.values(), "data.columns")
    changed = tuple(DataRow(row.id, _renamed(row.fields, layout.columns)) for row in rows.rows)
    names = dict(rows.label_names)
    names |= {new: rows.label_names[old] for new, old in layout.columns.items() if old in names}
    return replace(rows, rows=changed, label_names=names)


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    found = {name: value for name, value in fields.items() if name not in columns.values()}
    found |= {new: fields[old] for new, old in columns.items() if old in fields}
    asked, answer = found.get("prompt"), found.get("completion")
    if "system" in columns and isinstance(asked, str) and isinstance(answer, str):
        # Only a conversation has a system turn.
        found["prompt"] = [{"role": "user", "content": asked}]
        found["completion"] = [{"role": "assistant", "content": answer}]
    return found


def labelled_columns(columns: Sequence[str]) -> tuple[str, str] | None:
    """Returns the columns of text and label; None if one of them is missing."""
    text = next((name for name in TEXTS if name in columns), None)
    label = next((name for name in LABELS if name in columns), None)
    return (text, label) if text and label else None


def templated(rows: RowSet, layout: Layout) -> tuple[Shape, str]:
    """Returns a shape that fills rows into templates, the user's or those of labelled text, and a note.

    Raises:
        ConfigError: If a template cannot be read, or one of the two is missing.
        DataError: If a column does not exist, or labels are numbers without names.
    """
    present = column_names(rows)
    labelled = labelled_columns(present)
    if labelled and layout.labels and "label" in present:
        labelled = (labelled[0], "label")  # the user has named the numbers of this column
    prompt = layout.prompt or (LABELLED_PROMPT % labelled[0] if labelled else _own("prompt", present))
    completion = layout.completion or (
        LABELLED_COMPLETION % labelled[1] if labelled else _own("completion", present)
    )
    asked, answered = _Template("data.prompt", prompt), _Template("data.completion", completion)
    for template in (asked, answered):
        _refuse_unknown(rows, template.columns, template.key)
    names: dict[str, str] = {}
    only = answered.columns[0] if len(answered.columns) == 1 else ""
    if only in (*LABELS, *rows.label_names) or (layout.labels and only):
        names = _label_names(rows, only, layout)
    choices = {name: answered.filled({only: name}) for name in names.values()}

    def build(row_id: str, fields: Mapping[str, Any]) -> Example:
        question = asked.filled(fields)
        if not names:
            return Example(row_id, question, answered.filled(fields))
        answer = choices[_name_of(fields, only, names)]
        return Example(row_id, question, answer, tuple(dict.fromkeys(choices.values())))

    # A second column with the names or the numbers of the same labels is not reported as unused.
    twin = ("label",) if only == "label_text" else ("label_text",) if only == "label" else ()
    shape = Shape(tuple(dict.fromkeys((*asked.columns, *answered.columns))), twin, build)
    return shape, f"labels: {', '.join(choices)}" if choices else ""


def _own(name: str, present: Sequence[str]) -> str:
    if name in present:
        return f"{{{name}}}"
    raise ConfigError(
        f"data.{name} is not given, and the rows have no column '{name}' (columns: {', '.join(present)}).",
        hint=f"Give data.{name}: text with columns in braces, such as '{{{present[0]}}}'.",
    )


def _refuse_unknown(rows: RowSet, wanted: Any, key: str) -> None:
    present = column_names(rows)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        raise DataError(
            f"{rows.source}: {key} names the column '{unknown[0]}', which does not exist. "
            f"Columns: {', '.join(present)}.",
            hint=f"Correct {key}; double braces that are part of the text: {{{{ }}}}.",
        )


class _Template:
    """Text with columns in braces. Only names are allowed: attributes, indexes and formats could run code."""

    def __init__(self, key: str, text: str) -> None:
        self.key = key
        try:
            self.pieces = [(text, name, spec, how) for text, name, spec, how in Formatter().parse(text)]
        except ValueError as error:
            raise ConfigError(
                f"{key} is {text!r}: {error}.",
                hint="Write columns in braces, and double braces that are part of the text.",
            ) from error
        self.columns = tuple(dict.fromkeys(name for _, name, _, _ in self.pieces if name is not None))
        if not self.columns or "" in self.columns or any(spec or how for _, _, spec, how in self.pieces):
            raise ConfigError(
                f"{key} is {text!r}. It must contain at least one column in braces, by its name alone.",
                hint="For example: 'Question: {question}\\nAnswer:'.",
            )

    def filled(self, fields: Mapping[str, Any]) -> str:
        values = {name: _value(fields, name) for name in self.columns}
        if not any(value.strip() for value in values.values()):
            raise BadRow(f"{self.key}: no text in {' and '.join(map(repr, self.columns))}")
        return "".join(text + (values[name] if name is not None else "") for text, name, _, _ in self.pieces)


def _value(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return text_field(fields, name, blank=isinstance(value, str))


class UnnamedLabels(DataError):
    """Labels are numbers without names.

    Attributes:
        labels: The numbers as text.
    """

    def __init__(self, labels: Sequence[str], message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.labels = tuple(sorted(labels, key=int))


def _names_given(labels: Sequence[str] | Mapping[int | str, str]) -> dict[str, str]:
    """Returns label as written -> name; rows may also contain the names themselves."""
    pairs = labels.items() if isinstance(labels, Mapping) else enumerate(labels)
    found = {str(key): str(name) for key, name in pairs}
    return found | {name: name for name in found.values() if name not in found}


def _refuse_doubtful(labels: Sequence[str] | Mapping[int | str, str]) -> None:
    """Refuses blank names, and a list that has a name twice or calls a number another number.

    Such a list is meant as the labels themselves more often than as names of numbers that count from 0.
    """
    listed = not isinstance(labels, Mapping)
    names = [str(name) for name in (labels.values() if isinstance(labels, Mapping) else labels)]
    if doubtful := [name for name in names if not name.strip() or (listed and names.count(name) > 1)]:
        what = f"the name '{doubtful[0]}' twice" if doubtful[0].strip() else "a name without text"
        hint = "Give each label a name of its own; a mapping {0: bad, 1: bad, 2: good} may join labels."
        raise ConfigError(f"data.labels has {what}.", hint=hint)
    moved = [(key, name) for key, name in enumerate(names) if name.isdecimal() and name != str(key)]
    if moved and listed:
        key, name = moved[0]
        raise ConfigError(
            f"data.labels is a list, counted from 0, so it calls the label {key} '{name}'.",
            hint=f"Say which number is meant: {{{name}: '{name}', ...}} if labels are to stay as they are, "
            f"{{{key}: '{name}', ...}} otherwise.",
        )


def _label_names(rows: RowSet, column: str, layout: Layout) -> dict[str, str]:
    """Returns label as written -> name: the user's names, else the file's, else the labels themselves.

    {} if there are too many different values to be labels.
    """
    given = layout.labels or rows.label_names.get(column)
    if layout.labels:
        _refuse_doubtful(layout.labels)
    if given:
        return _names_given(given)
    written: set[str] = set()
    for row in rows.rows:
        try:
            written.add(_as_written(row.fields, column))
        except BadRow:  # reported when the row is built
            continue
    labels = sorted(written)
    if labels and all(label.removeprefix("-").isdecimal() for label in labels):
        raise UnnamedLabels(
            labels,
            f"{rows.source}: the labels in column '{column}' are numbers ({', '.join(labels[:_NAMED])}) "
            "without names.",
            hint="Name them in data.labels: a list counted from 0 ([negative, positive]) or a mapping "
            "({0: negative, 1: positive}).",
        )
    if len(labels) == 1:
        raise DataError(
            f"{rows.source}: every row has the label '{labels[0]}'.",
            hint="List all possible labels in data.labels, for example [negative, positive].",
        )
    return {label: label for label in labels} if len(labels) <= _MOST_CHOICES else {}


def _as_written(fields: Mapping[str, Any], column: str) -> str:
    value = fields.get(column)
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, float):
        raise BadRow(f"field '{column}' is {value!r}, which is not a label ({kind_of(value)})")
    return text_field(fields, column).strip()


def _name_of(fields: Mapping[str, Any], column: str, names: Mapping[str, str]) -> str:
    label = _as_written(fields, column)
    if label not in names:
        known = list(dict.fromkeys(f"{key} {name}" if key != name else key for key, name in names.items()))
        raise BadRow(f"label '{label}' in '{column}' has no name; known: {', '.join(known[:_NAMED])}")
    return names[label]
