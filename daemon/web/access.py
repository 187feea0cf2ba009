"""Who a request comes from: bearer tokens, their roles, and for a few seconds what the database said of them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy import Engine

from daemon.web import problems
from daemon.web.site import SiteHere
from storage import db, tokens

KEPT = 1024
bearer = HTTPBearer(auto_error=False, scheme_name="token", description="A token made by `ratchet tokens add NAME --role ROLE`.")
Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(bearer)]


class Doorkeeper:
    """Looks tokens up; one that was found is trusted for `term`, so a revoked one is useless that much later."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime], term: timedelta = timedelta(seconds=2)) -> None:
        self._engine, self._clock, self._term = engine, clock, term
        self._known: dict[bytes, tuple[tokens.Principal, datetime]] = {}

    async def identify(self, secret: str) -> tokens.Principal | None:
        """Whose token this is; None when it is unknown or revoked."""
        key, now = hashlib.sha256(secret.encode()).digest(), self._clock()
        principal, until = self._known.get(key, (None, now))
        if until > now:
            return principal
        principal = await asyncio.to_thread(self.look_up, secret)
        if principal is not None:
            if len(self._known) >= KEPT:
                self._known.clear()
            self._known[key] = (principal, now + self._term)
        return principal

    def look_up(self, secret: str) -> tokens.Principal | None:
        """What the database says now."""
        with db.reading(self._engine) as connection:
            return tokens.find(connection, secret)


def allow(*roles: tokens.Role) -> Callable[..., Any]:
    """A dependency that lets a token of one of these roles pass."""

    async def check(site: SiteHere, credentials: Credentials) -> tokens.Principal:
        if credentials is None:
            raise _deny(401, "nothing", "send `Authorization: Bearer TOKEN`; `ratchet tokens add` makes one", "")
        principal = await site.doorkeeper.identify(credentials.credentials)
        if principal is None:
            raise _deny(
                401, "unknown", "the token is not known or was revoked: `ratchet tokens list` shows the valid ones", "invalid_token"
            )
        if principal.role not in roles:
            raise _deny(403, principal.role, f"this needs a token with the role {' or '.join(roles)}", "insufficient_scope")
        return principal

    return check


def _deny(status: int, value: str, remedy: str, reason: str) -> problems.RequestRefusedError:
    challenge = 'Bearer realm="ratchet"' + (f', error="{reason}"' if reason else "")
    return problems.RequestRefusedError(status, "Authorization", value, remedy, {"WWW-Authenticate": challenge})


Producer = Annotated[tokens.Principal, Depends(allow("producer"))]
Reviewer = Annotated[tokens.Principal, Depends(allow("reviewer"))]
Operator = Annotated[tokens.Principal, Depends(allow("operator"))]
Reader = Annotated[tokens.Principal, Depends(allow("reviewer", "operator"))]
Anyone = Annotated[tokens.Principal, Depends(allow("producer", "reviewer", "operator"))]
