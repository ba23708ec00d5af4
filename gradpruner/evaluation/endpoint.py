"""A served model that answers questions, through the OpenAI completions protocol (vLLM, SGLang, llama.cpp).

The server runs where it likes, in an environment of its own; nothing of it is imported. Prompts are sent as
token ids, so that it is asked exactly what a loaded model would be. What it says is a stranger's word: every
value that is used is checked first, and `evaluation/connection.py` bounds how long and how much it may say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from gradpruner.errors import ConfigError, ResourceError
from gradpruner.evaluation.connection import API_KEY, Connection
from gradpruner.evaluation.generation import Answer
from gradpruner.evaluation.questions import Questions
from gradpruner.files import shown

__all__ = ["API_KEY", "Endpoint"]

_MODELS_LIMIT = 16 * 2**20  # bytes of a list of models
# Bytes an answer may have per token sent or asked for: its text, its log-probability, others beside it.
_BYTES_PER_TOKEN = 4096
_ASK = "Is it an OpenAI completions server, and does the address end where /completions begins?"


class Endpoint:
    """Answers through `POST <url>/completions`.

    Args:
        url: Base of the API, e.g. "http://localhost:8000/v1". A key, if it needs one, is read from the
            environment variable OPENAI_API_KEY and sent to this host alone.
        name: What the server calls the model; None takes the only one it lists.
        batch_size: Prompts per request, at least 1.

    Raises:
        ConfigError: If the address is none, or the server serves another model, or several.
        ResourceError: If the server cannot be reached, or answers what is no answer.
    """

    def __init__(self, url: str, name: str | None = None, batch_size: int = 32) -> None:
        _check_address(url)
        self.url, self.batch_size = url.rstrip("/"), batch_size
        served = self._served()
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

    def _served(self) -> list[str]:
        """The names of the models the server lists."""
        entries = self._call("/models", _MODELS_LIMIT).get("data")
        if not isinstance(entries, list):
            raise self._wrong("/models", f"'data' is {shown(entries)}; a list of models is needed")
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), str) or not entry["id"]:
                raise self._wrong("/models", f"{shown(entry)} is no model; an object with an 'id' is needed")
        return list(dict.fromkeys(entry["id"] for entry in entries))

    def longest(self, max_length: int) -> int:
        """`max_length`: how much the server can hold is for it to say."""
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
            found = self._complete(prompts, max_tokens=max_new_tokens)
            yield (
                batch,
                [
                    Answer(
                        choice["text"],
                        choice.get("finish_reason") == "stop",
                        len(questions.tokenizer.encode(choice["text"], add_special_tokens=False)) + 1,
                    )
                    for choice in found
                ],
            )

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields example indices and the log-likelihood of their options; the server must echo prompts.

        Raises:
            ConfigError: If it does not.
            ResourceError: If it cannot be reached, or what it says are no log-probabilities.
        """
        for index in indices:
            options = questions.option_set(index)
            rows = [options.prompt + target for target in options.targets]
            # One more token is asked for because some servers refuse to generate none.
            found = self._complete(rows, max_tokens=1, echo=True, logprobs=1)
            first = len(options.prompt)
            echoed = [self._echoed(choice, len(row), first) for choice, row in zip(found, rows, strict=True)]
            yield [index], [[sum(values) for values in echoed]]

    def _echoed(self, choice: dict[str, Any], length: int, first: int) -> list[float]:
        """The log-probabilities, in nats, of the tokens that were sent, from the `first` on."""
        held = choice.get("logprobs")
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

    def _complete(self, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
        """One completion of every prompt, in their order, each with its text."""
        body = {"model": self.name, "prompt": prompts, "temperature": 0, **options}
        tokens = sum(map(len, prompts)) + len(prompts) * int(options["max_tokens"])
        choices = self._call("/completions", 2**20 + _BYTES_PER_TOKEN * tokens, body).get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise self._wrong("/completions", f"'choices' is {shown(choices)}; a list of objects is needed")
        if len(choices) != len(prompts):
            raise self._wrong("/completions", f"{len(choices)} answers to {len(prompts)} prompts")
        if len(choices) == 1 and "index" not in choices[0]:
            choices[0]["index"] = 0
        by_index: dict[int, dict[str, Any]] = {}
        for choice in choices:
            index, text = choice.get("index"), choice.get("text")
            if type(index) is not int or not 0 <= index < len(prompts) or index in by_index:
                raise self._wrong(
                    "/completions",
                    f"an answer has the index {shown(index)}; each of 0 to {len(prompts) - 1} is needed once",
                )
            if not isinstance(text, str):
                raise self._wrong(
                    "/completions", f"the text of answer {index} is {shown(text)}; text is needed"
                )
            by_index[index] = choice
        return [by_index[index] for index in range(len(prompts))]

    def _call(self, path: str, limit: int, body: dict[str, Any] | None = None) -> dict[str, Any]:
        found = self._connection.call(path, body, limit=limit)
        if not isinstance(found, dict):
            raise self._wrong(path, f"the reply is {shown(found)}; an object is needed")
        return found

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
    except ValueError:  # a port that is no number, a bracket that is never closed
        whole = False
    if not whole:
        raise ConfigError(f"{shown(url, 100)} is no address of a server.", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"The address of {parts.hostname} holds a user or password, which would stand in every record.",
            hint=f"Put the key into the environment variable {API_KEY}.",
        )
    if "?" in url or "#" in url:
        raise ConfigError(f"{shown(url, 100)} has more than a path behind the host.", hint=hint)
