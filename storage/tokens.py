"""Access tokens: shown once, stored as a digest, each with one role."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, get_args

from sqlalchemy import Connection, RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from storage.tables import Installation, Token

Role = Literal["producer", "reviewer", "operator"]
PREFIX = "rat_"


class TokenError(ValueError):
    """A token can't be made or revoked as asked."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from."""

    name: str
    role: Role


def add(connection: Connection, name: str, role: str, now: datetime) -> str:
    """Make a token; the secret that is returned is kept nowhere. Raises `TokenError`."""
    if role not in get_args(Role):
        raise TokenError(f"role {role!r} is unknown: use one of {', '.join(get_args(Role))}")
    if not name or not name.isprintable() or len(name) > 64:  # noqa: PLR2004
        raise TokenError(f"name {name!r} is not usable: 1 to 64 printable characters")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        connection.execute(insert(Token).values(name=name, role=role, digest=_digest(secret), created_at=now))
    except IntegrityError as error:
        raise TokenError(f"a token named {name!r} exists: revoke it and use another name, names are never reused") from error
    return secret


def revoke(connection: Connection, name: str, now: datetime) -> None:
    """Make a token useless from now on. Raises `TokenError` when there is none of this name."""
    changed = connection.execute(update(Token).where(Token.name == name, Token.revoked_at.is_(None)).values(revoked_at=now))
    if not changed.rowcount:
        raise TokenError(f"there is no valid token named {name!r}: `ratchet tokens list` shows them")


def find(connection: Connection, secret: str) -> Principal | None:
    """Who the secret belongs to; None when it is unknown or revoked."""
    query = select(Token.name, Token.role).where(Token.digest == _digest(secret), Token.revoked_at.is_(None))
    row = connection.execute(query).first()
    return Principal(row.name, row.role) if row else None


def read(connection: Connection, name: str) -> Principal | None:
    """Who has the valid token of this name; None when there is none."""
    query = select(Token.name, Token.role).where(Token.name == name, Token.revoked_at.is_(None))
    row = connection.execute(query).first()
    return Principal(row.name, row.role) if row else None


def count_valid(connection: Connection) -> int:
    """How many tokens would let somebody in."""
    return connection.execute(select(func.count()).select_from(Token).where(Token.revoked_at.is_(None))).scalar_one()


def list_all(connection: Connection) -> list[RowMapping]:
    """Names, roles and times; never a secret or its digest."""
    query = select(Token.name, Token.role, Token.created_at, Token.revoked_at).order_by(Token.created_at)
    return list(connection.execute(query).mappings())


def derive_key(connection: Connection, purpose: str) -> bytes:
    """A key for one purpose, the same for ever on this installation."""
    secret = connection.execute(select(Installation.secret)).scalar_one()
    return hmac.digest(secret.encode(), purpose.encode(), "sha256")


def _digest(secret: str) -> str:
    # 256 random bits need no slow hash: there is no dictionary to try.
    return hashlib.sha256(secret.encode()).hexdigest()
