"""Handles stored events: each goes to the handler of its type, and one that fails costs only itself.

A batch is handled in one transaction. Handlers commute and may run twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

import orjson
import structlog
from sqlalchemy import Connection

from consumers import history_handler, label_handler, prediction_handler, rules, schemas, work
from storage import db, events

PATIENCE = timedelta(days=30)

log = structlog.get_logger()


def handle_batch(connection: Connection, batch: Sequence[events.Stored], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Apply stored events in the caller's transaction; returns how many ended in each state.

    When the batch fails as a whole each event is tried alone, so that one bad event costs only itself.
    """
    _take_turn(connection, batch)
    try:
        return _handle_in_savepoint(connection, [_read(event) for event in batch], agents, now)
    except Exception as error:
        # Whatever one event does wrong must not hold up the others: find it, park it, go on. A database that is
        # gone is no event's fault: the whole transaction fails.
        if _is_databases(connection, error) or (len(batch) == 1 and isinstance(error, db.UNAVAILABLE)):
            raise
    outcome: Counter[str] = Counter()
    for event in batch:
        outcome += _handle_alone(connection, event, agents, now)
    return outcome


def handle_new(connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    """Apply events that the caller's transaction stored as handled; returns how many ended in each state.

    They are taken in the order in which the consumer would read them, so that both decide alike. When the batch fails it is left to
    the consumer, which finds the event at fault; whoever sent it need not wait for that.
    """
    if not items:
        return Counter()
    _take_turn(connection, [event for event, _ in items])
    try:
        return _handle_in_savepoint(connection, sorted(items, key=_by_ulid), agents, now)
    except Exception as error:
        if _is_databases(connection, error):
            raise
        events.unhandle(connection, [event.ulid for event, _ in items])
        log.warning("left_to_the_consumer", events=len(items), error=type(error).__name__)
        return Counter()


def _handle_alone(connection: Connection, event: events.Stored, agents: Mapping[str, rules.Agent], now: datetime) -> Counter[str]:
    try:
        return _handle_in_savepoint(connection, [_read(event)], agents, now)
    except Exception as error:
        if _is_databases(connection, error):
            raise
        return work.park(connection, event, work.describe_error(error, "the handler"), now)


def _is_databases(connection: Connection, error: Exception) -> bool:
    """Whether it is the database that failed, so that the whole transaction does: it may be back soon, or has undone everything."""
    return db.is_passing(error) or db.is_over(connection)


def _take_turn(connection: Connection, batch: Sequence[events.Stored]) -> None:
    """Predictions are handled beside others, labels alone: else a label and its prediction, each not seeing the other, would both wait."""
    db.take_turn(connection, alone=schemas.LABEL in {event.type for event in batch})


def _by_ulid(item: work.Item) -> str:
    return item[0].ulid


def _read(event: events.Stored) -> work.Item:
    return event, None if event.data is None else orjson.loads(event.data)


def _handle_in_savepoint(
    connection: Connection, items: Sequence[work.Item], agents: Mapping[str, rules.Agent], now: datetime
) -> Counter[str]:
    try:
        with db.savepoint(connection):
            return _handle(connection, items, agents, now, _HANDLERS)
    except prediction_handler.RepeatedError:
        with db.savepoint(connection):
            return _handle(connection, items, agents, now, {**_HANDLERS, schemas.PREDICTION: prediction_handler.handle_repeated})


def _handle(
    connection: Connection,
    items: Sequence[work.Item],
    agents: Mapping[str, rules.Agent],
    now: datetime,
    handlers: Mapping[str, _Handler],
) -> Counter[str]:
    outcome: Counter[str] = Counter()
    by_type: dict[str, list[work.Item]] = {}
    for item in items:
        event, data = item
        if data is None:
            outcome += work.park(connection, event, "its payload was erased", now)
        elif data["agent"] not in agents:
            outcome += work.park(connection, event, f"agent {data['agent']!r} is not configured any more", now)
        else:
            by_type.setdefault(event.type, []).append(item)
    for kind, handler in handlers.items():  # predictions before labels: then fewer labels have to wait
        if kind in by_type:
            outcome += handler(connection, by_type[kind], agents, now)
    return outcome


def park_overdue(connection: Connection, now: datetime) -> int:
    """Give up on labels whose claim never came; they stay as dead letters. Returns how many."""
    overdue = events.read_overdue(connection, now, PATIENCE)
    for event in overdue:
        work.park(connection, event, f"no prediction for {event.subject.split('/')[0]} came within {PATIENCE.days} days", now)
    return len(overdue)


_Handler = Callable[[Connection, Sequence[work.Item], Mapping[str, rules.Agent], datetime], Counter[str]]
_HANDLERS: dict[str, _Handler] = {
    schemas.PREDICTION: prediction_handler.handle,
    schemas.LABEL: label_handler.handle,
    schemas.HISTORY: history_handler.handle,
}
