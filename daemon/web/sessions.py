"""Sessions of people in a browser: a signed cookie, and from it the token that every form must carry."""

from __future__ import annotations

import base64
import binascii
import hmac
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated

import orjson
from fastapi import Depends, Form, Request, Response

from daemon.web import problems
from daemon.web.site import Site, SiteHere
from storage import db, tokens

COOKIE = "ratchet_session"
TERM = timedelta(hours=12)


@dataclass(frozen=True, slots=True)
class Session:
    """Who is at the browser; a stranger, who is about to log in, has no name."""

    name: str
    nonce: str
    expires_at: float


@dataclass(frozen=True, slots=True)
class Sessions:
    """Makes and reads cookies, signed with this installation's key: nothing is stored, and a restart ends no session."""

    key: bytes
    clock: Callable[[], datetime]

    def begin(self, response: Response, name: str, *, is_secure: bool) -> Session:
        """Give the browser a new session; an older one is worthless to it from then on."""
        session = Session(name, secrets.token_urlsafe(16), (self.clock() + TERM).timestamp())
        payload = base64.urlsafe_b64encode(orjson.dumps(asdict(session))).decode()
        value = f"{payload}.{self._sign('session', payload)}"
        response.set_cookie(COOKIE, value, max_age=int(TERM.total_seconds()), httponly=True, samesite="strict", secure=is_secure, path="/")
        return session

    def read(self, request: Request) -> Session | None:
        """The browser's session; None when there is none, it ran out, or somebody changed it."""
        payload, _, signature = request.cookies.get(COOKIE, "").partition(".")
        if not hmac.compare_digest(signature.encode(), self._sign("session", payload).encode()):
            return None
        try:
            session = Session(**orjson.loads(base64.urlsafe_b64decode(payload)))
        except (ValueError, TypeError, binascii.Error):
            return None
        return session if datetime.fromtimestamp(session.expires_at, UTC) > self.clock() else None

    def make_csrf(self, session: Session) -> str:
        """What a form of this session must carry: another site can't know it."""
        return self._sign("csrf", session.nonce)

    def check_csrf(self, session: Session | None, given: str) -> None:
        """Raise `FormOutdatedError` unless the form was one of ours, for this session."""
        if session is None or not hmac.compare_digest(given.encode(errors="replace"), self.make_csrf(session).encode()):
            raise FormOutdatedError

    def _sign(self, purpose: str, text: str) -> str:
        return hmac.digest(self.key, f"{purpose}\0{text}".encode(), "sha256").hex()


@dataclass(frozen=True, slots=True)
class Visitor:
    """A person with a valid session, whose token is still valid."""

    principal: tokens.Principal
    session: Session
    csrf: str


class LoginNeededError(Exception):
    """The page is for people who are known."""


class FormOutdatedError(problems.RequestRefusedError):
    """The form was made for another session, or not by us."""

    def __init__(self) -> None:
        super().__init__(403, "csrf", "wrong or old", "the form is out of date: go back, reload the page, try again")


def find_visitor(request: Request, site: Site) -> Visitor | None:
    """Who is at the browser; None for a stranger and for somebody whose token was revoked."""
    session = site.sessions.read(request)
    if session is None or not session.name:
        return None
    with db.reading(site.engine) as connection:
        principal = tokens.read(connection, session.name)
    return Visitor(principal, session, site.sessions.make_csrf(session)) if principal else None


def require_visitor(request: Request, site: SiteHere) -> Visitor:
    """The person at the browser. Raises `LoginNeededError`."""
    visitor = find_visitor(request, site)
    if visitor is None:
        raise LoginNeededError
    return visitor


VisitorHere = Annotated[Visitor, Depends(require_visitor)]


def require_expert(visitor: VisitorHere) -> Visitor:
    """A reviewer at the browser."""
    if visitor.principal.role != "reviewer":
        remedy = "cases are for reviewers: log out, and log in with a reviewer's token"
        raise problems.RequestRefusedError(403, "role", visitor.principal.role, remedy)
    return visitor


ExpertHere = Annotated[Visitor, Depends(require_expert)]


def check_form(site: SiteHere, visitor: VisitorHere, csrf: Annotated[str, Form()] = "") -> None:
    """Let a form through that we made for this session."""
    site.sessions.check_csrf(visitor.session, csrf)
