"""Several processes write to one PostgreSQL database at once: nothing is applied twice, nothing is lost, each decision is taken once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest
from sqlalchemy import Engine, func, select

from consumers import delivery, embedded, handlers, schemas
from daemon import devices, holders
from storage import db, events, leases, ledger, registry, reviews, runs, schema
from storage.tables import DeadLetter, Event, Label, LedgerEntry, Prediction, Review
from tests.event_fixtures import ANN, LABELS, PRODUCER, handle, make_agent, make_label, make_prediction, send
from tests.version_fixtures import register

pytestmark = pytest.mark.databases("postgresql")
TERM = timedelta(minutes=15)
APPEND = """
import sys
from datetime import UTC, datetime
from storage import db, ledger
engine = db.open_engine(sys.argv[1])
for number in range(25):
    with db.writing(engine, alone=sys.argv[2] == "alone") as connection:
        ledger.append(connection, "label", "adjudication", {"by": sys.argv[3], "number": number}, datetime.now(UTC))
"""
CONSUME = """
import sys
from datetime import UTC, datetime
from consumers import embedded
from storage import db
from tests.event_fixtures import make_agent
engine = db.open_engine(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
handled = 0
while outcome := embedded.handle_next(engine, {"adjudication": make_agent()}, datetime.now(UTC), limit=20):
    handled += outcome.total()
print(handled)
"""


@pytest.fixture
def url(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Do all of these at the same moment; returns what each returned or raised."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def perform(place: int, work: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results[place] = work()
        except Exception as error:  # noqa: BLE001  it is what the test looks at
            results[place] = error

    threads = [threading.Thread(target=perform, args=one) for one in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def count(engine: Engine, table: Any, *where: Any) -> int:
    with db.reading(engine) as connection:
        return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


def begin(program: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", ["alone", "beside others"])
def test_the_ledger_that_several_processes_write_is_one_chain(engine: Engine, url: str, how: str) -> None:
    writers = [begin(APPEND, url, how, str(number)) for number in range(3)]
    assert [writer.communicate(timeout=200)[0] for writer in writers] == [""] * 3
    assert [writer.returncode for writer in writers] == [0] * 3
    with db.reading(engine) as connection:
        assert ledger.verify(connection) == []
        assert ledger.head(connection)[0] == 75
        bodies = [orjson.loads(row.body) for row in connection.execute(select(LedgerEntry.body).order_by(LedgerEntry.seq))]
    assert [one["number"] for one in bodies if one["by"] == "1"] == list(range(25)), "each writer's own order is kept"


def test_consumers_of_one_table_handle_each_event_once(engine: Engine, url: str, now: datetime) -> None:
    send(engine, [make_prediction(number, now, confidence=0.5) for number in range(300)], now)
    workers = [begin(CONSUME, url) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    told = [int(worker.communicate("go\n", timeout=200)[0]) for worker in workers]
    assert sum(told) == 300
    assert count(engine, Prediction) == count(engine, Review) == count(engine, Event, Event.state == "handled") == 300
    assert count(engine, DeadLetter) == 0


def test_the_same_events_from_two_senders_at_once_are_stored_and_handled_once(engine: Engine, now: datetime) -> None:
    sent = [make_prediction(number, now, confidence=0.5) for number in range(200)]
    agents = {"adjudication": make_agent()}

    def take(order: list[Any], at: datetime) -> Callable[[], Counter[str]]:
        def work() -> Counter[str]:
            with db.writing(engine, alone=False) as connection:
                items = schemas.parse(orjson.dumps(order), schemas.PREDICTION)
                told, new = delivery.deliver_as(connection, items, {"adjudication": LABELS}, PRODUCER, at, "handled")
                assert all(one.ulid for one in told)
                return handlers.handle_new(connection, new, agents, at)

        return work

    handled = at_once(*(take(sent[::way], now + timedelta(seconds=seconds)) for seconds, way in enumerate((1, -1, 1))))
    assert sum((one["handled"] for one in handled), 0) == 200
    assert count(engine, Event) == count(engine, Prediction) == count(engine, Review) == 200


def test_a_prediction_id_that_two_events_use_at_once_is_stored_once_and_the_other_is_settled(engine: Engine, now: datetime) -> None:
    for number in range(10):
        first, other = make_prediction(number, now), make_prediction(number, now, decision="DENIED")
        other["id"] = f"other {number}"
        send(engine, [first], now)
        send(engine, [other], now)
    agents = {"adjudication": make_agent()}
    at_once(*[lambda: embedded.handle_next(engine, agents, now, limit=10)] * 2)
    while embedded.handle_next(engine, agents, now):
        pass
    assert count(engine, Prediction) == 10
    assert count(engine, DeadLetter) == 10, "the same id for another prediction is a conflict, whoever handles it"


def test_a_label_and_its_prediction_that_come_at_once_find_each_other(engine: Engine, now: datetime) -> None:
    agents = {"adjudication": make_agent()}

    def deliver(event: dict[str, Any], principal: Any) -> Callable[[], Any]:
        def work() -> None:
            with db.writing(engine, alone=False) as connection:
                items = schemas.parse(orjson.dumps([event]), event["type"])
                _, new = delivery.deliver_as(connection, items, {"adjudication": LABELS}, principal, now, "handled")
                handlers.handle_new(connection, new, agents, now)

        return work

    for number in range(15):
        results = at_once(deliver(make_prediction(number, now), PRODUCER), deliver(make_label(number, now), ANN))
        assert results == [None, None]
    assert count(engine, Label) == 15
    assert count(engine, Event, Event.state == "waiting") == 0


def test_experts_who_ask_at_once_get_different_cases(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(number, now, confidence=0.1) for number in range(6)], now)
    handle(engine, make_agent(), now)

    def ask(expert: str) -> Callable[[], Any]:
        def work() -> Any:
            with db.writing(engine) as connection:
                row = reviews.lease_next(connection, ["adjudication"], expert, now, TERM)
                return row and row["claim_id"]

        return work

    assert sorted(at_once(*(ask(f"expert-{number}") for number in range(6)))) == [f"c{number}" for number in range(6)]
    assert len(set(at_once(*[ask("expert-1")] * 3))) == 1, "who has a case gets it again"


def test_a_case_that_is_being_given_out_is_passed_over_by_who_does_not_wait(engine: Engine, now: datetime) -> None:
    send(engine, [make_prediction(number, now, confidence=0.1 + number / 10) for number in range(2)], now)
    handle(engine, make_agent(audit_share=1e-9), now)
    with db.writing(engine, alone=False) as first, db.writing(engine, alone=False) as second:
        given = [reviews.lease_next(one, ["adjudication"], expert, now, TERM) for one, expert in ((first, "ann"), (second, "ben"))]
    assert [row and row["claim_id"] for row in given] == ["c0", "c1"]


def test_of_many_who_want_a_lease_at_once_one_gets_it(engine: Engine, now: datetime) -> None:
    def take(name: str) -> Callable[[], int | None]:
        def work() -> int | None:
            with db.writing(engine, alone=False) as connection:
                return leases.acquire(connection, "scheduler", name, now, TERM)

        return work

    assert sorted(at_once(*(take(f"p{number}") for number in range(6))), key=str) == [1, *[None] * 5]
    with db.reading(engine) as connection:
        holder = leases.holder_of(connection, "scheduler", now)
    later = now + 2 * TERM

    def take_over() -> int | None:
        with db.writing(engine, alone=False) as connection:
            return holders.acquire(connection, "scheduler", holders.make_name(), later, TERM)

    with db.writing(engine) as connection:
        leases.release(connection, "scheduler", holder or "")
    assert sorted(at_once(*[take_over] * 4), key=str) == [2, *[None] * 3]


def test_a_device_is_claimed_by_one_run_and_a_run_is_leased_once(engine: Engine, now: datetime) -> None:
    def queue() -> str:
        with db.writing(engine) as connection:
            return runs.queue(connection, "adjudication", "train", "manual", "a test", "ops", {}, now)

    queued = at_once(*[queue] * 4)
    [run] = [one for one in queued if isinstance(one, str)]
    assert sum(isinstance(one, runs.RunUnderWayError) for one in queued) == 3

    places = [devices.Device(name, None) for name in ("cpu", "cuda:0")]

    def start() -> bool:
        with db.writing(engine) as connection:
            row = runs.read(connection, run)
            claim = devices.claim(connection, places, run, row["attempt"] + 1, now, TERM)
            return claim is not None and runs.lease(connection, row, claim.device, claim.fence, "folder")

    assert sorted(at_once(*[start] * 3)) == [False, False, True]


def test_of_many_who_change_the_champion_at_once_one_wins_and_the_others_are_told(engine: Engine, tmp_path: Any, now: datetime) -> None:
    with db.writing(engine) as connection:
        register(connection, tmp_path, 3, now)

    def promote(version: str) -> Callable[[], str]:
        def work() -> str:
            with db.writing(engine) as connection:
                return registry.change_champion(connection, "adjudication", version, "v0", "promote", "ops", "a test", now)

        return work

    results = at_once(*(promote(version) for version in ("v1.0", "v1.1", "v1.2")))
    assert sum(isinstance(one, registry.ChampionChangedError) for one in results) == 2
    with db.reading(engine) as connection:
        assert [change["number"] for change in registry.history(connection, "adjudication")] == [1, 2]
        assert ledger.verify(connection) == []


def test_two_who_upgrade_at_once_make_one_schema(postgres: Any) -> None:
    postgres.execute("DROP DATABASE IF EXISTS fresh WITH (FORCE)")
    postgres.execute("CREATE DATABASE fresh")
    engines = [db.open_engine(postgres.url("fresh")) for _ in range(2)]
    with pytest.raises(schema.DatabaseMissingError, match=r"no tables in .*ratchet db upgrade"):
        schema.check(engines[0])
    assert sorted(at_once(*(lambda engine=engine: schema.upgrade(engine) for engine in engines))) == [False, True]
    for engine in engines:
        schema.check(engine)
        engine.dispose()


def test_a_database_that_keeps_no_unicode_is_refused(postgres: Any) -> None:
    postgres.execute("DROP DATABASE IF EXISTS latin")
    postgres.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    engine = db.open_engine(postgres.url("latin"))
    with pytest.raises(schema.DatabaseUnfitError, match=r"encoding LATIN1: make it anew with ENCODING 'UTF8'"):
        schema.check(engine)
    engine.dispose()


def test_a_view_stays_as_it_was_and_can_not_be_written_through(engine: Engine, now: datetime) -> None:
    with db.reading(engine) as view:
        assert events.count_by_state(view)["received"] == 0
        send(engine, [make_prediction(1, now)], now)
        assert events.count_by_state(view)["received"] == 0
        with pytest.raises(db.UNAVAILABLE, match="read-only transaction"):
            leases.acquire(view, "scheduler", "a", now, TERM)


def test_a_case_that_is_predicted_twice_at_one_moment_is_asked_once(engine: Engine, now: datetime) -> None:
    """Once by HTTP and once by Kafka, say: neither sees the other's review, and the second one gives way."""
    agent = make_agent(threshold=0.99)

    def take(number: int) -> None:
        event = make_prediction(number, now, claim_id="c1", confidence=0.5)
        items = schemas.parse(orjson.dumps([event]), schemas.PREDICTION)
        _, new = delivery.deliver_as(connection_of[number], items, {"adjudication": LABELS}, PRODUCER, now, "handled")
        handlers.handle_new(connection_of[number], new, {"adjudication": agent}, now)

    connection_of: dict[int, Any] = {}
    second: list[Any] = []

    def take_second() -> None:
        with db.writing(engine, alone=False) as connection_of[2]:
            take(2)
        second.append("done")

    thread = threading.Thread(target=take_second)
    with db.writing(engine, alone=False) as connection_of[1]:
        take(1)
        thread.start()
        while not is_waiting(engine):
            assert thread.is_alive(), "it did not mind the first one"
    thread.join()
    assert second == ["done"]
    assert (count(engine, Prediction), count(engine, Review)) == (2, 1)


def is_waiting(engine: Engine) -> bool:
    """Whether a session of this database waits for a lock."""
    with db.reading(engine) as connection:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return connection.exec_driver_sql(waiting).scalar_one() > 0


def test_those_who_open_the_same_cases_in_different_orders_do_not_wait_for_each_other(engine: Engine, now: datetime) -> None:
    agent = make_agent(threshold=0.99)

    def handle_all(first: int, claims: list[int]) -> None:
        sent = [make_prediction(first + claim, now, claim_id=f"c{claim}", confidence=0.5) for claim in claims]
        items = schemas.parse(orjson.dumps(sent), schemas.PREDICTION)
        with db.writing(engine, alone=False) as connection:
            _, new = delivery.deliver_as(connection, items, {"adjudication": LABELS}, PRODUCER, now, "handled")
            handlers.handle_new(connection, new, {"adjudication": agent}, now)

    claims = list(range(200))
    assert at_once(lambda: handle_all(0, claims), lambda: handle_all(1000, claims[::-1])) == [None, None]
    assert (count(engine, Prediction), count(engine, Review)) == (400, 200)
