"""A served model that answers questions over the OpenAI completions protocol (vLLM, SGLang, llama.cpp).

The server runs anywhere, in its own environment; none of its packages are imported. Prompts are sent as token
ids, so that a served model gets exactly the input of a loaded one. Replies are not trusted: every value is
checked before use, and `evaluation/connection.py` limits the time and size of a reply.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from gradpruner.common.errors import ConfigError, IntegrityError, ResourceError
from gradpruner.common.json_files import typed
from gradpruner.common.printing import shown
from gradpruner.evaluation.connection import API_KEY, Connection
from gradpruner.evaluation.generation import Answer
from gradpruner.evaluation.questions import Questions

T = TypeVar("T")
_MODELS_LIMIT = 16 * 2**20  # most bytes of a list of models
# Most bytes of a reply per token sent or requested: its text, its log-probability and those of alternatives.
_BYTES_PER_TOKEN = 4096
_CHECK_HINT = (
    "Is this an OpenAI completions server? Give the address without /completions, e.g. http://host/v1."
)


class _Model(BaseModel):
    id: str = Field(min_length=1)


class _Models(BaseModel):
    """The parts of the reply to GET /models that are used."""

    data: list[_Model]


class _Choice(BaseModel):
    text: str
    index: int | None = None
    finish_reason: Any = None
    logprobs: Any = None


class _Completion(BaseModel):
    """The parts of the reply to POST /completions that are used."""

    choices: list[_Choice]


class Endpoint:
    """A served model, reached through `POST <url>/completions`.

    Args:
        url: Base address of the API, e.g. "http://localhost:8000/v1". A key, if the server needs one, is read
            from the environment variable OPENAI_API_KEY and sent to this host alone.
        name: Name of the model on the server; None if the server has only one.
        batch_size: Prompts per request, at least 1.

    Raises:
        ConfigError: If the address is invalid, the server does not serve `name`, or `name` is None and the
            server does not serve exactly one model.
        ResourceError: If the server cannot be reached, or its reply is not a list of models.
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
        """Returns `max_length`, because the model's own limit is known to the server only."""
        return max_length

    def answers(
        self, questions: Questions, indices: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields example indices with their greedy answers, request by request.

        Raises:
            ResourceError: If the server cannot be reached, or a reply does not hold one text per prompt.
        """
        # Questions of another kind, without this attribute, have no template.
        stops = _stops(questions.tokenizer, getattr(questions, "template_ends", ()))
        for start in range(0, len(indices), self.batch_size):
            batch = list(indices[start : start + self.batch_size])
            prompts = [questions.cut_prompt(i, max_new_tokens) for i in batch]
            answers = []
            for choice in self._complete(prompts, max_tokens=max_new_tokens, **stops):
                text = _up_to(choice.text, stops.get("stop", ()))
                tokens = questions.tokenizer.encode(text, add_special_tokens=False)
                ended = text != choice.text or choice.finish_reason == "stop"
                answers.append(Answer(text, ended, len(tokens) + 1))
            yield batch, answers

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields example indices with the log-likelihoods of their options, one example per request.

        Raises:
            ConfigError: If the server does not return the log-probabilities of prompts (echo).
            ResourceError: If the server cannot be reached, or a log-probability is not a valid one.
        """
        for index in indices:
            options = questions.option_set(index)
            rows = [options.prompt + target for target in options.targets]
            # Request one new token, because some servers refuse to generate none.
            found = self._complete(rows, max_tokens=1, echo=True, logprobs=1)
            first = len(options.prompt)
            echoed = [self._echoed(choice, len(row), first) for choice, row in zip(found, rows, strict=True)]
            yield [index], [[sum(values) for values in echoed]]

    def _echoed(self, choice: _Choice, length: int, first: int) -> list[float]:
        """Returns the log-probabilities, in nats, of the tokens sent, starting at index `first`."""
        held = choice.logprobs
        values = held.get("token_logprobs") if isinstance(held, dict) else None
        if not isinstance(values, list) or not length <= len(values) <= length + 1:
            raise ConfigError(
                f"{self.url} does not return the log-probabilities of a prompt (echo with logprobs).",
                hint="Use --set 'evaluate.metrics=[exact_match]', or a server that returns them, e.g. vLLM.",
            )
        found = values[first:length]
        for place, value in enumerate(found, start=first):
            if first == place == 0 and value is None:
                continue  # the very first token has no context, and so no probability
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # Servers round, so a log-probability slightly above 0 is accepted.
            if not number or not math.isfinite(value) or value > 1e-3:
                raise self._wrong(
                    "/completions",
                    f"token {place} has the log-probability {shown(value)}, which must be a number up to 0",
                )
        return [float(value or 0.0) for value in found]

    def _complete(self, prompts: list[list[int]], **options: Any) -> list[_Choice]:
        """Requests one completion per prompt and returns them in the order of the prompts."""
        body = {"model": self.name, "prompt": prompts, "temperature": 0, **options}
        tokens = sum(map(len, prompts)) + len(prompts) * int(options["max_tokens"])
        limit = 2**20 + _BYTES_PER_TOKEN * tokens
        choices = self._call("/completions", limit, _Completion, body).choices
        if len(prompts) == len(choices) == 1 and choices[0].index is None:
            return choices  # some servers leave out the index if there is one answer only
        by_index = {choice.index: choice for choice in choices}
        if len(choices) != len(prompts) or by_index.keys() != set(range(len(prompts))):
            indexes = shown([choice.index for choice in choices])
            raise self._wrong(
                "/completions",
                f"{len(prompts)} prompts got {len(choices)} answers, with the indexes {indexes}",
            )
        return [by_index[index] for index in range(len(prompts))]

    def _call(self, path: str, limit: int, shape: type[T], body: dict[str, Any] | None = None) -> T:
        """Sends a request and checks the whole reply against `shape`."""
        reply = self._connection.call(path, body, limit=limit)
        try:
            return typed(reply, shape, "")
        except IntegrityError as error:
            raise self._wrong(path, error.message.removeprefix(": ").rstrip(".")) from None

    def _wrong(self, path: str, what: str) -> ResourceError:
        return ResourceError(f"{self.url}{path} sent a reply that cannot be used: {what}.", hint=_CHECK_HINT)


def _stops(tokenizer: Any, ends: Sequence[int]) -> dict[str, Any]:
    """Returns what a request says about the tokens with which a chat template ends answers.

    A server knows the end token of the tokenizer, but not that of the chat template. The OpenAI API takes
    texts, at most four; vLLM and SGLang, which may leave special tokens out of the text, also take tokens.
    """
    if not ends:
        return {}
    return {"stop": [tokenizer.decode([token]) for token in ends[:4]], "stop_token_ids": list(ends)}


def _up_to(text: str, stops: Sequence[str]) -> str:
    """Returns a text up to the first of `stops`, which some servers leave in."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(shown(name).strip("'") for name in names[:20])
    return few + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _check_address(url: str) -> None:
    """Raises ConfigError unless the address has the form http(s)://host[:port][/path]."""
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
            f"The address of {parts.hostname} holds a user or password, which would end up in every record.",
            hint=f"Put the key into the environment variable {API_KEY}.",
        )
    if "?" in url or "#" in url:
        raise ConfigError(f"{shown(url, 100)} has more than a path after the host.", hint=hint)
