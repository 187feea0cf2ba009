"""The event log stores each identity once and says what became of a repeated one."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from sqlalchemy import Engine, update

from storage import db, events
from storage.tables import Event

pytestmark = pytest.mark.databases("sqlite", "postgresql")


def make(event_id: str, at: datetime, content: str = "{}") -> events.Incoming:
    return events.Incoming("node-1", event_id, "some.type", "adjudication/c1", at, content, f"digest of {content}")


def test_an_event_sent_again_is_a_duplicate_of_the_first(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        first = events.append(connection, [make("e1", now)], now)
    with db.writing(engine) as connection:
        again = events.append(connection, [make("e1", now), make("e2", now)], now + timedelta(seconds=1))
    assert [one.outcome for one in first] == ["stored"]
    assert [one.outcome for one in again] == ["duplicate", "stored"]
    assert again[0].ulid == first[0].ulid


def test_the_same_identity_with_other_content_is_a_conflict_and_the_first_stays(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        ulid = events.append(connection, [make("e1", now, '{"a":1}')], now)[0].ulid
        receipt = events.append(connection, [make("e1", now, '{"a":2}')], now + timedelta(seconds=1))[0]
        stored = events.read(connection, ulid)
    assert receipt.outcome == "conflict"
    assert stored is not None
    assert stored.data == '{"a":1}'


def test_an_erased_event_sent_again_is_known_by_its_digest(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        events.append(connection, [make("e1", now, '{"a":1}')], now)
        connection.execute(update(Event).values(data=None))
        receipts = [events.append(connection, [make("e1", now, text)], now + timedelta(seconds=1))[0] for text in ('{"a":1}', '{"a":2}')]
    assert [one.outcome for one in receipts] == ["duplicate", "conflict"]


def test_one_batch_may_hold_the_same_event_twice(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        receipts = events.append(connection, [make("e1", now), make("e1", now), make("e1", now, '{"a":1}')], now)
        received = events.read_received(connection, 10)
    assert [one.outcome for one in receipts] == ["stored", "stored", "conflict"]
    assert len(received) == 1


def test_a_transaction_that_fails_leaves_no_event(engine: Engine, now: datetime) -> None:
    def store_and_fail() -> None:
        with db.writing(engine) as connection:
            events.append(connection, [make("e1", now)], now)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        store_and_fail()
    with db.writing(engine) as connection:
        assert events.read_received(connection, 10) == []


def test_handled_events_are_no_longer_work(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        ulids = [one.ulid for one in events.append(connection, [make("e1", now), make("e2", now)], now)]
        events.mark(connection, ulids[:1], "handled", now)
        assert [one.ulid for one in events.read_received(connection, 10)] == ulids[1:]
        assert events.count_by_state(connection) == {"received": 1, "waiting": 0, "unsent": 0}
        assert events.oldest_received_at(connection) == now


def test_an_emitted_event_waits_in_the_outbox_once(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        for _ in range(2):
            events.emit(connection, "ratchet.version.judged.v1", "adjudication/v1.1", "v1.1", {"verdict": "promote"}, now)
        assert events.count_by_state(connection)["unsent"] == 1
        assert events.read_received(connection, 10) == []


def test_what_is_emitted_at_one_moment_or_after_the_clock_jumped_back_goes_out_in_order(engine: Engine, now: datetime) -> None:
    numbers = list(range(30))
    for number in numbers:
        with db.writing(engine) as connection:
            at = now - timedelta(hours=number // 20)
            events.emit(connection, "ratchet.version.judged.v1", "adjudication/v1.1", str(number), {}, at)
    with db.writing(engine) as connection:
        told = [int(one.event_id.rpartition("/")[2]) for one in events.read_unsent(connection, 100)]
        assert told == numbers
        events.mark(connection, [one.ulid for one in events.read_unsent(connection, 10)], "sent", now)
        events.emit(connection, "ratchet.version.judged.v1", "adjudication/v1.1", "30", {}, now)
        assert [int(one.event_id.rpartition("/")[2]) for one in events.read_unsent(connection, 100)] == [*numbers[10:], 30]


def test_what_is_underway_is_left_out_of_what_is_read(engine: Engine, now: datetime) -> None:
    with db.writing(engine) as connection:
        for number in range(3):
            events.emit(connection, "ratchet.version.judged.v1", "adjudication/v1.1", str(number), {}, now)
        first, second, third = events.read_unsent(connection, 10)
        assert events.read_unsent(connection, 10, [first.ulid, third.ulid]) == [second]
