"""The exchange with a server over HTTP: one request, one deadline for all of it, an answer of bounded size."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx

MAX_ANSWER = 100_000


class NoAnswerError(RuntimeError):
    """The server gave no answer that can be used; the message names its address and the cause."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server answered: its status and at most `MAX_ANSWER` bytes."""

    status: int
    content: bytes

    @property
    def is_error(self) -> bool:
        """Whether the server says that it could not do what was asked."""
        return httpx.codes.is_error(self.status)


def send_request(method: str, url: str, seconds: float, body: Any = None) -> Reply:
    """Send a request and read the whole answer within `seconds`. Raises `NoAnswerError`.

    Not to be called from a thread that runs an event loop.
    """
    try:
        return asyncio.run(_exchange(method, url, seconds, body))
    except TimeoutError as error:
        raise NoAnswerError(f"{url} does not answer within {seconds:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise NoAnswerError(f"{url} does not answer ({type(error).__name__})") from error


async def _exchange(method: str, url: str, seconds: float, body: Any) -> Reply:
    # The client's own time-out counts each read: a server that sends a byte now and then would be read for ever, its headers too.
    # No proxy of the environment: the server is ours.
    async with (
        asyncio.timeout(seconds),
        httpx.AsyncClient(timeout=None, trust_env=False) as client,  # noqa: S113 — all of it has one
        client.stream(method, url, json=body) as response,
    ):
        content = b""
        async for piece in response.aiter_bytes():
            content += piece
            if len(content) > MAX_ANSWER:
                raise NoAnswerError(f"{url} answers with more than {MAX_ANSWER:,} bytes")
        return Reply(response.status_code, content)


def read_json(content: bytes) -> Any:
    """The value of a JSON text. Raises `ValueError` for everything else, also for one that is nested too deeply to be read."""
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
