"""From a checked event to a durable one: the same rules for every event that comes in, whatever brought it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection

from consumers import schemas
from storage import events, tokens

ROLES_BY_KIND: Mapping[str, tuple[str, ...]] = {
    "review": ("reviewer",),
    "second_read": ("reviewer",),
    "adjudication": ("operator",),
    "late_truth": ("producer", "operator"),
}
"""Who may give which kind of label."""


class Delivered(NamedTuple):
    """What became of one item: `ulid` and `outcome` when it was stored now or before, else the refusal."""

    ulid: str | None
    outcome: str
    refusal: schemas.Refusal | None = None


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
    results: list[Delivered | None] = []
    incoming: list[events.Incoming] = []
    for item in items:
        refused = item if isinstance(item, schemas.Refusal) else schemas.check(item, labels_of)
        if refused is not None:
            results.append(Delivered(None, "refused", refused))
            continue
        event: Any = item
        denied = _check_expert(event, principal) if event["type"] == schemas.LABEL else None
        if denied is None:
            try:
                incoming.append(schemas.to_incoming(event, principal.name))
            except schemas.UnstorableError as error:
                denied = Delivered(None, "refused", schemas.Refusal("data", "a number", str(error)))
        results.append(denied)
    receipts = iter(events.append(connection, incoming, now))
    return [result or _to_delivered(next(receipts)) for result in results]


def _check_expert(event: Any, principal: tokens.Principal) -> Delivered | None:
    """A label's expert is whoever the token belongs to; the name is written into the event."""
    data = event["data"]
    allowed = ROLES_BY_KIND[data.get("kind") or "review"]
    if principal.role not in allowed:
        remedy = f"a {principal.role} may not give this kind of label: use the token of a {' or '.join(allowed)}"
        return Delivered(None, "forbidden", schemas.Refusal("data.kind", schemas.shorten(data.get("kind") or "review"), remedy))
    named = data.setdefault("expert", principal.name)
    if named != principal.name:
        remedy = f"the token belongs to {principal.name}: leave `expert` out, or use the expert's own token"
        return Delivered(None, "refused", schemas.Refusal("data.expert", schemas.shorten(named), remedy))
    return None


def _to_delivered(receipt: events.Receipt) -> Delivered:
    if receipt.outcome != "conflict":
        return Delivered(receipt.ulid, receipt.outcome)
    remedy = f"this (source, id) was used for other content, stored as {receipt.ulid}: give a new event a new id"
    return Delivered(receipt.ulid, "conflict", schemas.Refusal("id", receipt.ulid, remedy))
