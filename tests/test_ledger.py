"""storage.ledger: a chain in which no link can be changed, taken out or put in unseen, and which names no claim."""

import threading
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import update

from storage import db, ledger
from storage.tables import Installation

pytestmark = pytest.mark.databases("sqlite", "postgresql")


@pytest.fixture
def chain(engine, now):
    with db.writing(engine) as connection:
        for number in range(10):
            ledger.append(connection, "verdict", "adjudication", {"version": f"v1.{number}"}, now + timedelta(seconds=number))
    return engine


def tamper(engine, statement):
    """Write into the database behind the ledger's back."""
    with db.writing(engine) as connection:
        connection.exec_driver_sql(statement)


def verify(engine):
    with db.reading(engine) as connection:
        return ledger.verify(connection)


def test_an_untouched_chain_is_whole(chain):
    assert verify(chain) == []
    with db.reading(chain) as connection:
        assert ledger.head(connection)[0] == 10
        assert [row["seq"] for row in ledger.show(connection, limit=3)] == [10, 9, 8]
        assert ledger.show(connection, "scribe") == []


def test_an_empty_ledger_is_whole(engine):
    assert verify(engine) == []
    with db.reading(engine) as connection:
        assert ledger.head(connection) == (0, ledger.GENESIS)


def test_the_head_of_an_empty_ledger_stays_true(chain):
    with db.reading(chain) as connection:
        assert ledger.holds(connection, ledger.GENESIS)


@pytest.mark.parametrize(
    ("statement", "problem"),
    [
        ("UPDATE ledger SET body = '{}' WHERE seq = 4", "entry 4 (verdict of 2026-03-02 09:30) was changed"),
        ("UPDATE ledger SET at = (SELECT at FROM ledger WHERE seq = 1) WHERE seq = 4", "entry 4"),
        ("UPDATE ledger SET kind = 'promote' WHERE seq = 4", "entry 4"),
        ("UPDATE ledger SET agent = 'scribe' WHERE seq = 4", "entry 4"),
        ("UPDATE ledger SET claim = 'of another' WHERE seq = 4", "entry 4"),
        ("UPDATE ledger SET hash = 'x' WHERE seq = 4", "entry 5 does not follow on the one before it"),
        ("DELETE FROM ledger WHERE seq = 4", "entry 4 is missing"),
        ("UPDATE ledger SET seq = 40 WHERE seq = 10", "entry 10 is missing"),
    ],
)
def test_whatever_is_changed_is_named(chain, statement, problem):
    tamper(chain, statement)
    assert any(sentence.startswith(problem) for sentence in verify(chain))


def test_a_cut_end_shows_against_a_hash_that_was_noted(chain):
    with db.reading(chain) as connection:
        noted = ledger.head(connection)[1]
        assert ledger.holds(connection, noted)
    tamper(chain, "DELETE FROM ledger WHERE seq = 10")
    assert verify(chain) == []
    with db.reading(chain) as connection:
        assert not ledger.holds(connection, noted)


def test_a_time_in_another_zone_is_the_same_time(engine):
    with db.writing(engine) as connection:
        ledger.append(connection, "verdict", "adjudication", {}, datetime(2026, 3, 2, 9, 30, tzinfo=timezone(timedelta(hours=-8))))
    assert verify(engine) == []


def test_writers_at_the_same_time_make_one_chain(engine, now):
    def write():
        for _ in range(10):
            with db.writing(engine) as connection:
                ledger.append(connection, "label", "adjudication", {"answer": "DENIED"}, now)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(engine) == []
    with db.reading(engine) as connection:
        assert ledger.head(connection)[0] == 40


def test_what_is_rolled_back_leaves_no_link(chain, now):
    def write_and_die():
        with db.writing(chain) as connection:
            ledger.append(connection, "verdict", "adjudication", {}, now)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_die()
    assert verify(chain) == []
    with db.reading(chain) as connection:
        assert ledger.head(connection)[0] == 10


def test_a_claim_is_named_by_a_key_of_this_installation(engine, new_engine, now):
    other = new_engine()
    with db.writing(other) as connection:
        connection.execute(update(Installation).values(secret="of another installation"))
    names = []
    for one in (engine, engine, other):
        with db.writing(one) as connection:
            names.append(ledger.hide(connection, "adjudication", "claim-1"))
            ledger.append(connection, "label", "adjudication", {"claim": names[-1]}, now)
    with db.reading(engine) as connection:
        assert names[0] == names[1] != names[2]
        assert ledger.hide(connection, "scribe", "claim-1") not in names
        assert [row["seq"] for row in ledger.of_claim(connection, "adjudication", "claim-1")] == [1, 2]
        assert ledger.of_claim(connection, "adjudication", "claim-2") == []
