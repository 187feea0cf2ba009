"""A loop that really runs, what harms it, and what is counted afterwards.

`ratchet up` and its trainers are real processes. A producer and two experts talk to them over HTTP and send again whatever was not
answered. Meanwhile daemon and trainers are killed at moments that a seed decides.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from storage import artifacts, db, ledger, registry, snapshots
from tests import model_fixtures
from tests.daemon_fixtures import Daemon, find_trainers, is_trainer, make_home
from tests.event_fixtures import envelope, make_history, make_label, make_prediction, send

AGENT = "adjudication"
SETTINGS = {
    # A kill every few seconds, as often as a trainer starts, is no sign of a run that can't be done.
    "TRAINING__ATTEMPTS": "6",
    "TRAINING__BACKOFF_SECONDS": "0.5",
    "AGENTS__ADJUDICATION__BUDGET__SHARE": "0.4",
    "AGENTS__ADJUDICATION__TRIGGERS__NEW_LABELS": "10",
    "AGENTS__ADJUDICATION__TRAINING__EPOCHS": "1",
    "AGENTS__ADJUDICATION__TRAINING__BATCH_ROWS": "8",
    "AGENTS__ADJUDICATION__TRAINING__CHECKPOINT_STEPS": "1",
    "AGENTS__ADJUDICATION__TRAINING__LEARNING_RATE": "0.01",
    "AGENTS__ADJUDICATION__TRAINING__REPLAY_ROWS": "50",
    "AGENTS__ADJUDICATION__EXAM__CLAIMS": "60",
    "AGENTS__ADJUDICATION__EXAM__MAX_ASKED": "20",
}
HISTORY = 60
PRODUCER_PAUSE, EXPERT_PAUSE, RETRY_PAUSE = 0.4, 0.2, 0.1
LATE = 0.5
"""The share of the kills of a trainer that come after its first checkpoint."""
RUN_SECONDS = 6.0
"""About as long as a run takes, until one was seen."""
REST_SECONDS = 300
REST_PAUSE, REST_LOOKS, LOOK_PAUSE = 0.5, 8, 0.05
UNDER_WAY = "runs WHERE state IN ('queued', 'leased', 'running')"
FAULTS = ("role_died", "role_did_not_stop", "stage_failed", "request_failed")


@dataclass
class Loop:
    """A running loop in `home`, those who use it, and what they were told."""

    home: Path
    seed: int
    acknowledged: dict[str, str] = field(default_factory=dict)
    """The ulid that each event was acknowledged with."""
    changed: int = 0
    """Events that were acknowledged with one ulid and, sent again, with another."""
    deaths: int = 0
    """How often the daemon ended by itself."""
    kills: Counter[str] = field(default_factory=Counter)
    until_checkpoint: float = RUN_SECONDS / 2
    """How long the latest attempt that was looked at took to its first checkpoint."""

    def __post_init__(self) -> None:
        self.secrets = make_home(self.home)
        base = model_fixtures.tiny_base(self.home / "base")
        (self.home / "prompts" / "adjudication.j2").write_text(model_fixtures.PROMPT)
        self.daemon = Daemon(self.home, AGENTS__ADJUDICATION__BASE_MODEL=str(base), **SETTINGS)
        # Half of them would never write what they measured.
        self.daemon.environment = {name: value for name, value in self.daemon.environment.items() if not name.startswith("COVERAGE_")}
        self.fate = random.Random(self.seed)
        self.is_closed, self.is_over = threading.Event(), threading.Event()
        self.import_history()

    def import_history(self) -> None:
        now = datetime.now(UTC)
        engine = db.open_engine(f"sqlite:///{self.home}/ratchet.db")
        cases = [make_history(number, now, input=model_fixtures.claim(number)) for number in range(HISTORY)]
        for case, told in zip(cases, send(engine, cases, now), strict=True):
            self.note(case, told.ulid)
        engine.dispose()

    def note(self, event: Any, ulid: str | None) -> None:
        """Keep what an event was acknowledged with."""
        assert ulid is not None
        self.changed += self.acknowledged.setdefault(f"{event['source']} {event['id']}", ulid) != ulid

    def run(self, kills: int, tell: Callable[[str], None] = lambda _: None) -> None:
        """Let it run, do so much harm, let it come to rest, and end it as a service manager does."""
        self.daemon.start()
        self.daemon.call("train", "--reason", "the first version")
        with ThreadPoolExecutor(3) as pool:
            users = [pool.submit(self.produce), pool.submit(self.give_answers, "ann"), pool.submit(self.send_labels, "ben")]
            try:
                for victim in self.choose_victims(kills):
                    self.do_harm(victim, users)
                    tell(victim)
                goal = self.count("runs WHERE state = 'done' AND kind = 'train'") + 1
                self.daemon.wait_for(lambda: self.count("runs WHERE state = 'done' AND kind = 'train'") >= goal, REST_SECONDS)
                self.is_closed.set()
                users[0].result(REST_SECONDS)
                self.is_over.set()
                for user in users:
                    user.result(REST_SECONDS)
                self.come_to_rest()
            finally:
                self.is_closed.set()
                self.is_over.set()
        self.deaths += self.daemon.stop() != 0

    def close(self) -> None:
        """Leave no process behind."""
        self.daemon.kill()
        for group in find_trainers(self.home):
            os.killpg(group, signal.SIGKILL)

    def produce(self) -> None:
        """Send predictions, some twice, some after what was decided about them."""
        chance = random.Random(self.seed + 1)
        with self.connect("node") as client:
            number = 0
            while not self.is_closed.wait(PRODUCER_PAUSE):
                now = datetime.now(UTC)
                batch = [self.predict(chance, number + one, now) for one in range(chance.randint(1, 5))]
                number += len(batch)
                if chance.random() < 0.2:
                    label = make_label(number - 1, now, kind="late_truth", answer=chance.choice(("APPROVED", "DENIED")))
                    self.deliver(client, "/v1/labels", [label])
                for _ in range(1 + (chance.random() < 0.2)):
                    self.deliver(client, "/v1/predictions", batch)

    def predict(self, chance: random.Random, number: int, now: datetime) -> Any:
        answer, confidence = chance.choice(("APPROVED", "DENIED")), round(chance.uniform(0.5, 1), 3)
        return make_prediction(number, now, input=model_fixtures.claim(number), decision=answer, confidence=confidence)

    def deliver(self, client: httpx.Client, path: str, events: list[Any]) -> None:
        """Post events until they are acknowledged."""
        response = self.insist(client, "POST", path, json=events, headers={"Content-Type": "application/cloudevents-batch+json"})
        assert response.status_code == 202, response.text
        for event, told in zip(events, response.json()["results"], strict=True):
            self.note(event, told["ulid"])

    def give_answers(self, name: str) -> None:
        """Answer reviews by the API made for it."""
        with self.connect(name) as client:
            while (case := self.take_case(client)) is not None:
                response = self.insist(client, "POST", f"/v1/reviews/{case['id']}/answer", json={"answer": know(case)})
                if response.status_code != 409:  # its exam ended meanwhile, and the question with it
                    assert response.status_code == 202, response.text
                    self.note({"source": "api", "id": f"{case['id']}/{name}/1"}, response.json()["ulid"])

    def send_labels(self, name: str) -> None:
        """Answer reviews by events, as a foreign review page does."""
        with self.connect(name) as client:
            while (case := self.take_case(client)) is not None:
                data = {"agent": AGENT, "review_id": case["id"], "answer": know(case), "answered_at": datetime.now(UTC).isoformat()}
                self.deliver(client, "/v1/labels", [envelope("ratchet.label.submitted.v1", case["id"], data, "foreign-page")])

    def take_case(self, client: httpx.Client) -> Any:
        """The next case; None when it is over."""
        while not self.is_over.wait(EXPERT_PAUSE):
            response = self.insist(client, "GET", "/v1/reviews/next")
            assert response.status_code in (200, 204), response.text
            if response.status_code == 200:
                return response.json()
        return None

    @contextlib.contextmanager
    def connect(self, name: str) -> Iterator[httpx.Client]:
        with httpx.Client(trust_env=False, timeout=30, headers={"Authorization": f"Bearer {self.secrets[name]}"}) as client:
            yield client

    def insist(self, client: httpx.Client, method: str, path: str, **body: Any) -> httpx.Response:
        """Send a request again and again until it is answered."""
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if (url := self.daemon.url) is not None:
                    response = client.request(method, f"{url}{path}", **body)
                    if response.status_code != 503:
                        return response
            time.sleep(RETRY_PAUSE)
        raise TimeoutError(f"{method} {path} was not answered within {REST_SECONDS} s")

    def choose_victims(self, kills: int) -> list[str]:
        """As many daemons as trainers, in an order that nobody chose."""
        victims = [("daemon", "trainer")[number % 2] for number in range(kills)]
        self.fate.shuffle(victims)
        return victims

    def do_harm(self, victim: str, users: list[Future[None]]) -> None:
        """Kill the daemon or a trainer at a moment that nobody chose."""
        self.sleep(self.fate.uniform(0, self.measure_run()), users)
        if victim == "trainer":
            self.kill_trainer(users)
        else:
            self.daemon.kill()
            self.daemon.begin()
        self.kills[victim] += 1

    def measure_run(self) -> float:
        """Seconds that the latest undisturbed runs took: kills are to fall into all parts of a run, on a slow machine too."""
        took = "SELECT (finished_at - started_at) / 1e6 FROM runs WHERE state = 'done' AND attempt = 1"
        with contextlib.closing(sqlite3.connect(self.home / "ratchet.db", timeout=30)) as connection:
            latest = [row[0] for row in connection.execute(f"{took} ORDER BY id DESC LIMIT 5")]
        return sum(latest) / len(latest) if latest else RUN_SECONDS

    def measure_rest(self) -> float:
        """Seconds from the first checkpoint to the end of a run; half of those before it, while no run was undisturbed."""
        return max(self.measure_run() - self.until_checkpoint, self.until_checkpoint / 2)

    def kill_trainer(self, users: list[Future[None]]) -> None:
        """Kill a trainer, as often before the first checkpoint of its attempt as after it.

        A run is parked when it brings no newer checkpoint again and again. How long the first one takes, the machine decides; that a run
        can be done at all must not depend on it.
        """
        is_late, share = self.fate.random() < LATE, self.fate.random()
        deadline = time.monotonic() + REST_SECONDS
        while time.monotonic() < deadline:
            for group, attempt in find_trainers(self.home).items():
                if is_late:
                    self.await_checkpoint(group, attempt, users)
                self.sleep(share * (self.measure_rest() if is_late else self.until_checkpoint), users)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
                    return
                share /= 2
            self.sleep(LOOK_PAUSE, users)
        raise TimeoutError(f"no trainer was seen within {REST_SECONDS} s")

    def await_checkpoint(self, group: int, attempt: Path, users: list[Future[None]]) -> None:
        """Wait until the attempt has a checkpoint, or has ended."""
        while is_trainer(group):
            with contextlib.suppress(OSError):  # the daemon takes the folder away when the run is done
                if made := [path.stat().st_mtime for path in (attempt / "checkpoints").glob("step-*")]:
                    self.until_checkpoint = max(min(made) - (attempt / "attempt.json").stat().st_mtime, 0)
                    return
            self.sleep(LOOK_PAUSE, users)

    def sleep(self, seconds: float, users: list[Future[None]]) -> None:
        """Wait, and see that daemon and users are still at it."""
        time.sleep(seconds)
        for user in users:
            if user.done():
                user.result()
        if self.daemon.process.poll() is not None:
            self.deaths += 1
            self.daemon.begin()

    def come_to_rest(self) -> None:
        """Wait until for some ticks nothing is left to handle and no run is under way."""
        calm = 0
        while calm < REST_LOOKS:
            self.daemon.wait_for(lambda: not self.count("events WHERE state = 'received'") and not self.count(UNDER_WAY), REST_SECONDS)
            time.sleep(REST_PAUSE)
            calm = 0 if self.count(UNDER_WAY) else calm + 1

    def count(self, what: str) -> int:
        """How many rows there are of what is told as a table and a condition."""
        with contextlib.closing(sqlite3.connect(self.home / "ratchet.db", timeout=30)) as connection:
            return int(connection.execute(f"SELECT count(*) FROM {what}").fetchone()[0])


def know(case: Any) -> str:
    """The truth of the tests: one treatment is denied."""
    return "DENIED" if case["input"]["treatment"] == model_fixtures.TREATMENTS[0] else "APPROVED"


@dataclass(frozen=True)
class Tally:
    """What is left of a loop: every count but the first three should be 0."""

    acknowledged: int
    runs: dict[str, int]
    versions: int
    lost: int
    twice: int
    champions_astray: int
    ledger_breaks: int
    damaged: int
    parked_without_reason: int
    faults: int

    @property
    def finished(self) -> float:
        """The share of the runs that are done, of those that were still wanted when they began: the others the loop cancels itself."""
        return self.runs.get("done", 0) / (sum(self.runs.values()) - self.runs.get("cancelled", 0))

    @property
    def unfinished(self) -> int:
        """Runs that are neither done nor parked, and are wanted still."""
        return sum(self.runs.values()) - sum(self.runs.get(state, 0) for state in ("done", "parked", "cancelled"))


APPLIED_TWICE = (
    "SELECT count(*) FROM (SELECT 1 FROM events GROUP BY source, event_id HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM predictions GROUP BY agent, prediction_id HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM labels WHERE review IS NOT NULL GROUP BY review, expert HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM reviews WHERE exam IS NULL GROUP BY prediction HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM review_steps WHERE action IN ('opened', 'answered') GROUP BY review, action HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM ledger WHERE kind = 'label' GROUP BY body ->> 'label' HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM versions WHERE run IS NOT NULL GROUP BY run HAVING count(*) > 1)",
    "SELECT count(*) FROM (SELECT 1 FROM exams GROUP BY kind, candidate, champion HAVING count(*) > 1)",
)
"""Each counts a thing that happened twice and should have happened once."""


def count(loop: Loop) -> Tally:
    """Look at everything that is left, the database mostly by plain SQL."""
    engine = db.open_engine(f"sqlite:///{loop.home}/ratchet.db")
    with db.reading(engine) as connection:
        breaks = ledger.verify(connection)
        versions = [dict(row) for row in registry.list_all(connection, AGENT)]
        history = registry.history(connection, AGENT)
    engine.dispose()
    with contextlib.closing(sqlite3.connect(loop.home / "ratchet.db")) as database:

        def fetch(query: str) -> list[Any]:
            return list(database.execute(query))

        done = {row[0] for row in fetch("SELECT ulid FROM events WHERE state = 'handled'")}
        applied = {row[0] for row in fetch("SELECT id FROM predictions UNION SELECT id FROM labels")}
        aliases = [row[0] for row in fetch("SELECT version FROM aliases WHERE alias = 'champion'")]
        folders = [Path(row[0]) for row in fetch("SELECT folder FROM dataset_versions")]
        served = json.loads((loop.home / "serving" / AGENT / "current.json").read_text())["version"]
        return Tally(
            acknowledged=len(loop.acknowledged),
            runs=dict(fetch("SELECT state, count(*) FROM runs GROUP BY state")),
            versions=len(versions),
            lost=len(set(loop.acknowledged.values()) - (done & applied)),
            twice=loop.changed + sum(fetch(query)[0][0] for query in APPLIED_TWICE),
            champions_astray=len({*aliases, history[-1]["version"], served}) - 1 + len(aliases) - 1,
            ledger_breaks=len(breaks),
            damaged=count_damaged(versions, folders)
            + (fetch("PRAGMA integrity_check") != [("ok",)])
            + len(fetch("PRAGMA foreign_key_check")),
            parked_without_reason=fetch("SELECT count(*) FROM runs WHERE state = 'parked' AND coalesce(error, '') = ''")[0][0],
            faults=loop.deaths + len(find_faults(loop)),
        )


def count_damaged(versions: list[dict[str, Any]], folders: list[Path]) -> int:
    """How many adapters and dataset versions are not what their digests say."""
    damaged = sum(bool(snapshots.verify(folder)) for folder in folders)
    for version in versions:
        if version["adapter_path"] is not None:
            damaged += artifacts.digest_folder(Path(version["adapter_path"])) != version["adapter_digest"]
    return damaged


def find_faults(loop: Loop) -> list[str]:
    """What the daemon's log tells of things that went wrong in it, over all its lives."""
    lines = (line for line in loop.daemon.log.read_text().splitlines() if line.startswith("{") and line.endswith("}"))
    return [line for line in lines if json.loads(line)["event"] in FAULTS]
