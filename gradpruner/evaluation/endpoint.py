"""A served model that answers questions, through the OpenAI completions protocol (vLLM, SGLang, llama.cpp).

The server runs where it likes, in an environment of its own; nothing of it is imported. Prompts are sent as
token ids, so that it is asked exactly what a loaded model would be. No answer is trusted: every value that is
used is checked first, and `evaluation/connection.py` bounds how long and how much a server may send.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from gradpruner.common.errors import ConfigError, IntegrityError, ResourceError
from gradpruner.common.files import shown
from gradpruner.common.json_files import typed
from gradpruner.evaluation.connection import API_KEY, Connection
from gradpruner.evaluation.generation import Answer
from gradpruner.evaluation.questions import Questions

T = TypeVar("T")
_MODELS_LIMIT = 16 * 2**20  # bytes of a list of models
# Bytes an answer may have per token sent or asked for: its text, its log-probability, others beside it.
_BYTES_PER_TOKEN = 4096
_ASK = "Is it an OpenAI completions server, and does the address end where /completions begins?"


class _Model(BaseModel):
    id: str = Field(min_length=1)


class _Models(BaseModel):
    """The reply to GET /models, as far as it is used."""

    data: list[_Model]


class _Choice(BaseModel):
    text: str
    index: int | None = None
    finish_reason: Any = None
    logprobs: Any = None


class _Completion(BaseModel):
    """The reply to POST /completions."""

    choices: list[_Choice]


class Endpoint:
    """Answers through `POST <url>/completions`.

    Args:
        url: Base of the API, e.g. "http://localhost:8000/v1". A key, if it needs one, is read from the
            environment variable OPENAI_API_KEY and sent to this host alone.
        name: What the server calls the model; None takes the only one it lists.
        batch_size: Prompts per request, at least 1.

    Raises:
        ConfigError: If the address is not one, or the server serves another model, or several.
        ResourceError: If the server cannot be reached, or its answer is not a list of models.
    """

    def __init__(self, url: str, name: str | None = None, batch_size: int = 32) -> None:
        _check_address(url)
        self.url, self.batch_size = url.rstrip("/"), batch_size
        listed = self._call("/models", _MODELS_LIMIT, _Models)
        served = list(dict.fromkeys(entry.id for entry in listed.data))
        if name is None and len(served) != 1:
            raise ConfigError(
                f"{self.url} serves {len(served)} models: {_listed(served)}.",
                hint="Name one with --served-name.",
            )
        if name is not None and name not in served:
            raise ConfigError(f"{self.url} does not serve '{name}'.", hint=f"It serves: {_listed(served)}.")
        self.name = name or served[0]

    @cached_property
    def _connection(self) -> Connection:
        return Connection(self.url)

    def longest(self, max_length: int) -> int:
        """`max_length`: only the server knows how much it can hold."""
        return max_length

    def answers(
        self, questions: Questions, indices: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields example indices and their greedy answers, request by request.

        Raises:
            ResourceError: If the server cannot be reached, or a reply is not one text for every prompt.
        """
        for start in range(0, len(indices), self.batch_size):
            batch = list(indices[start : start + self.batch_size])
            prompts = [questions.cut_prompt(i, max_new_tokens) for i in batch]
            answers = []
            for choice in self._complete(prompts, max_tokens=max_new_tokens):
                tokens = questions.tokenizer.encode(choice.text, add_special_tokens=False)
                answers.append(Answer(choice.text, choice.finish_reason == "stop", len(tokens) + 1))
            yield batch, answers

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields example indices and the log-likelihood of their options; the server must echo prompts.

        Raises:
            ConfigError: If it does not.
            ResourceError: If it cannot be reached, or does not answer with log-probabilities.
        """
        for index in indices:
            options = questions.option_set(index)
            rows = [options.prompt + target for target in options.targets]
            # One more token is asked for because some servers refuse to generate none.
            found = self._complete(rows, max_tokens=1, echo=True, logprobs=1)
            first = len(options.prompt)
            echoed = [self._echoed(choice, len(row), first) for choice, row in zip(found, rows, strict=True)]
            yield [index], [[sum(values) for values in echoed]]

    def _echoed(self, choice: _Choice, length: int, first: int) -> list[float]:
        """The log-probabilities, in nats, of the tokens that were sent, from the `first` on."""
        held = choice.logprobs
        values = held.get("token_logprobs") if isinstance(held, dict) else None
        if not isinstance(values, list) or not length <= len(values) <= length + 1:
            raise ConfigError(
                f"{self.url} does not return the log-probabilities of a prompt (echo with logprobs).",
                hint="Use --set 'evaluate.metrics=[exact_match]', or a server that does, such as vLLM.",
            )
        found = values[first:length]
        for place, value in enumerate(found, start=first):
            if first == place == 0 and value is None:
                continue  # nothing stands before the very first token, so that it has no probability
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # Servers round; a log-probability a little above 0 is one of 0.
            if not number or not math.isfinite(value) or value > 1e-3:
                raise self._wrong(
                    "/completions",
                    f"token {place} has the log-probability {shown(value)}; one of at most 0 is needed",
                )
        return [float(value or 0.0) for value in found]

    def _complete(self, prompts: list[list[int]], **options: Any) -> list[_Choice]:
        """One completion of every prompt, in their order."""
        body = {"model": self.name, "prompt": prompts, "temperature": 0, **options}
        tokens = sum(map(len, prompts)) + len(prompts) * int(options["max_tokens"])
        limit = 2**20 + _BYTES_PER_TOKEN * tokens
        choices = self._call("/completions", limit, _Completion, body).choices
        if len(prompts) == len(choices) == 1 and choices[0].index is None:
            return choices  # some servers leave out the index of an only answer
        by_index = {choice.index: choice for choice in choices}
        if len(choices) != len(prompts) or by_index.keys() != set(range(len(prompts))):
            indexes = shown([choice.index for choice in choices])
            raise self._wrong(
                "/completions",
                f"{len(prompts)} prompts have {len(choices)} answers, with the indexes {indexes}",
            )
        return [by_index[index] for index in range(len(prompts))]

    def _call(self, path: str, limit: int, shape: type[T], body: dict[str, Any] | None = None) -> T:
        """What the server says, checked as a whole."""
        reply = self._connection.call(path, body, limit=limit)
        try:
            return typed(reply, shape, "")
        except IntegrityError as error:
            raise self._wrong(path, error.message.removeprefix(": ").rstrip(".")) from None

    def _wrong(self, path: str, what: str) -> ResourceError:
        return ResourceError(f"{self.url}{path} did not answer as it should: {what}.", hint=_ASK)


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(shown(name).strip("'") for name in names[:20])
    return few + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _check_address(url: str) -> None:
    """ConfigError unless it is http(s)://host[:port][/path] and nothing else."""
    hint = "Give something like http://localhost:8000/v1."
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        whole = whole and url.isprintable() and " " not in url
    except ValueError:  # a port that is not a number, a bracket that is never closed
        whole = False
    if not whole:
        raise ConfigError(f"{shown(url, 100)} is not the address of a server.", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"The address of {parts.hostname} holds a user or password, which would stand in every record.",
            hint=f"Put the key into the environment variable {API_KEY}.",
        )
    if "?" in url or "#" in url:
        raise ConfigError(f"{shown(url, 100)} has more than a path behind the host.", hint=hint)
