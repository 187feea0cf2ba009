"""The stream as a whole: it begins when the broker answers and the topics are there, and waits while they are not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import structlog
from sqlalchemy import Connection

from consumers import broker, records, threads, topics
from consumers.progress import Outgoing

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0
END_SECONDS = 20.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Lease:
    """As whom we hold a lease, and how one is taken: name, holder, time and term give the fence while it is ours."""

    holder: str
    acquire: Callable[[Connection, str, str, datetime, timedelta], int | None]


@dataclass(frozen=True, slots=True)
class Stream:
    """Where the brokers are, as which group we read, by which consumer, and where the records go; what goes out, and under which lease."""

    access: broker.Access
    group: str
    consumer: Literal["faust", "poll"]
    inlet: records.Inlet
    outlets: topics.Outlets
    lease: Lease
    sent: Outgoing = field(default_factory=Outgoing)
    problems: dict[str, str] = field(default_factory=dict)
    """What reading, sending and watching wait for, if they do."""


Work = Callable[[Stream, asyncio.Event, threading.Event], Coroutine[Any, Any, None]]


async def run(stream: Stream, stop: asyncio.Event) -> None:
    """Read and send until `stop`. Raises when only a new process helps; what the broker lacks is waited for: HTTP goes on meanwhile."""
    ending, stopping = asyncio.Event(), threading.Event()
    works: tuple[Work, ...] = (_read, _send, _watch)
    tasks = {asyncio.create_task(persist(stream, work, ending, stopping), name=work.__name__) for work in works}
    bell = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({*tasks, bell}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ending.set()
        stopping.set()
        bell.cancel()
        ended, late = await asyncio.wait(tasks, timeout=END_SECONDS)
        for task in late:
            # To cancel it would help nobody: Faust then waits for its thread, and all of the process with it.
            log.error("stream_did_not_end", work=task.get_name())
    for task in ended:
        task.result()


async def persist(stream: Stream, work: Work, ending: asyncio.Event, stopping: threading.Event) -> None:
    """Do `work` again, more and more seldom, while the broker or a topic is missing, or the broker does not let us in."""
    wait = FIRST_WAIT_SECONDS
    while not ending.is_set():
        began = time.monotonic()
        try:
            await work(stream, ending, stopping)
        except broker.BrokerError as error:
            if time.monotonic() - began > LONGEST_WAIT_SECONDS:  # it went well meanwhile
                wait = FIRST_WAIT_SECONDS
            stream.problems[work.__name__] = str(error)
            log.error("stream_waits", error=str(error), seconds=wait)  # noqa: TRY400  the sentence says it all
        else:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


async def _begin(stream: Stream, work: Work) -> None:
    await asyncio.to_thread(check, stream)
    stream.problems.pop(work.__name__, None)


async def _read(stream: Stream, ending: asyncio.Event, stopping: threading.Event) -> None:
    await _begin(stream, _read)
    log.info("stream_began", consumer=stream.consumer, group=stream.group, topics=list(stream.inlet.kinds))
    progress = stream.inlet.progress
    progress.began_at = time.monotonic()
    try:
        if stream.consumer == "faust":
            from consumers import kafka  # noqa: PLC0415  the extra may be absent

            await kafka.run(stream.access, stream.group, stream.inlet, ending, stopping)
        else:
            from consumers import poll  # noqa: PLC0415  the extra may be absent

            await threads.run("poll", poll.run, stream.access, stream.group, stream.inlet, stopping)
    finally:
        progress.began_at = None


async def _send(stream: Stream, _: asyncio.Event, stopping: threading.Event) -> None:
    from consumers import relay  # noqa: PLC0415  the extra may be absent

    await _begin(stream, _send)
    await threads.run("relay", relay.Relay(stream).run, stopping)


async def _watch(stream: Stream, _: asyncio.Event, stopping: threading.Event) -> None:
    from consumers import lag  # noqa: PLC0415  the extra may be absent

    await threads.run("watch", lag.Watch(stream).run, stopping)


def check(stream: Stream) -> None:
    """Raise `broker.BrokerError` with the remedy unless the broker lets us in and has the topics."""
    with broker.connect(stream.access) as admin:
        out = stream.outlets
        topics.require(admin, [*stream.inlet.kinds, out.queue, out.events, out.dead_letters])
