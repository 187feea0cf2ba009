"""storage.tokens: who may do what; a secret is shown once, and a name is never used again."""

from __future__ import annotations

from datetime import datetime

import pytest
from sqlalchemy import Engine

from storage import db, tokens

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_a_token_is_shown_once_and_stops_working_when_revoked(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        secret = tokens.add(connection, "ann", "reviewer", now)
        assert tokens.find(connection, secret) == tokens.Principal("ann", "reviewer")
        assert secret not in str(tokens.list_all(connection))
        tokens.revoke(connection, "ann", now)
        assert tokens.find(connection, secret) is None
        with pytest.raises(tokens.TokenError, match="never reused"):
            tokens.add(connection, "ann", "reviewer", now)
    with db.writing(engine) as connection, pytest.raises(tokens.TokenError, match="producer, reviewer, operator"):
        tokens.add(connection, "eve", "admin", now)
