"""How much of a request is read: checked while it streams, whatever Content-Length says."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.web import problems

PATIENCE = 8


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """Refuses a body of more than `max_bytes` with 413."""

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, counting what is read of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            error = self._refuse(announced)
            await _discard(scope, receive, self.max_bytes * PATIENCE)
            await problems.to_json(error.status_code, error.problem, {"Connection": "close"})(scope, receive, send)
            return
        taken = 0

        async def receive_counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_bytes:
                raise self._refuse(f"more than {self.max_bytes}")
            return message

        await self.app(scope, receive_counted, send)

    def _refuse(self, size: str) -> problems.RequestRefusedError:
        remedy = f"send at most {self.max_bytes} bytes at once: split the batch, or raise server.max_body_bytes"
        return problems.RequestRefusedError(413, "body", f"{size} bytes", remedy)


async def _discard(scope: Scope, receive: Receive, at_most: int) -> None:
    """Read a body that is refused to its end if that is near: a client that is still sending would see a broken pipe, not the answer."""
    if Headers(scope=scope).get("expect", "").lower() == "100-continue":
        return
    left, is_more = at_most, True
    while is_more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        is_more = message.get("more_body", False)
