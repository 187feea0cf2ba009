"""What is Faust's and made quicker behaves as Faust's own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import faust
import mode
import orjson
import pytest
from aiokafka.errors import GroupAuthorizationFailedError
from mode.utils.queues import FlowControlQueue

from consumers import broker as brokers
from consumers import kafka, records
from tests import broker_fixtures, event_fixtures


class Service(kafka.Prompt):
    """A service that waits as the consumer does."""


def run(work: Callable[[mode.Service], Awaitable[Any]], service: type[mode.Service]) -> Any:
    async def start() -> Any:
        async with service() as started:
            return await work(started)

    return asyncio.run(start())


@pytest.fixture(params=[mode.Service, Service])
def service(request: pytest.FixtureRequest) -> type[mode.Service]:
    return request.param


async def put(queue: asyncio.Queue[int], value: int) -> int:
    """As Faust delivers a message: at once where there is room, else by a task."""
    try:
        queue.put_nowait(value)
    except asyncio.QueueFull:
        await asyncio.wait([asyncio.ensure_future(queue.put(value))])
    return value


def test_what_waits_for_room_is_delivered_when_there_is_some(service: type[mode.Service]) -> None:
    async def work(started: mode.Service) -> list[Any]:
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        suspended = asyncio.Event()
        found = [(await started.wait_first(put(queue, 1), suspended.wait())).results]
        waiting = asyncio.create_task(started.wait_first(put(queue, 2), suspended.wait()))
        await asyncio.sleep(0.01)
        found += [waiting.done(), await queue.get(), (await waiting).results, await queue.get()]
        return found

    assert run(work, service) == [[1], False, 1, [2], 2]


def test_who_waits_for_room_is_let_go_when_the_flow_is_suspended(service: type[mode.Service]) -> None:
    async def work(started: mode.Service) -> Any:
        queue: asyncio.Queue[int] = asyncio.Queue(1)
        suspended = asyncio.Event()
        await started.wait_first(put(queue, 1), suspended.wait())
        waiting = asyncio.create_task(started.wait_first(put(queue, 2), suspended.wait()))
        await asyncio.sleep(0.01)
        suspended.set()
        return (await waiting).results

    assert run(work, service) == [True]


def test_what_fails_is_raised(service: type[mode.Service]) -> None:
    async def fail(*, late: bool) -> None:
        if late:
            await asyncio.sleep(0)
        raise ValueError(late)

    async def work(started: mode.Service) -> list[str]:
        told = []
        for late in (False, True):
            with pytest.raises(ValueError, match=str(late)) as raised:
                await started.wait_first(fail(late=late), asyncio.Event().wait())
            told.append(str(raised.value))
        return told

    assert run(work, service) == ["False", "True"]


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_who_is_cancelled_lets_go_of_the_message(service: type[mode.Service], rounds: int) -> None:
    async def work(started: mode.Service) -> set[asyncio.Task[Any]]:
        before = asyncio.all_tasks()
        waiting = asyncio.create_task(started.wait_first(asyncio.sleep(60), asyncio.Event().wait()))
        for _ in range(rounds):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        await asyncio.sleep(0.01)
        return asyncio.all_tasks() - before

    assert run(work, service) == set()


def test_what_has_room_begins_one_task() -> None:
    async def work(started: mode.Service) -> int:
        queue: asyncio.Queue[int] = asyncio.Queue()
        before = len(asyncio.all_tasks())
        made: list[Any] = []
        loop = asyncio.get_running_loop()
        loop.set_task_factory(lambda loop, coroutine, **options: made.append(coroutine) or asyncio.Task(coroutine, loop=loop, **options))
        await started.wait_first(put(queue, 1), asyncio.Event().wait())
        assert len(asyncio.all_tasks()) == before
        return len(made)

    assert run(work, Service) == 1


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., faust.App]]:
    """Begins to read with Faust, in a thread and until the end of the test; returns the worker."""
    genuine, begun, ends = kafka.make_app, queue.SimpleQueue[faust.App](), []

    def make_app(*arguments: Any) -> faust.App:
        app = genuine(*arguments)
        begun.put(app)
        return app

    async def read(settings: Any, inlet: records.Inlet) -> None:
        stop = asyncio.Event()
        ends.append((asyncio.get_running_loop(), stop))
        await kafka.run(settings.to_access(), settings.group, inlet, stop, threading.Event())

    with ThreadPoolExecutor() as threads:

        def begin(settings: Any, inlet: records.Inlet) -> faust.App:
            reading.append(threads.submit(asyncio.run, read(settings, inlet)))
            return begun.get(timeout=40)

        reading: list[Future[None]] = []
        monkeypatch.setattr(kafka, "make_app", make_app)
        yield begin
        for loop, stop in ends:
            loop.call_soon_threadsafe(stop.set)
        for one in reading:
            one.result(30)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Partition and offset of each record that is handed over, instead of being stored."""
    handed: list[tuple[int, int]] = []
    monkeypatch.setattr(records.Inlet, "store", lambda _, batch, __: handed.extend((one.partition, one.offset) for one in batch.records))
    return handed


@pytest.fixture
def produced(broker, engine):
    """Puts so many records on a topic of its own; returns its settings and what reads it."""

    def produce(name: str, count: int) -> tuple[Any, records.Inlet]:
        settings, agent = broker_fixtures.make_topics(broker, name), event_fixtures.make_agent()
        value = orjson.dumps(event_fixtures.make_prediction(0, datetime.now(UTC)))
        broker_fixtures.produce(broker, settings.topics.predictions, [value] * count)
        return settings, records.Inlet(engine, {agent.name: agent}, settings.topics.kinds(), lambda: datetime.now(UTC))

    return produce


def test_all_is_read_when_partitions_are_divided_anew_while_faust_commits(produced, follow, places, monkeypatch):
    count, divide_at = 18_000, 12_000  # Faust would commit by itself at 10,000, before it hands a record over
    settings, inlet = produced("regroups", count)
    genuine, divided = kafka.Consumer.commit, threading.Event()

    async def commit(consumer, *arguments, **options):
        if consumer._n_acked == 0 and places:  # only who hands records over begins to count anew
            await asyncio.to_thread(divided.wait, 40)
        return await genuine(consumer, *arguments, **options)

    monkeypatch.setattr(kafka.Consumer, "commit", commit)
    app = follow(settings, inlet)
    try:
        broker_fixtures.wait_until(lambda: len(places) >= divide_at, 40)
        generation, reading = app.consumer_generation_id, app.consumer._thread
        reading.thread_loop.call_soon_threadsafe(reading._consumer._coordinator.request_rejoin)
        broker_fixtures.wait_until(lambda: app.consumer_generation_id != generation and app.consumer.flow_active, 40)
        divided.set()
        broker_fixtures.wait_until(lambda: broker_fixtures.read_lag(settings, settings.topics.predictions) == 0, 40)
    finally:
        divided.set()
    assert len(set(places)) == count


@pytest.mark.parametrize("committed", [None, 0])
def test_faust_goes_back_and_reads_again_though_nothing_was_ever_committed(committed, produced, follow, places, monkeypatch):
    count = 1000
    settings, inlet = produced(f"rereads-{committed}", count)
    if committed is not None:  # as who resets the group's offsets to the earliest
        broker_fixtures.acknowledge(settings, settings.topics.predictions, committed)

    async def commit(*_, **__):
        return False

    async def go_back(consumer):
        await consumer.perform_seek()
        was_active = consumer.flow_active
        consumer.resume_flow()
        return was_active

    monkeypatch.setattr(kafka.Consumer, "commit", commit)
    app = follow(settings, inlet)
    for times in (1, 2):
        broker_fixtures.wait_until(lambda times=times: sum(n >= times for n in Counter(places).values()) == count, 40)
        was_active = asyncio.run_coroutine_threadsafe(go_back(app.consumer), app.loop).result(40)
        assert not was_active, "what is read while Faust goes back is let through"


def test_a_faust_that_can_t_go_back_crashes(tmp_path, monkeypatch) -> None:
    async def refuse(_):
        raise GroupAuthorizationFailedError("ratchet")

    async def go_back() -> None:
        app = kafka.correct(kafka.make_app(brokers.Access("127.0.0.1:1"), "stays", str(tmp_path)))
        with pytest.raises(GroupAuthorizationFailedError):
            await app.consumer.perform_seek()
        assert app.crashed
        app.consumer._thread.thread_loop.close()  # that never began

    monkeypatch.setattr(kafka.aiokafka.Consumer, "seek_to_committed", refuse)
    asyncio.run(go_back())


def test_what_is_on_its_way_is_thrown_away_when_faust_had_stopped_it_and_not_when_it_resumes_twice(tmp_path) -> None:
    async def read_sizes() -> list[int]:
        control = kafka.correct(kafka.make_app(brokers.Access("127.0.0.1:1"), "resumes", str(tmp_path))).flow_control
        waiting = FlowControlQueue(flow_control=control, clear_on_resume=True)
        sizes = []
        control.resume()
        await waiting.put("a record")
        control.resume()
        sizes.append(waiting.qsize())
        control.suspend()
        control.resume()
        return [*sizes, waiting.qsize()]

    assert asyncio.run(read_sizes()) == [1, 0]


def test_a_faust_that_crashed_ends_the_stream(tmp_path) -> None:
    async def crash_and_watch() -> None:
        app = kafka.make_app(brokers.Access("127.0.0.1:1"), "crashes", str(tmp_path))
        failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watching = asyncio.create_task(kafka._watch(app, asyncio.Event(), failed))
        await asyncio.sleep(0)
        await app.crash(ZeroDivisionError("inside Faust"))
        await asyncio.wait_for(watching, 30)

    with pytest.raises(kafka.FaustCrashedError, match="ZeroDivisionError"):
        asyncio.run(crash_and_watch())
