"""A served model that answers questions, through the OpenAI completions protocol (vLLM, SGLang, llama.cpp).

The server runs where it likes, in an environment of its own; nothing of it is imported. Prompts are sent as
token ids, so that it is asked exactly what a loaded model would be.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from gradpruner.errors import ConfigError, ResourceError
from gradpruner.evaluation.generation import Answer
from gradpruner.evaluation.questions import Questions

API_KEY = "OPENAI_API_KEY"
_TIMEOUT_SECONDS = 600.0


class Endpoint:
    """Answers through `POST <url>/completions`.

    Args:
        url: Base of the API, e.g. "http://localhost:8000/v1". A key, if it needs one, is read from the
            environment variable OPENAI_API_KEY.
        name: What the server calls the model; None takes the only one it lists.
        batch_size: Prompts per request, at least 1.

    Raises:
        ConfigError: If the address is none, or the server serves another model, or several.
        ResourceError: If the server cannot be reached.
    """

    def __init__(self, url: str, name: str | None = None, batch_size: int = 32) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(
                f"'{url}' is no address of a server.", hint="Give something like http://localhost:8000/v1."
            )
        self.url, self.batch_size = url.rstrip("/"), batch_size
        served = [str(entry.get("id")) for entry in self._call("/models").get("data", [])]
        if name is None and len(served) != 1:
            raise ConfigError(
                f"{self.url} serves {len(served)} models: {', '.join(served) or 'none'}.",
                hint="Name one with --served-name.",
            )
        if name is not None and name not in served:
            raise ConfigError(f"{self.url} does not serve '{name}'.", hint=f"It serves: {', '.join(served)}.")
        self.name = name or served[0]

    def longest(self, max_length: int) -> int:
        """`max_length`: how much the server can hold is for it to say."""
        return max_length

    def answers(
        self, questions: Questions, indices: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Yields example indices and their greedy answers, request by request."""
        for start in range(0, len(indices), self.batch_size):
            batch = list(indices[start : start + self.batch_size])
            prompts = [questions.cut_prompt(i, max_new_tokens) for i in batch]
            found = self._complete(prompts, max_tokens=max_new_tokens)
            yield (
                batch,
                [
                    Answer(
                        str(choice["text"]),
                        choice.get("finish_reason") == "stop",
                        len(questions.tokenizer.encode(choice["text"], add_special_tokens=False)) + 1,
                    )
                    for choice in found
                ],
            )

    def option_scores(
        self, questions: Questions, indices: Sequence[int]
    ) -> Iterator[tuple[list[int], list[list[float]]]]:
        """Yields example indices and the log-likelihood of their options; the server must echo prompts."""
        for index in indices:
            options = questions.option_set(index)
            rows = [options.prompt + target for target in options.targets]
            # One more token is asked for because some servers refuse to generate none.
            found = self._complete(rows, max_tokens=1, echo=True, logprobs=1)
            echoed = [self._echoed(choice, len(row)) for choice, row in zip(found, rows, strict=True)]
            yield [index], [[sum(values[len(options.prompt) :]) for values in echoed]]

    def _echoed(self, choice: dict[str, Any], length: int) -> list[float]:
        """The log-probabilities of the tokens that were sent."""
        values = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not length <= len(values) <= length + 1:
            raise ConfigError(
                f"{self.url} does not return the log-probabilities of a prompt (echo with logprobs).",
                hint="Use --set 'evaluate.metrics=[exact_match]', or a server that does, such as vLLM.",
            )
        return [float(value or 0.0) for value in values[:length]]

    def _complete(self, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
        """One completion of every prompt, in their order."""
        body = {"model": self.name, "prompt": prompts, "temperature": 0, **options}
        choices = self._call("/completions", body).get("choices", [])
        if len(choices) != len(prompts):
            raise ResourceError(f"{self.url} returned {len(choices)} answers to {len(prompts)} prompts.")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY]}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as reply:
                found = json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace").strip()
            raise ResourceError(f"{self.url}{path} answered {error.code}: {said or error.reason}.") from error
        except (OSError, ValueError) as error:
            raise ResourceError(
                f"No answer from {self.url}{path}: {getattr(error, 'reason', error)}.",
                hint="Is the server running? vLLM: vllm serve FOLDER --port 8000.",
            ) from error
        return found if isinstance(found, dict) else {}
