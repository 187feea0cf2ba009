"""What is set aside is one dead letter for one thing, until somebody closes it."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine

from storage import db, dead_letters

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def test_the_same_thing_parked_again_later_is_the_same_letter(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        first = dead_letters.park(connection, "claims-7", "can't be read", now, key="a")
        again = dead_letters.park(connection, "claims-7", "can't be read", now + timedelta(hours=1), key="a")
        other = dead_letters.park(connection, "claims-7", "can't be read", now, key="b")
        assert (again == first, other == first) == (True, False)
        assert {row["id"] for row in dead_letters.list_parked(connection)} == {first, other}


def test_what_comes_again_after_its_letter_was_closed_is_a_new_one(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        first = dead_letters.park(connection, "claims-7", "can't be read", now, key="a")
        dead_letters.discard(connection, first, "ops", "known", now)
        later = dead_letters.park(connection, "claims-7", "can't be read", now + timedelta(hours=1), key="a")
        assert [row["id"] for row in dead_letters.list_parked(connection)] == [later]
        assert later != first
