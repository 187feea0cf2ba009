"""Several `ratchet up` share one PostgreSQL database, each with its role, as on several machines; one loop takes its events from Kafka."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import Engine, func, select

from consumers import counterpart
from storage import datasets, db, labels, ledger, registry
from storage.tables import DeadLetter, Event, Label, Prediction, Review
from tests import broker_fixtures, fault_fixtures, model_fixtures
from tests.daemon_fixtures import Daemon, find_trainers, make_home
from tests.event_fixtures import make_history, make_label, make_prediction, send
from tests.postgres_fixtures import Server

pytestmark = [pytest.mark.databases("postgresql"), pytest.mark.timeout(240)]
AGENT = "adjudication"


class Cluster:
    """Daemons with one home and one database, by name; a name that ends in a number is a further one of its role."""

    def __init__(self, home: Path, engine: Engine) -> None:
        self.home, self.engine = home, engine
        url = engine.url.render_as_string(hide_password=False)
        self.secrets = make_home(home, url)
        self.settings = {"DATABASE__URL": url, "AGENTS__ADJUDICATION__TRIGGERS__NEW_LABELS": "1000000"}
        self.daemons: dict[str, Daemon] = {}

    def start(self, *names: str) -> None:
        """Start daemons side by side, and wait until all answer."""
        for name in names:
            self.daemons[name] = Daemon(self.home, f"{name}.log", **self.settings).begin("--role", name.rstrip("0123456789"))
        for name in names:
            self.daemons[name].wait_for(lambda name=name: self.daemons[name].ops_url)

    def client(self, daemon: str, token: str) -> httpx.Client:
        """A client of one of the web processes."""
        headers = {"Authorization": f"Bearer {self.secrets[token]}"}
        return httpx.Client(base_url=str(self.daemons[daemon].url), headers=headers, trust_env=False, timeout=60)

    def wait_for(self, name: str, holds: Callable[[], Any], seconds: float = 90) -> Any:
        """Wait until something holds, while that daemon lives."""
        return self.daemons[name].wait_for(holds, seconds)

    def count(self, table: Any, *where: Any) -> int:
        """How many rows there are."""
        with db.reading(self.engine) as connection:
            return connection.execute(select(func.count()).select_from(table).where(*where)).scalar_one()


@pytest.fixture
def cluster(engine: Engine, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "claims", engine)
    yield cluster
    for daemon in cluster.daemons.values():
        with contextlib.suppress(AssertionError):
            daemon.kill()
    for number in find_trainers(cluster.home):
        os.killpg(number, signal.SIGKILL)


def champion(engine: Engine) -> str | None:
    with db.reading(engine) as connection:
        return registry.champion(connection, AGENT)


def test_the_loop_turns_over_kafka_and_processes_that_share_a_database_and_nothing_else(
    cluster: Cluster, broker: broker_fixtures.Broker, engine: Engine
) -> None:
    """From predictions on the stream to a verdict that is told there; what comes by HTTP is handled in between."""
    now = datetime.now(UTC)
    base = model_fixtures.tiny_base(cluster.home / "base")
    kafka = broker_fixtures.make_topics(broker, "cluster")
    cluster.settings |= {
        "AGENTS__ADJUDICATION__BASE_MODEL": str(base),
        "AGENTS__ADJUDICATION__PUBLISHER__KIND": "none",
        "AGENTS__ADJUDICATION__TRIGGERS__NEW_LABELS": "3",
        "AGENTS__ADJUDICATION__TRAINING__EPOCHS": "1",
        **fault_fixtures.to_settings(kafka, "faust"),
    }
    send(engine, [make_history(number, now) for number in range(40)], now)
    cluster.start("web1", "web2", "consume", "schedule")
    streamed, posted = ([make_prediction(number, now, confidence=0.1) for number in some] for some in ((0, 1), (2,)))
    broker_fixtures.produce(broker, kafka.topics.predictions, map(orjson.dumps, streamed))
    with cluster.client("web1", "node") as node:
        assert [node.post("/v1/predictions", json=one).status_code for one in posted] == [202]
    cluster.wait_for("consume", lambda: cluster.count(Event, Event.state == "handled") == 43)
    opened = [orjson.loads(one.value)["data"] for one in broker_fixtures.consume(broker, kafka.topics.queue, 3)]
    assert {one["claim_id"]: one["input"] for one in opened} == {one["data"]["claim_id"]: one["data"]["input"] for one in streamed + posted}
    with cluster.client("web2", "ann") as ann:
        case = ann.get("/v1/reviews/next").json()
        assert ann.post(f"/v1/reviews/{case['id']}/answer", json={"answer": "DENIED"}).status_code == 202
    others = [one for one in opened if one["review"] != case["id"]]
    answers = [make_label(int(one["claim_id"][1:]), now, review_id=one["review"], expert="ann", kind="review") for one in others]
    broker_fixtures.produce(broker, kafka.topics.labels, map(orjson.dumps, answers))
    cluster.wait_for("schedule", lambda: champion(engine) == "v1.0", seconds=200)
    told: dict[tuple[str, str], Any] = {}
    with counterpart.listening(kafka.to_access(), kafka.topics.events) as listener:

        def is_told() -> bool:
            told.update(((one["type"], one["data"].get("version")), one["data"]) for one in listener.hear(1))
            return told.keys() >= {("ratchet.version.judged.v1", "v1.0"), ("ratchet.champion.promoted.v1", "v1.0")}

        cluster.wait_for("schedule", is_told)
    assert told["ratchet.version.judged.v1", "v1.0"]["verdict"] == "promote"
    assert broker_fixtures.read_lag(kafka, kafka.topics.predictions) == broker_fixtures.read_lag(kafka, kafka.topics.labels) == 0
    with db.reading(engine) as connection:
        version = registry.read(connection, AGENT, "v1.0")
        cut = datasets.read(connection, AGENT, version["dataset"])
        assert (cut["rows"], labels.count_fresh(connection, AGENT)) == (43, 0)
        assert version["verdict"] == "promote"
        assert ledger.verify(connection) == []
    cluster.start("schedule2")
    assert "leading_began" not in cluster.daemons["schedule2"].events(), "one leads already"
    cluster.daemons["schedule"].kill()
    cluster.wait_for("schedule2", lambda: "leading_began" in cluster.daemons["schedule2"].events(), seconds=30)
    assert [cluster.daemons[name].stop() for name in ("web1", "web2", "consume", "schedule2")] == [0] * 4


def test_a_server_that_crashes_under_load_costs_no_acknowledged_event_and_no_process(
    cluster: Cluster, postgres: Server, engine: Engine
) -> None:
    cluster.start("web1", "web2", "consume1", "consume2")
    now, acknowledged, refused = datetime.now(UTC), set[str](), set[int]()
    crashed, over = threading.Event(), threading.Event()

    def produce(name: str, first: int) -> None:
        """Send each event until it is acknowledged, and every one of them to the other process as well."""
        with cluster.client(name, "node") as client:
            for number in range(first, 10_000_000):
                if over.is_set():
                    return
                event = make_prediction(number % 1_000_000, now, confidence=0.5)
                while (answer := client.post("/v1/predictions", json=event)).status_code != 202:
                    refused.add(answer.status_code)
                    crashed.wait(0.1)
                acknowledged.add(event["id"])

    senders = [threading.Thread(target=produce, args=one) for one in (("web1", 0), ("web2", 0))]
    for sender in senders:
        sender.start()
    cluster.wait_for("web1", lambda: len(acknowledged) > 20)
    postgres.call("kill")
    cluster.wait_for("web1", lambda: refused)
    postgres.start()
    after = len(acknowledged) + 20
    cluster.wait_for("web1", lambda: len(acknowledged) > after)
    over.set()
    for sender in senders:
        sender.join()
    cluster.wait_for("consume1", lambda: cluster.count(Event, Event.state == "received") == 0)
    assert refused == {503}
    with db.reading(engine) as connection:
        stored = set(connection.execute(select(Event.event_id)).scalars())
    assert stored >= acknowledged
    assert cluster.count(Event) == cluster.count(Prediction) == cluster.count(Review) == len(stored)
    assert cluster.count(DeadLetter) == cluster.count(Label) == 0
    assert [cluster.daemons[name].stop() for name in cluster.daemons] == [0] * 4, "nobody had to be started anew"
