"""The rows of a task as prompt and answer, whatever shape they were written in.

    prompt/completion         text and text; optionally "choices", a list of all completions
    instruction/input/output  the Alpaca shape; "input" may be missing or empty
    conversations             the ShareGPT shape: [{"from": human|gpt|system, "value": text}]
    messages                  [{"role": user|assistant|system, "content": text}]

The shape is told from the columns of the first rows. prompt/completion is taken as it stands:
nothing is added and nothing is stripped, so the completion carries its own leading space. Nothing
here knows a tokenizer; that is encoding.py.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradpruner.data.rows import Row, RowSet, kind_of, read_rows
from gradpruner.errors import ConfigError, DataError
from gradpruner.registry import suggest

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_ROWS_LOOKED_AT = 20  # to tell the shape; more than one, because the first may be the bad one
_ROWS_NAMED = 3  # in an error about many rows


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One thing to learn: after this prompt, this answer.

    Attributes:
        id: Stable within the source, e.g. "train.jsonl:17".
        prompt: Text before the answer; "" when `messages` is given.
        answer: Text to be learned and compared, without an end-of-text token.
        choices: Every possible answer, written like `answer`; () for free text.
        messages: The conversation, the last turn the assistant's, equal to `answer`; () otherwise.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()


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


class _BadRow(Exception):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class _Shape:
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], Example]

    def columns(self) -> str:
        return ", ".join([*self.required, *(f"[{name}]" for name in self.optional)])


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
        except _BadRow as fault:
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
    match = re.fullmatch(r"(.+)#(\d+)", source)
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


def _unused_note(rows: Sequence[Row], shape: _Shape) -> str:
    found: dict[str, None] = {}
    for row in rows:
        found.update(dict.fromkeys(row.fields))
    unused = [str(name) for name in found if name not in shape.required + shape.optional]
    return f"columns not used: {', '.join(unused)}" if unused else ""


def _text(fields: Mapping[str, Any], name: str, *, blank: bool = False) -> str:
    """The text of one field; `blank` says whether missing and empty are fine."""
    if name not in fields and not blank:
        raise _BadRow(f"field '{name}' is missing")
    value = fields.get(name)
    if value is None:
        if blank:
            return ""
        raise _BadRow(f"field '{name}' is null")
    if not isinstance(value, str):
        shown = json.dumps(value, default=str, ensure_ascii=False)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise _BadRow(f"field '{name}' is {kind_of(value)} ({shown}), not text")
    if not value.strip() and not blank:
        raise _BadRow(f"field '{name}' is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _BadRow(f"field '{name}' holds half a surrogate pair, which is no character")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    """The list in one field; a CSV cell holds it as JSON."""
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise _BadRow(f"field '{name}' is not a JSON list") from error
    if not isinstance(value, list):
        if name not in fields:
            raise _BadRow(f"field '{name}' is missing")
        raise _BadRow(f"field '{name}' is {kind_of(value)}, not a list")
    if not value:
        raise _BadRow(f"field '{name}' is empty")
    return value


def _choices(fields: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    if fields.get("choices") in (None, "", []):
        return ()
    choices = tuple(_list(fields, "choices"))
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise _BadRow("field 'choices' holds something that is not text, or is empty")
    if len(set(choices)) != len(choices):
        raise _BadRow("field 'choices' names a choice twice")
    if answer not in choices:
        raise _BadRow(f"the answer {answer!r} is not one of the choices {list(choices)!r}")
    return choices


def _from_completion(row_id: str, fields: Mapping[str, Any]) -> Example:
    if isinstance(fields.get("prompt"), list):  # the conversational variant of TRL
        turns = _list(fields, "prompt") + _list(fields, "completion")
        if fields.get("choices"):
            raise _BadRow("field 'choices' goes with a text prompt, not with conversation turns")
        return _from_turns(row_id, turns)
    answer = _text(fields, "completion")
    prompt = _text(fields, "prompt")
    return Example(row_id, prompt, answer, _choices(fields, answer))


def _from_alpaca(row_id: str, fields: Mapping[str, Any]) -> Example:
    instruction = _text(fields, "instruction")
    answer = _text(fields, "output")
    given = _text(fields, "input", blank=True)
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    prompt = template.format(instruction=instruction, input=given)
    return Example(row_id, prompt, answer, _choices(fields, answer))


def _from_conversations(row_id: str, fields: Mapping[str, Any]) -> Example:
    turns = _list(fields, "conversations")
    system = _text(fields, "system", blank=True)
    if system.strip():
        turns = [{"from": "system", "value": system}, *turns]
    return _from_turns(row_id, turns)


def _from_messages(row_id: str, fields: Mapping[str, Any]) -> Example:
    return _from_turns(row_id, _list(fields, "messages"))


def _from_turns(row_id: str, turns: Sequence[Any]) -> Example:
    messages = tuple(_message(turn, number) for number, turn in enumerate(turns, start=1))
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise _BadRow("a system turn stands after the first turn")
    if roles[0] == "assistant" or "user" not in roles:
        raise _BadRow("the conversation does not start with a user turn")
    if roles[-1] != "assistant":
        raise _BadRow(f"the conversation ends with a {roles[-1]} turn; the last must be the answer")
    return Example(row_id, "", messages[-1].content, messages=messages)


def _message(turn: Any, number: int) -> Message:
    """One turn in either spelling: role/content or from/value."""
    if not isinstance(turn, Mapping):
        raise _BadRow(f"turn {number} is {kind_of(turn)}, not an object")
    spelled = ("role", "content") if turn.get("role") is not None else ("from", "value")
    if spelled[0] not in turn:
        raise _BadRow(f"turn {number} has no 'role' (or 'from'); found: {', '.join(turn)}")
    role = turn[spelled[0]]
    if not isinstance(role, str) or role not in _ROLES:
        raise _BadRow(f"turn {number} has the unknown role {role!r} (known: {', '.join(_ROLES)})")
    content = turn.get(spelled[1])
    if isinstance(content, list):
        content = _joined_parts(content, number)
    try:
        return Message(_ROLES[role], _text({spelled[1]: content}, spelled[1]))
    except _BadRow as fault:
        raise _BadRow(f"turn {number} ({role}): {fault}") from fault


def _joined_parts(parts: Sequence[Any], number: int) -> str:
    """The text of a content list such as [{"type": "text", "text": "Hi"}]."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise _BadRow(f"turn {number} has content that is not text (images are not supported)")
        texts.append(part["text"])
    return "".join(texts)


# Order matters: a table that has both is the richer shape, which stands first.
FORMATS: Mapping[str, _Shape] = {
    "messages": _Shape(("messages",), (), _from_messages),
    "sharegpt": _Shape(("conversations",), ("system",), _from_conversations),
    "prompt_completion": _Shape(("prompt", "completion"), ("choices",), _from_completion),
    "alpaca": _Shape(("instruction", "output"), ("input", "choices"), _from_alpaca),
}
"""The four shapes by name."""
