"""JSON requests to an untrusted server, with one deadline per request and a limit on the size of the reply.

The API key goes to the given host alone: redirects are not followed. Errors that may pass (429, 5xx) are
retried with growing pauses until the deadline; a broken connection is retried once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import threading
import time
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx

from gradpruner.common.errors import ConfigError, ResourceError
from gradpruner.common.json_files import parse_json
from gradpruner.common.printing import shown

log = logging.getLogger(__name__)

API_KEY = "OPENAI_API_KEY"
DEADLINE_SECONDS = 600.0
"""Time for one request in all: connecting, waiting, reading and retrying."""
TRIES = 5
_CONNECT_SECONDS = 30.0
_LONGEST_PAUSE = 60.0
_RETRIED_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504, 529))
_RUNNING = "Is the server running? vLLM: vllm serve FOLDER --port 8000."


class Connection:
    """A connection to a JSON API.

    Args:
        url: Base address of the API, already checked by the caller.

    Raises:
        ConfigError: If the key in the environment cannot be sent in a header.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        key = os.environ.get(API_KEY, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise ConfigError(
                f"The environment variable {API_KEY} holds blanks or characters other than printable ASCII.",
                hint="Set the key again, without blanks or line breaks.",
            )
        # No compression, so that a small reply cannot unpack into gigabytes.
        self._headers = {"Accept-Encoding": "identity", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # A proxy from the environment could read the key over plain http; over https it cannot.
        self._use_environment = urlsplit(url).scheme == "https" or not key
        self._loop: asyncio.AbstractEventLoop | None = None
        self._client: httpx.AsyncClient | None = None

    def call(self, path: str, body: dict[str, Any] | None = None, *, limit: int) -> Any:
        """Sends a request (GET without a body, else POST) and returns the JSON reply.

        Args:
            path: Path below the base address.
            body: JSON values to send.
            limit: Most bytes the reply may have.

        Raises:
            ResourceError: If no reply comes in time, or the reply is an error, too long or not JSON.
        """
        # An event loop in its own thread: it enforces the deadline whatever the server does, and works where
        # the caller already runs a loop (notebooks).
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="endpoint", daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(self._within_deadline(path, body, limit), self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _within_deadline(self, path: str, body: dict[str, Any] | None, limit: int) -> Any:
        try:
            return await asyncio.wait_for(self._with_retries(path, body, limit), DEADLINE_SECONDS)
        except TimeoutError:
            raise ResourceError(
                f"No answer from {self.url}{path} within {DEADLINE_SECONDS:g} seconds.",
                hint="Is the server overloaded? A smaller evaluate.batch_size sends fewer prompts at a time.",
            ) from None

    async def _with_retries(self, path: str, body: dict[str, Any] | None, limit: int) -> Any:
        """Makes up to TRIES attempts before the deadline, retrying errors that may pass."""
        end = time.monotonic() + DEADLINE_SECONDS
        for attempt in range(1, TRIES + 1):
            try:
                return await self._once(path, body, limit)
            except _TransientError as failure:
                pause = max(_pause(attempt), min(failure.wait, _LONGEST_PAUSE))
                if attempt >= failure.tries or time.monotonic() + pause >= end:
                    raise ResourceError(
                        f"{failure.message} (tried {attempt} times).", hint=_RUNNING
                    ) from failure.__cause__
                log.warning("%s; trying again in %.1f s", failure.message, pause)
                await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, path: str, body: dict[str, Any] | None, limit: int) -> Any:
        where = self.url + path
        if self._client is None:
            self._client = self._new_client()
        content = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({"Content-Type": "application/json"} if body is not None else {})
        try:
            async with self._client.stream(
                "GET" if body is None else "POST", where, headers=headers, content=content
            ) as reply:
                data = await _read(reply, where, limit if reply.status_code == 200 else 2000)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError, OSError) as error:
            # The server may have closed an idle connection, or be restarting: one retry is enough.
            raise _TransientError(f"No answer from {where}: {_reason(error)}", tries=2) from error
        return self._parsed(reply, data, where)

    def _new_client(self) -> httpx.AsyncClient:
        timeout = httpx.Timeout(DEADLINE_SECONDS, connect=_CONNECT_SECONDS)
        return httpx.AsyncClient(
            timeout=timeout,
            follow_redirects=False,
            trust_env=self._use_environment,
            limits=httpx.Limits(max_connections=4),
        )

    def _parsed(self, reply: httpx.Response, data: bytes, where: str) -> Any:
        status = reply.status_code
        if 300 <= status < 400:
            raise ResourceError(
                f"{where} answered {status}: it redirects to "
                f"{shown(reply.headers.get('location', ''), 120)}.",
                hint="Redirects are not followed, so that the key goes nowhere else: give the final address.",
            )
        if status != 200:
            text = " ".join(data.decode(errors="replace").split())[:300]
            message = f"{where} answered {status}: {shown(text, 300)[1:-1] or reply.reason_phrase}"
            if status in _RETRIED_STATUS:
                raise _TransientError(message, _retry_after(reply))
            hint = f"The key is read from {API_KEY}." if status in (401, 403) else None
            raise ResourceError(f"{message}.", hint=hint)
        try:
            return parse_json(data)
        except ValueError as error:
            raise ResourceError(
                f"{where} did not answer with JSON: {error}.", hint="Is this the address of a model server?"
            ) from error


class _TransientError(Exception):
    """A failure that may pass, so that the request is retried."""

    def __init__(self, message: str, wait: float = 0.0, tries: int = TRIES) -> None:
        super().__init__(message)
        self.message, self.wait, self.tries = message, wait, tries


async def _read(reply: httpx.Response, where: str, limit: int) -> bytes:
    """Reads the body of a reply; of an error reply only the beginning."""
    coding = reply.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        raise ResourceError(
            f"{where} answered with content encoding {shown(coding)}, which was not requested."
        )
    data = bytearray()
    async for chunk in reply.aiter_raw():
        data += chunk
        if len(data) > limit:
            if reply.status_code != 200:
                return bytes(data[:limit])
            raise ResourceError(
                f"{where} answered with more than {limit} bytes, far more than the request calls for.",
                hint="Is this the address of a model server?",
            )
    return bytes(data)


def _pause(attempt: int) -> float:
    """Returns the seconds before the next attempt: 0.5, 1, 2 ... times a random factor from 0.5 to 1.

    The random factor keeps several clients of an overloaded server from retrying at the same moment.
    """
    return float(min(0.5 * 2 ** (attempt - 1), _LONGEST_PAUSE) * random.uniform(0.5, 1.0))


def _retry_after(reply: httpx.Response) -> float:
    """Returns the seconds the server asks us to wait; 0 without a Retry-After header or with a date in it."""
    header = reply.headers.get("retry-after", "")
    return float(header) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", header) else 0.0


def _reason(error: BaseException) -> str:
    return shown(str(error), 200)[1:-1] or type(error).__name__
