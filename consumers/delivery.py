"""From a checked event to a durable one: the same rules for every event that comes in, whatever brought it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from msgspec import Struct
from sqlalchemy import Connection

from consumers import schemas, work
from storage import dead_letters, events, tokens

ROLES_BY_KIND: Mapping[str, tuple[str, ...]] = {
    "review": ("reviewer",),
    "second_read": ("reviewer",),
    "adjudication": ("operator",),
    "late_truth": ("producer", "operator"),
}
"""Who may give which kind of label."""


AHEAD = timedelta(minutes=10)
"""How far the clock of whoever sends may be ahead of ours: a label's time decides which answer is the later one."""


class Delivered(Struct, frozen=True, gc=False):
    """What became of one item: `ulid` and `outcome` when it was stored now or before, else the refusal."""

    ulid: str | None
    outcome: str
    refusal: schemas.Refusal | None = None


class Prepared(NamedTuple):
    """Items before they are stored: results of the refused ones, None for the good ones, and the events and data of those."""

    results: list[Delivered | None]
    good: list[events.Incoming]
    contents: list[Any]


def deliver(
    connection: Connection,
    items: Sequence[schemas.AnyEvent | schemas.Refusal],
    labels_of: Mapping[str, Sequence[str]],
    principal: tokens.Principal,
    now: datetime,
) -> list[Delivered]:
    """Store the good items in the caller's transaction; a result for every item, in order.

    Outcomes: stored, duplicate (the same event again), conflict (its identity was used for other content), refused, forbidden.
    """
    return deliver_as(connection, items, labels_of, principal, now, "received")[0]


def deliver_as(
    connection: Connection,
    items: Sequence[schemas.AnyEvent | schemas.Refusal],
    labels_of: Mapping[str, Sequence[str]],
    principal: tokens.Principal,
    now: datetime,
    state: events.State,
) -> tuple[list[Delivered], list[work.Item]]:
    """`deliver`, and the events that were stored as `handled`: they are the caller's to handle in this transaction."""
    return store(connection, prepare(items, labels_of, principal, now), now, state)


def prepare(
    items: Sequence[schemas.AnyEvent | schemas.Refusal], labels_of: Mapping[str, Sequence[str]], principal: tokens.Principal, now: datetime
) -> Prepared:
    """Check the items and write them down as they are stored: all that needs no database."""
    results: list[Delivered | None] = []
    good: list[events.Incoming] = []
    contents: list[Any] = []
    latest = now + AHEAD
    for item in items:
        refused = _refuse(item, labels_of, principal, latest)
        if refused is None:
            event: Any = item
            try:
                good.append(schemas.to_incoming(event, principal.name))
                contents.append(event["data"])
            except schemas.UnstorableError as error:
                refused = Delivered(None, "refused", error.refusal)
        results.append(refused)
    return Prepared(results, good, contents)


def store(connection: Connection, prepared: Prepared, now: datetime, state: events.State) -> tuple[list[Delivered], list[work.Item]]:
    """Store what was prepared in the caller's transaction; returns what `deliver_as` does."""
    results, good, contents = prepared
    receipts = events.append(connection, good, now, state)
    told = [Delivered(receipt.ulid, receipt.outcome) for receipt in receipts]
    for place, receipt in enumerate(receipts):
        if receipt.outcome == "conflict":
            told[place] = _park(connection, good[place], receipt.ulid, now)
    rest = iter(told)
    delivered = [result or next(rest) for result in results] if len(told) < len(results) else told
    return delivered, _list_new(receipts, good, contents, now) if state == "handled" else []


def _list_new(
    receipts: Sequence[events.Receipt], good: Sequence[events.Incoming], contents: Sequence[Any], now: datetime
) -> list[work.Item]:
    """The events that were stored just now, each once."""
    items = list(zip(events.to_stored(receipts, good, "handled", now), contents, strict=True))
    stored = {receipt.ulid: place for place, receipt in enumerate(receipts) if receipt.outcome == "stored"}
    return items if len(stored) == len(items) else [items[place] for place in stored.values()]


def _refuse(
    item: schemas.AnyEvent | schemas.Refusal, labels_of: Mapping[str, Sequence[str]], principal: tokens.Principal, latest: datetime
) -> Delivered | None:
    refused = item if isinstance(item, schemas.Refusal) else schemas.check(item, labels_of, latest)
    if refused is not None:
        return Delivered(None, "refused", refused)
    event: Any = item
    return _check_expert(event, principal) if event["type"] == schemas.LABEL else None


def _check_expert(event: Any, principal: tokens.Principal) -> Delivered | None:
    """A label's expert is whoever the token belongs to; the name is written into the event."""
    data = event["data"]
    allowed = ROLES_BY_KIND[data.get("kind") or "review"]
    if principal.role not in allowed:
        remedy = f"the role {principal.role} may not give this kind of label: use a token with the role {' or '.join(allowed)}"
        return Delivered(None, "forbidden", schemas.Refusal("data.kind", schemas.shorten(data.get("kind") or "review"), remedy))
    named = data.setdefault("expert", principal.name)
    if named != principal.name:
        remedy = f"the token belongs to {principal.name}: leave `expert` out, or use the expert's own token"
        return Delivered(None, "refused", schemas.Refusal("data.expert", schemas.shorten(named), remedy))
    return None


def _park(connection: Connection, one: events.Incoming, known: str, now: datetime) -> Delivered:
    """Keep what a used identity came with, once while it is parked, so that an operator can see both."""
    reason = f"its (source, id) was used for other content, stored as {known}; this content has the digest {one.digest[:16]}"
    dead_letters.park(connection, one.subject, reason, now, key=f"{known}/{one.digest}", payload=one.data)
    remedy = f"this (source, id) was used for other content, stored as {known}: give a new event a new id"
    return Delivered(known, "conflict", schemas.Refusal("id", known, remedy))
