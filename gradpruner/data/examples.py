"""Examples to learn from and to evaluate on, and sets of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

from gradpruner.common.errors import ConfigError


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: Text of the turn.
        extra: Further fields of the turn (reasoning_content, tool_calls, name ...) for the chat template, as
            a JSON object; "" if there are none.
        learned: Whether an assistant turn is learned. A turn of weight 0 is not.
    """

    role: str
    content: str
    extra: str = ""
    learned: bool = True

    def as_turn(self) -> dict[str, Any]:
        """Returns the turn as a chat template takes it."""
        return {"role": self.role, "content": self.content} | (json.loads(self.extra) if self.extra else {})


@dataclass(frozen=True)
class Example:
    """A prompt and the answer to learn.

    Attributes:
        id: Stable within the source, e.g. "train.jsonl:17".
        prompt: Text before the answer; "" if `messages` is given.
        answer: Text to learn and to compare with, without an end-of-text token.
        choices: All possible answers, written like `answer`; () for free text.
        messages: The conversation; its last turn is the assistant's and equals `answer`. () if there is none.
        tools: The tools of a conversation, as a JSON list; "" for none.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    tools: str = ""


@dataclass(frozen=True)
class ExampleSet(Sequence[Example]):
    """The usable rows of one source, as a sequence of examples.

    Attributes:
        examples: At least one, in the order of the file.
        source: Path, hub id or task.
        format: One of `shapes.FORMATS`, "labelled_text", "templates" or "task:<name>@<version>", followed by
            marks of the layout and of the chat template, if any.
        sha256: Hash of the file's bytes; for a hub dataset, of the canonical rows.
        num_dropped: Unusable rows dropped on request.
        notes: Notes for the user: sampling, unused columns, dropped rows.
    """

    examples: tuple[Example, ...]
    source: str
    format: str
    sha256: str
    num_dropped: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]


def sample(examples: Sequence[Example], limit: int | None, seed: int) -> tuple[Sequence[Example], str]:
    """Returns `limit` random examples in their original order, and a note; all examples if `limit` is None.

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
    """Returns the example as a conversation: the prompt is the user's turn, the answer the assistant's."""
    if example.messages:
        return example
    answer = example.answer.strip()
    turns = (Message("user", example.prompt), Message("assistant", answer))
    choices = tuple(choice.strip() for choice in example.choices)
    return replace(example, prompt="", answer=answer, choices=choices, messages=turns)


def question(example: Example) -> tuple[str, tuple[Message, ...]]:
    """Returns what is asked: the prompt, and the conversation before the answer."""
    return example.prompt, example.messages[:-1]


def overlap(train: Iterable[Example], evaluation: Iterable[Example]) -> int:
    """Counts evaluation examples whose exact prompt (or conversation) is also in the training examples."""
    seen = set(map(question, train))
    return sum(question(example) in seen for example in evaluation)
