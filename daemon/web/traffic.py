"""What happens around every request: its line in the log, its place in the metrics, and the headers that protect a browser."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.web.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PROTECTION = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
}
BROKEN = b'{"error":{"field":"request","value":"","remedy":"this is a fault of Ratchet: its log has the details"}}'

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Traffic:
    """Notes every request by its route's template: never its address, its query or its body."""

    app: ASGIApp
    metrics: Metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; an error that nobody caught is logged and answered with 500."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                protect(message)
            await send(message)

        try:
            await self.app(scope, receive, send_noted)
        except ClientDisconnect:
            log.debug("client_left", route=name_route(scope))
        except Exception:
            # The outermost boundary of a request: it costs this request only.
            log.exception("request_failed", route=name_route(scope))
            if not status:
                await Response(BROKEN, 500, media_type="application/json")(scope, receive, send_noted)
        finally:
            self._note(scope, status, time.perf_counter() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        method, route = scope["method"] if scope["method"] in METHODS else "other", name_route(scope)
        self.metrics.requests.labels(method, route, str(status)).inc()
        self.metrics.request_seconds.labels(route).observe(seconds)
        log.info("request", method=method, route=route, status=status, ms=round(seconds * 1000, 1))


def protect(message: Message) -> None:
    """Add what tells a browser to trust nothing but us, and to keep nothing."""
    headers = MutableHeaders(raw=message["headers"])
    for name, value in PROTECTION.items():
        headers.setdefault(name, value)
    headers.setdefault("Cache-Control", "no-store")


def name_route(scope: Scope) -> str:
    """The template of the route that took the request: `/v1/events/{ulid}`."""
    route: Any = scope.get("route")
    if route is not None:
        return str(route.path)
    return next((known for known in ("/static", "/openapi.json") if scope["path"].startswith(known)), "unknown")
