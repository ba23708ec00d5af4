"""Turns rows of the usual formats into examples.

    prompt/completion         text and text; optionally "choices", a list of all completions
    instruction/input/output  the Alpaca shape; "input" may be missing or empty
    conversations             the ShareGPT shape: [{"from": human|gpt|system, "value": text}]
    messages                  [{"role": user|assistant|system, "content": text}]
    text/label                a text and its class, see layouts.py

The format is detected from the columns of the first rows. prompt/completion is used unchanged: nothing
is added or stripped, so the completion must begin with its own space. Tokenizers come in later, in
encoding.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradpruner.data.examples import Example, Message
from gradpruner.data.parsing import kind_of

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
    "tool": "tool",
}
# Fields that say whether an assistant turn is learned (1, true) or not (0, false).
_WEIGHTS = ("weight", "loss", "train")


class BadRow(Exception):
    """A row that cannot be used; the message says why, and `hint` what to do, if there is more to say."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Shape:
    """A format of rows: its columns, and the function that makes an example of a row."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[str, Mapping[str, Any]], Example]

    def used(self, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """Returns the columns that are read from a row."""
        turns = ("system", "tools") if isinstance(fields.get("prompt"), list) else ()
        return (*self.required, *self.optional, *turns)

    def columns(self) -> str:
        """Returns the columns as text, optional ones in brackets."""
        return ", ".join([*self.required, *(f"[{name}]" for name in self.optional)])


def text_field(fields: Mapping[str, Any], name: str, *, blank: bool = False) -> str:
    """Returns the text of a field; `blank` allows it to be missing or empty."""
    if name not in fields and not blank:
        raise BadRow(f"field '{name}' is missing")
    value = fields.get(name)
    if value is None:
        if blank:
            return ""
        raise BadRow(f"field '{name}' is null")
    if not isinstance(value, str):
        shown = json.dumps(value, default=str, ensure_ascii=False)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        raise BadRow(f"field '{name}' is {kind_of(value)} ({shown}), not text")
    if not value.strip() and not blank:
        raise BadRow(f"field '{name}' is empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRow(f"field '{name}' contains half a surrogate pair, which is not a character")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    """Returns the list in a field; in CSV it is written as JSON."""
    value = fields.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise BadRow(f"field '{name}' is not a JSON list") from error
    if not isinstance(value, list):
        if name not in fields:
            raise BadRow(f"field '{name}' is missing")
        raise BadRow(f"field '{name}' is {kind_of(value)}, not a list")
    if not value:
        raise BadRow(f"field '{name}' is empty")
    return value


def _choices(fields: Mapping[str, Any], answer: str) -> tuple[str, ...]:
    if fields.get("choices") in (None, "", []):
        return ()
    choices = tuple(_list(fields, "choices"))
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise BadRow("field 'choices' contains something that is empty or not text")
    if len(set(choices)) != len(choices):
        raise BadRow("field 'choices' contains a choice twice")
    if answer not in choices:
        raise BadRow(f"the answer {answer!r} is not one of the choices {list(choices)!r}")
    return choices


def _from_completion(row_id: str, fields: Mapping[str, Any]) -> Example:
    if isinstance(fields.get("prompt"), list):  # the conversational variant of TRL
        if fields.get("choices"):
            raise BadRow("field 'choices' is allowed with a text prompt, not with conversation turns")
        asked, completion = _list(fields, "prompt"), _list(fields, "completion")
        return _from_turns(row_id, [*asked, *completion], fields, only_read=len(asked))
    answer = text_field(fields, "completion")
    prompt = text_field(fields, "prompt")
    return Example(row_id, prompt, answer, _choices(fields, answer))


def _from_alpaca(row_id: str, fields: Mapping[str, Any]) -> Example:
    instruction = text_field(fields, "instruction")
    answer = text_field(fields, "output")
    given = text_field(fields, "input", blank=True)
    template = ALPACA_WITH_INPUT if given.strip() else ALPACA_WITHOUT_INPUT
    prompt = template.format(instruction=instruction, input=given)
    return Example(row_id, prompt, answer, _choices(fields, answer))


def _conversation(name: str) -> Shape:
    """Returns the shape of rows with their turns in the column `name`."""
    return Shape((name,), ("system", "tools"), lambda row_id, row: _from_turns(row_id, _list(row, name), row))


def _from_turns(row_id: str, turns: Sequence[Any], fields: Mapping[str, Any], only_read: int = 0) -> Example:
    """Makes an example of a conversation; the first `only_read` turns are never learned."""
    system = text_field(fields, "system", blank=True)
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    messages[:only_read] = [
        replace(message, learned=message.role != "assistant") for message in messages[:only_read]
    ]
    if system.strip():
        messages.insert(0, Message("system", system))
    roles = [message.role for message in messages]
    if "system" in roles[1:]:
        raise BadRow("a system turn comes after the first turn")
    if "user" not in roles or roles[roles[0] == "system"] != "user":
        raise BadRow(
            "the conversation does not start with a user turn",
            "Remove what comes before the first user turn; a system turn may stay.",
        )
    if roles[-1] != "assistant":
        raise BadRow(
            f"the conversation ends with a {roles[-1]} turn; it must end with the assistant's",
            "Remove the turns after the last answer, or add the answer.",
        )
    if not any(message.learned for message in messages if message.role == "assistant"):
        raise BadRow("every assistant turn has weight 0, so there is nothing to learn")
    return Example(row_id, "", messages[-1].content, messages=tuple(messages), tools=_tools(fields))


def _tools(fields: Mapping[str, Any]) -> str:
    if fields.get("tools") in (None, "", []):
        return ""
    return json.dumps(_list(fields, "tools"), ensure_ascii=False, sort_keys=True, default=str)


def _message(turn: Any, number: int) -> Message:
    """Reads a turn written as role/content or as from/value."""
    if not isinstance(turn, Mapping):
        raise BadRow(f"turn {number} is {kind_of(turn)}, not an object")
    spelled = ("role", "content") if turn.get("role") is not None else ("from", "value")
    if spelled[0] not in turn:
        raise BadRow(f"turn {number} has no 'role' (or 'from'); found: {', '.join(turn)}")
    role = turn[spelled[0]]
    known = _ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise BadRow(
            f"turn {number} has the unknown role {role!r} (known: {', '.join(_ROLES)})",
            "Rename the roles: user or human asks, assistant or gpt answers.",
        )
    content = turn.get(spelled[1])
    if isinstance(content, list):
        content = _joined_parts(content, number)
    # In tables, every turn has all keys: null and empty ones carry no information.
    extra = {
        str(key): value
        for key, value in turn.items()
        if key not in (*spelled, *_WEIGHTS) and value not in (None, "", [], {})
    }
    try:
        # A turn that only calls tools has no text.
        text = text_field({spelled[1]: content}, spelled[1], blank="tool_calls" in extra)
    except BadRow as fault:
        raise BadRow(f"turn {number} ({role}): {fault}") from fault
    kept = json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str) if extra else ""
    return Message(known, text, kept, _is_learned(turn, number))


def _is_learned(turn: Mapping[str, Any], number: int) -> bool:
    for name in _WEIGHTS:
        value = turn.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(f"turn {number} has the {name} {value!r}; allowed: 0 (not learned), 1 (learned)")
        if not value:
            return False
    return True


def _joined_parts(parts: Sequence[Any], number: int) -> str:
    """Returns the text of a content list such as [{"type": "text", "text": "Hi"}]."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise BadRow(f"turn {number} has content that is not text (images are not supported)")
        texts.append(part["text"])
    return "".join(texts)


# Order matters: rows with the columns of two shapes get the one that comes first, the richer one.
FORMATS: Mapping[str, Shape] = {
    "messages": _conversation("messages"),
    "sharegpt": _conversation("conversations"),
    "prompt_completion": Shape(("prompt", "completion"), ("choices",), _from_completion),
    "alpaca": Shape(("instruction", "output"), ("input", "choices"), _from_alpaca),
}
"""The four shapes, by name."""
