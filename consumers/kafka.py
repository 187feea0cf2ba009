"""Reads Kafka with Faust: one worker in our own event loop, without tables, web server or transactions of its own."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faust
import mode
import structlog
from aiokafka.errors import IllegalStateError
from faust.transport.drivers import aiokafka
from mode.services import WaitResults
from mode.utils.queues import FlowControlEvent

from consumers import broker, records, threads
from storage import dead_letters

BATCH = 500
WITHIN_SECONDS = 0.05
CRASH_SECONDS = 1.0
STOP_SECONDS = 8
NEVER = 2**62
"""Faust commits each second, and after so many records once more, between reading one and handing it over: divided the group's partitions
meanwhile, it took that record for the newest it had read, and passed over those before it (faust-streaming 0.15)."""

log = structlog.get_logger()


class FaustCrashedError(RuntimeError):
    """Faust has died inside; only a new process helps."""


async def run(access: broker.Access, group: str, inlet: records.Inlet, stop: asyncio.Event, stopping: threading.Event) -> None:
    """Take batch after batch until `stop`; a batch is acknowledged after the transaction that stored or parked its records.

    Raises `BrokerAbsentError` when no broker answers at the start, `FaustCrashedError`, and what `Inlet.store_patiently` raises.
    """
    with tempfile.TemporaryDirectory(prefix="ratchet-faust-") as folder:
        app = correct(make_app(access, group, folder))
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = asyncio.Lock()
        _add_agent(app, Taker(inlet, stopping, turn, failed))
        try:
            await app.start()
        except Exception as error:
            await _stop(app)  # what had begun goes on otherwise, and each further try adds to it
            raise broker.BrokerAbsentError(f"Faust finds no broker ({type(error).__name__}: {error})") from error
        try:
            await _watch(app, stop, failed)
        finally:
            # A batch in hand is finished and its offsets are committed first: then nothing of it comes again.
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await turn.acquire()
                    await app.consumer.commit()
            except TimeoutError:
                log.warning("offsets_not_committed", error="TimeoutError")
            finally:
                await app.stop()


async def _stop(app: faust.App) -> None:
    """Stop a worker whose start failed half-way. That may fail as well: what is told is why it did not start."""
    try:
        async with asyncio.timeout(STOP_SECONDS):
            await app.stop()
        thread_loop = app.consumer._thread.thread_loop  # noqa: SLF001  of a thread that never began nobody else closes the loop
        if not thread_loop.is_running():
            thread_loop.close()
    except Exception as error:  # noqa: BLE001  whatever it is, the same worker is not used again
        log.warning("faust_not_stopped", error=type(error).__name__)


def make_app(access: broker.Access, group: str, folder: str) -> faust.App:
    """A Faust that keeps nothing and serves nothing; `folder` is for what it writes all the same."""
    return faust.App(
        group,
        broker=[f"kafka://{one}" for one in access.bootstrap.split(",")],
        broker_credentials=_to_credentials(access),
        store="memory://",
        datadir=folder,
        web_enabled=False,
        topic_disable_leader=True,
        topic_allow_declare=False,
        autodiscover=False,
        consumer_auto_offset_reset="earliest",
        broker_commit_interval=1.0,
        broker_commit_every=NEVER,
        broker_session_timeout=broker.SESSION_SECONDS,
        broker_heartbeat_interval=broker.HEARTBEAT_SECONDS,
        stream_wait_empty=False,
        key_serializer="raw",
        value_serializer="raw",
    )


def correct(app: faust.App) -> faust.App:
    """Put what passes over no record in the place of Faust's own, before anything of it begins."""
    app.flow_control, app.transport.Consumer = FlowControl(), Consumer
    return app


class FlowControl(FlowControlEvent):
    """Stops what is read on its way to the agent while partitions are divided anew, and throws away what was on its way before.

    Divided twice in a row, Faust lets records through at the end of the first division, and at the end of the second one threw them away
    and passed over them as read (faust-streaming 0.15).
    """

    def resume(self) -> None:
        """Let records through again; where nothing was stopped nothing is thrown away."""
        if not self.is_active():
            super().resume()


class Prompt(mode.Service):
    """Begins one task for a message where Faust begins four, to wait for room in the stream: there nearly always is some."""

    async def wait_first(self, *waits: Any, **options: Any) -> Any:
        """As in Faust; the first of `waits` is waited for beside the others only when it has not ended as soon as it began."""
        first, *others = waits
        if not asyncio.iscoroutine(first):  # an event, for one
            return await super().wait_first(*waits, **options)
        task = asyncio.ensure_future(first)
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            task.cancel()
            _close(others)
            raise
        if not task.done():
            return await super().wait_first(task, *others, **options)
        _close(others)
        return WaitResults([first], [task.result()], stopped=False)


class Consumer(Prompt, aiokafka.Consumer):  # type: ignore[misc]
    """Faust's own, at two thirds of its costs.

    Faust reads while partitions are divided anew, throws that away and goes back to what was committed last, to read it again. It did not
    go back in a partition of which nothing was committed, or 0; what it let through meanwhile it took for acknowledged; and where it could
    not go back it only said so (faust-streaming 0.15).
    """

    async def perform_seek(self) -> None:
        """Go back to what was committed last; the flow is stopped meanwhile and afterwards. Faust crashes where that fails.

        Partitions that are not ours any more are no failure, nor is an end: whoever gets them goes back.
        """
        self.stop_flow()
        try:
            await super().perform_seek()
        except (IllegalStateError, AssertionError, *self.consumer_stopped_errors):
            raise
        except Exception as error:
            await self.crash(error)
            raise

    async def seek_to_committed(self) -> Mapping[Any, int]:
        """As in Faust, and to the beginning of a partition of which nothing is committed.

        That is asked of nobody: where there is no record 0 any more the fetcher goes to the first that there is.
        """
        committed: Mapping[Any, int] = await super().seek_to_committed()
        if never := [place for place, offset in committed.items() if not offset]:
            await self._thread.seek_wait(dict.fromkeys(never, 0))
            self._committed_offset.update(dict.fromkeys(never))  # a commit that was refused is counted as made
        return committed


def _close(waits: Sequence[Any]) -> None:
    """Let go of what nobody has begun to wait for."""
    for one in waits:
        if asyncio.iscoroutine(one):
            one.close()


def _to_credentials(access: broker.Access) -> Any:
    context = access.make_context()
    if access.mechanism is None:
        return faust.SSLCredentials(context) if context is not None else None
    return faust.SASLCredentials(username=access.user, password=access.password, mechanism=access.mechanism, ssl_context=context)


@dataclass(frozen=True, slots=True)
class Taker:
    """Takes batches one after another, in a thread; after one that failed it takes none."""

    inlet: records.Inlet
    stopping: threading.Event
    turn: asyncio.Lock
    failed: asyncio.Future[None]

    async def take(self, batch: Sequence[Any]) -> None:
        """Store and handle a batch, then acknowledge it; an error goes into `failed`."""
        async with self.turn:
            if self.failed.done():
                return
            try:
                await threads.run("take", self._store, [_to_record(event) for event in batch])
            except Exception as error:  # noqa: BLE001  raised by `run`: an agent that raises goes on behind the events that it lost
                self.failed.set_exception(error)
            else:
                for event in batch:
                    event.ack()
                self.inlet.progress.acknowledged |= {(one.message.topic, one.message.partition): one.message.offset for one in batch}
                self.inlet.progress.acknowledged_at = time.monotonic()

    def _store(self, batch: Sequence[dead_letters.Record]) -> None:
        self.inlet.store_patiently(self.inlet.read(batch), self.stopping)


def _add_agent(app: faust.App, taker: Taker) -> None:
    topic = app.topic(*taker.inlet.kinds, key_type=bytes, value_type=bytes, key_serializer="raw", value_serializer="raw")

    @app.agent(topic)  # type: ignore[untyped-decorator]
    async def consume(stream: Any) -> None:
        underway: asyncio.Task[None] | None = None
        async for batch in stream.noack_take(BATCH, within=WITHIN_SECONDS):  # the next one is gathered while one is taken
            if underway is not None:
                await underway
            if taker.failed.done():
                await asyncio.Event().wait()  # until Faust is stopped: nothing after the failed batch may be taken
            underway = asyncio.create_task(taker.take(batch))


def _to_record(event: Any) -> dead_letters.Record:
    message = event.message
    return dead_letters.Record(message.topic, message.partition, message.offset, event.value)


async def _watch(app: faust.App, stop: asyncio.Event, failed: asyncio.Future[None]) -> None:
    """Wait for the end, one way or another: a crash inside Faust is silent, so it is asked."""
    stopped: asyncio.Future[Any] = asyncio.create_task(stop.wait())
    try:
        while not (stop.is_set() or failed.done()):
            if app.crashed or app.should_stop:
                why = type(app.crash_reason).__name__
                raise FaustCrashedError(f"Faust has crashed ({why}): the service manager starts anew") from app.crash_reason
            await asyncio.wait({stopped, failed}, timeout=CRASH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    if failed.done():
        failed.result()
