"""Takes events from many requests at once: one thread parses and stores, and whatever came in meanwhile shares the next commit.

One writer never waits for another one's lock, and a hundred single events cost one sync of the disk instead of a hundred.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import structlog
from sqlalchemy import Engine

from consumers import delivery, embedded, handlers, rules, schemas, work
from storage import db, events, tokens

Form = Literal["single", "batch", "lines"]
Item = schemas.AnyEvent | schemas.Refusal
MAX_ITEMS = 10_000
GROUP_ITEMS = 1_000

log = structlog.get_logger()


class TooManyError(ValueError):
    """There are more events in one request than one transaction should hold."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What became of the events of a request, and how that is written down for whoever sent it."""

    results: list[delivery.Delivered]
    written: Any


@dataclass(slots=True, eq=False)
class Arrival:
    """The body of one request, of the event type that its route takes, and who waits for what became of it; `write` writes that down."""

    body: bytes
    kind: str
    form: Form
    principal: tokens.Principal
    write: Callable[[list[delivery.Delivered]], Any]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    done: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    _draft: Answer | None = None

    def foresee(self, results: list[delivery.Delivered]) -> None:
        """Have the answer written while the disk is waited for, from whatever thread; `settle` gives it away, or another one."""
        self.loop.call_soon_threadsafe(self._prepare, results)

    def settle(self, outcome: list[delivery.Delivered] | Exception) -> None:
        """Tell the request, from whatever thread."""
        self.loop.call_soon_threadsafe(self._settle, outcome)

    def _prepare(self, results: list[delivery.Delivered]) -> None:
        with contextlib.suppress(Exception):  # it is raised when the answer is due
            self._draft = Answer(results, self.write(results))

    def _settle(self, outcome: list[delivery.Delivered] | Exception) -> None:
        if self.done.done():  # the client left, and the request was cancelled
            return
        if isinstance(outcome, Exception):
            self.done.set_exception(outcome)
            return
        try:
            draft = self._draft
            self.done.set_result(draft if draft is not None and draft.results is outcome else Answer(outcome, self.write(outcome)))
        except Exception as error:  # noqa: BLE001  it goes to whoever waits
            self.done.set_exception(error)


class Intake:
    """The one writer of events that come in by HTTP. With `counters` it handles them too, in the transaction that stores them."""

    def __init__(
        self,
        engine: Engine,
        agents: Mapping[str, rules.Agent],
        clock: Callable[[], datetime],
        counters: embedded.Counters | None = None,
    ) -> None:
        self._engine, self._agents, self._clock, self._counters = engine, agents, clock, counters
        self._labels_of = {name: agent.labels for name, agent in agents.items()}
        self._waiting: deque[Arrival] = deque()
        self._is_called = False
        self._thread = ThreadPoolExecutor(1, "intake")

    @property
    def is_handling(self) -> bool:
        """Whether events are handled as they come in."""
        return self._counters is not None

    async def take(self, arrival: Arrival) -> Answer:
        """Store the events of a request; returns after the commit, with a result for each.

        Raises `schemas.MalformedError` and `TooManyError`, and what the database raised.
        """
        self._waiting.append(arrival)
        if not self._is_called:
            self._is_called = True
            self._thread.submit(self._store_waiting)
        return await arrival.done

    def close(self) -> None:
        """Store what was taken, and end the thread."""
        self._thread.shutdown()

    def _store_waiting(self) -> None:
        # Whoever comes from here on calls again, so nobody is forgotten; what came before is in the queue.
        self._is_called = False
        while self._waiting:
            self._store_group(self._gather())

    def _store_group(self, group: Sequence[tuple[Arrival, list[Item]]]) -> None:
        try:
            self._store_surely(group)
        except Exception as error:  # noqa: BLE001  it goes to whoever waits; one request's fault must not be another's
            if len(group) > 1 and not isinstance(error, db.UNAVAILABLE):
                for one in group:
                    self._store_group([one])
                return
            for arrival, _ in group:
                arrival.settle(error)

    def _store_surely(self, group: Sequence[tuple[Arrival, list[Item]]]) -> None:
        """As `_store`, once more when it was cut off; what was committed all the same is a duplicate then, and handled once."""
        try:
            self._store(group)
        except db.UNAVAILABLE as error:
            if not db.was_cut_off(error):
                raise
            log.warning("storing_cut_off", requests=len(group), error=type(error).__name__, action="once more")
            self._store(group)

    def _gather(self) -> list[tuple[Arrival, list[Item]]]:
        group: list[tuple[Arrival, list[Item]]] = []
        count = 0
        while self._waiting and count < GROUP_ITEMS:
            arrival = self._waiting.popleft()
            try:
                items = parse(arrival)
            except Exception as error:  # noqa: BLE001  it goes to whoever waits
                arrival.settle(error)
                continue
            group.append((arrival, items))
            count += len(items)
        return group

    def _store(self, group: Sequence[tuple[Arrival, list[Item]]]) -> None:
        if not group:
            return
        now = self._clock()
        by_principal: dict[tokens.Principal, list[Item]] = {}
        for arrival, items in group:
            by_principal.setdefault(arrival.principal, []).extend(items)
        told: dict[tokens.Principal, Iterator[delivery.Delivered]] = {}
        new: list[work.Item] = []
        state: events.State = "handled" if self.is_handling else "received"
        with db.writing(self._engine, alone=False) as connection:
            for principal, items in by_principal.items():
                delivered, stored = delivery.deliver_as(connection, items, self._labels_of, principal, now, state)
                told[principal] = iter(delivered)
                new += stored
            handled = handlers.handle_new(connection, new, self._agents, now) if self.is_handling else Counter[str]()
            results = [list(itertools.islice(told[arrival.principal], len(items))) for arrival, items in group]
            for (arrival, _), mine in zip(group, results, strict=True):
                if len(mine) > 1:  # one is written faster than asked for
                    arrival.foresee(mine)
        if self._counters is not None and handled:
            self._counters.add(handled)
        for (arrival, _), mine in zip(group, results, strict=True):
            arrival.settle(mine)


def parse(arrival: Arrival) -> list[Item]:
    """The checked events of a body. Raises `schemas.MalformedError`, `TooManyError`."""
    if arrival.form == "lines":
        items = _parse_lines([one for one in enumerate(arrival.body.splitlines(), start=1) if one[1].strip()], arrival.kind)
    elif arrival.form == "single":
        items = _parse_single(arrival.body, arrival.kind)
    else:
        items = schemas.parse(arrival.body, arrival.kind)
    if len(items) > MAX_ITEMS:
        raise TooManyError(f"{len(items)} events")
    return items


def _parse_single(body: bytes, kind: str) -> list[Item]:
    items: list[Any] = schemas.parse_single(body, kind)
    if len(items) != 1:
        raise schemas.MalformedError(f"the body must hold one event, this holds {len(items)}")
    return items


def _parse_lines(lines: Sequence[tuple[int, bytes]], kind: str) -> list[Item]:
    """All lines at once, which is fast; where one of them is no JSON, line by line, to say which."""
    try:
        items = schemas.parse(b"[" + b",".join(line for _, line in lines) + b"]", kind)
        if len(items) == len(lines):
            return items
    except schemas.MalformedError:
        pass
    return [_parse_line(number, line, kind) for number, line in lines]


def _parse_line(number: int, line: bytes, kind: str) -> Item:
    try:
        return _parse_single(line, kind)[0]
    except schemas.MalformedError as error:
        return schemas.Refusal(f"line {number}", schemas.shorten(line.decode(errors="replace")), str(error))
