"""The real PostgreSQL server goes away and comes back: what was acknowledged is there once, the rest is told, and the roles live on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import psycopg
import pytest
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import OperationalError

from consumers import embedded
from daemon import scheduler
from storage import db, leases, predictions
from storage.tables import DeadLetter, Event, Prediction, Review
from tests.event_fixtures import make_agent, make_prediction, send
from tests.pipeline_fixtures import ScriptedLauncher, World, make_base, make_settings
from tests.postgres_fixtures import Server
from tests.web_fixtures import Clock, Site

pytestmark = pytest.mark.databases("postgresql")
BATCH = {"Content-Type": "application/cloudevents-batch+json"}


@pytest.fixture
def site(engine: Engine, now: datetime, tmp_path: Any) -> Iterator[Site]:
    """An application that handles what comes in."""
    site = Site(engine, Clock(now), tmp_path, embedded.Counters())
    yield site
    site.app.state.site.intake.close()


@contextlib.contextmanager
def away(server: Server) -> Iterator[None]:
    """The server has crashed; it is there again afterwards."""
    server.call("kill")
    try:
        yield
    finally:
        server.start()


def post(site: Site, *numbers: int) -> Any:
    sent = orjson.dumps([make_prediction(number, site.clock(), confidence=0.5) for number in numbers])

    async def call() -> Any:
        async with site.client("node") as client:
            return await client.post("/v1/predictions", content=sent, headers=BATCH)

    return asyncio.run(call())


def get(site: Site, path: str) -> Any:
    async def call() -> Any:
        async with site.client("ann") as client:
            return await client.get(path)

    return asyncio.run(call())


def count(engine: Engine, table: Any) -> int:
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table)).scalar_one()


async def until(holds: Callable[[], Any]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110  it is the database that is asked
            await asyncio.sleep(0.05)


def cut_once(monkeypatch: pytest.MonkeyPatch, server: Server) -> list[int]:
    """The server ends the session of the next transaction that stores predictions, in its midst."""
    real, cut = predictions.insert_new, []

    def insert_and_lose(connection: Any, rows: Any) -> int:
        stored = real(connection, rows)
        if not cut:
            cut.append(connection.exec_driver_sql("SELECT pg_backend_pid()").scalar())
            server.execute(f"SELECT pg_terminate_backend({cut[0]}, 5000)")
        return stored

    monkeypatch.setattr(predictions, "insert_new", insert_and_lose)
    return cut


def test_a_server_that_is_away_is_503_and_what_was_acknowledged_is_there_once(site: Site, postgres: Server) -> None:
    assert post(site, 1).status_code == 202
    with away(postgres):
        refused = post(site, 2)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert "stored once" in refused.json()["error"]["remedy"]
        assert [get(site, path).status_code for path in ("/readyz", "/v1/reviews/next", "/healthz", "/metrics")] == [503, 503, 200, 200]
        assert "ratchet_database_up 0.0" in get(site, "/metrics").text
    assert [post(site, number).status_code for number in (1, 2, 3)] == [202] * 3, "old connections are noticed before they are used"
    assert get(site, "/readyz").status_code == 200
    assert count(site.engine, Event) == count(site.engine, Prediction) == count(site.engine, Review) == 3


def test_a_connection_lost_in_the_midst_is_tried_once_more_unseen(site: Site, postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = cut_once(monkeypatch, postgres)
    answer = post(site, 1, 2)
    assert answer.status_code == 202
    assert [one["outcome"] for one in answer.json()["results"]] == ["stored", "stored"]
    assert len(cut) == 1
    assert count(site.engine, Event) == count(site.engine, Review) == 2
    assert count(site.engine, DeadLetter) == 0, "it was no event's fault"


def test_a_commit_whose_answer_was_lost_is_not_applied_twice(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    dialect, lost = site.engine.dialect, []
    real = dialect.do_commit

    def commit_and_lose(connection: Any) -> None:
        real(connection)
        if not lost:
            lost.append(1)
            connection.dbapi_connection.close()
            raise psycopg.OperationalError("server closed the connection unexpectedly")

    post(site, 1)  # from here on the token is known without a transaction
    monkeypatch.setattr(dialect, "do_commit", commit_and_lose)
    site.clock.now += timedelta(seconds=1)
    assert post(site, 2).status_code == 202
    assert lost
    assert count(site.engine, Event) == count(site.engine, Prediction) == count(site.engine, Review) == 2


def test_a_server_without_a_connection_for_us_is_503_until_there_is_one(
    engine: Engine, now: datetime, tmp_path: Any, postgres: Server
) -> None:
    name = engine.url.database or ""
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        postgres.execute("CREATE ROLE narrow LOGIN")
    postgres.execute("ALTER ROLE narrow CONNECTION LIMIT 1")  # another test's may be there, with another limit
    postgres.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO narrow; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO narrow", name)
    url = postgres.url(name).replace("ratchet@", "narrow@")
    narrow = db.open_engine(url)
    site = Site(narrow, Clock(now), tmp_path)
    narrow.dispose()
    with psycopg.connect(url):
        assert post(site, 1).status_code == 503
    assert post(site, 1).status_code == 202
    site.app.state.site.intake.close()
    narrow.dispose()


def test_who_holds_up_all_writers_is_waited_for_and_then_told(engine: Engine, now: datetime, tmp_path: Any, postgres: Server) -> None:
    impatient = db.open_engine(postgres.url(engine.url.database or "") + "&options=-c%20lock_timeout=200ms")
    site = Site(impatient, Clock(now), tmp_path, embedded.Counters())
    with db.writing(engine):
        assert post(site, 1).status_code == 503
    assert post(site, 1).status_code == 202
    site.app.state.site.intake.close()
    impatient.dispose()


def test_a_batch_that_was_cut_off_is_handled_once(engine: Engine, now: datetime, postgres: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    send(engine, [make_prediction(number, now, confidence=0.5) for number in range(5)], now)
    cut_once(monkeypatch, postgres)
    agents = {"adjudication": make_agent()}
    with pytest.raises(OperationalError) as raised:
        embedded.handle_next(engine, agents, now)
    assert db.is_passing(raised.value)
    assert count(engine, Prediction) == 0
    assert embedded.handle_next(engine, agents, now) == {"handled": 5}
    assert count(engine, Review) == 5
    assert count(engine, DeadLetter) == 0


def test_the_consumer_outlasts_the_server(engine: Engine, now: datetime, postgres: Server) -> None:
    agents, counters = {"adjudication": make_agent()}, embedded.Counters()

    async def work() -> None:
        stop, wake = asyncio.Event(), asyncio.Event()
        consuming = asyncio.create_task(embedded.run(engine, agents, lambda: now, stop, wake, counters))
        with away(postgres):
            await asyncio.sleep(0.5)
            assert not consuming.done()
        send(engine, [make_prediction(1, now)], now)
        await until(lambda: counters.by_state)
        stop.set()
        await consuming

    asyncio.run(work())
    assert counters.by_state == {"handled": 1}


def test_the_scheduler_outlasts_the_server_and_leads_again(engine: Engine, tmp_path: Any, postgres: Server) -> None:
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), datetime.now(UTC))

    def leader() -> str | None:
        with db.reading(engine) as connection:
            return leases.holder_of(connection, scheduler.LEASE, datetime.now(UTC))

    async def work() -> None:
        stop = asyncio.Event()
        scheduling = asyncio.create_task(scheduler.run(world.pipeline, lambda: datetime.now(UTC), stop))
        await until(leader)
        with away(postgres):
            await asyncio.sleep(1.5)
            assert not scheduling.done()
        world.import_history(40)
        world.ask_for_run()
        await until(lambda: world.launcher.started)
        stop.set()
        await scheduling

    asyncio.run(work())
    assert leader() is None, "it gave the lease back at its end"


def test_a_process_that_stood_still_within_a_transaction_holds_up_nobody_for_ever(engine: Engine) -> None:
    with engine.connect() as connection:
        limits = [connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("lock_timeout", "idle_in_transaction_session_timeout")]
    assert limits == ["30s", "1min"]


@pytest.mark.databases("sqlite")
def test_of_sqlite_s_failures_a_lock_and_a_full_disk_pass_and_a_missing_table_does_not(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "BUSY_SECONDS", 0.05)
    found = []
    with engine.connect() as connection, pytest.raises(OperationalError) as missing:
        connection.exec_driver_sql("SELECT * FROM nowhere")
    found.append(db.is_passing(missing.value))
    with (
        db.writing(engine),
        engine.connect().execution_options(writes=True) as other,
        pytest.raises(OperationalError) as locked,
        other.begin(),
    ):
        pass
    found.append(db.is_passing(locked.value))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")
        with pytest.raises(OperationalError) as full:
            connection.exec_driver_sql("CREATE TABLE more AS SELECT zeroblob(9000000) AS a")
    found.append(db.is_passing(full.value))
    assert found == [False, True, True]
