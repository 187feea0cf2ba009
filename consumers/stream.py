"""The stream as a whole: it begins when the broker answers and the topics are there, and waits while they are not."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import structlog

from consumers import broker, records, topics

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stream:
    """Where the brokers are, as which group we read, by which consumer, and where the records go."""

    access: broker.Access
    group: str
    consumer: Literal["faust", "poll"]
    inlet: records.Inlet


async def run(stream: Stream, stop: asyncio.Event) -> None:
    """Read until `stop`. Raises when only a new process helps; what the broker lacks is waited for: HTTP goes on meanwhile."""
    stopping = threading.Event()
    bell = asyncio.create_task(_pass_on(stop, stopping))
    try:
        await persist(lambda: _read(stream, stop, stopping), stop)
    finally:
        stopping.set()
        bell.cancel()


async def persist(work: Callable[[], Awaitable[None]], stop: asyncio.Event) -> None:
    """Do `work` again, more and more seldom, while the broker or a topic is missing, or the broker does not let us in."""
    wait = FIRST_WAIT_SECONDS
    while not stop.is_set():
        try:
            await work()
        except broker.BrokerError as error:
            log.error("stream_waits", error=str(error), seconds=wait)  # noqa: TRY400  the sentence says it all
        else:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


async def _pass_on(stop: asyncio.Event, stopping: threading.Event) -> None:
    """Tell threads that it is time to stop."""
    await stop.wait()
    stopping.set()


async def _read(stream: Stream, stop: asyncio.Event, stopping: threading.Event) -> None:
    await asyncio.to_thread(check, stream)
    log.info("stream_began", consumer=stream.consumer, group=stream.group, topics=list(stream.inlet.kinds))
    if stream.consumer == "faust":
        from consumers import kafka  # noqa: PLC0415  the extra may be absent

        await kafka.run(stream.access, stream.group, stream.inlet, stop, stopping)
    else:
        from consumers import poll  # noqa: PLC0415  the extra may be absent

        with ThreadPoolExecutor(1, "poll") as thread:
            reading = asyncio.get_running_loop().run_in_executor(thread, poll.run, stream.access, stream.group, stream.inlet, stopping)
            try:
                await reading
            except asyncio.CancelledError:
                stopping.set()
                raise


def check(stream: Stream) -> None:
    """Raise `broker.BrokerError` with the remedy unless the broker lets us in and has the topics."""
    with broker.connect(stream.access) as admin:
        topics.require(admin, stream.inlet.kinds)
