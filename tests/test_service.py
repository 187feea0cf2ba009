"""The daemon as a process: it starts, answers, stops when told, ends when a role dies, and says nothing that it should not."""

import contextlib
import os
import signal
import socket
import sqlite3
import time
from datetime import UTC, datetime

import httpx
import pytest

from storage import db, runs, tokens
from tests import model_fixtures
from tests.daemon_fixtures import Daemon, find_trainers, make_home
from tests.event_fixtures import make_history, make_label, make_prediction, send

pytestmark = pytest.mark.timeout(240)
QUICK = "from daemon import scheduler; scheduler.TICK_SECONDS = 0.2"
HANG = """
import asyncio, time
from daemon import service
service.STOP_SECONDS = 1
service.ROLES = {**service.ROLES, "consume": lambda _: asyncio.to_thread(time.sleep, 120)}
"""


@pytest.fixture
def home(tmp_path):
    return tmp_path / "claims"


@pytest.fixture
def secrets(home):
    return make_home(home)


@pytest.fixture
def daemon(home, secrets):
    """A daemon that was not started yet; it and its trainers are gone after the test."""
    daemon = Daemon(home)
    yield daemon
    daemon.kill()
    for number in find_trainers(home):
        os.killpg(number, signal.SIGKILL)


@contextlib.contextmanager
def listening(home):
    """A service manager's socket, and how the daemon finds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(home / "n"))
        manager.settimeout(60)
        yield manager


def look(url, path, **options):
    return httpx.get(f"{url}{path}", trust_env=False, **options)


def execute(home, statement):
    with contextlib.closing(sqlite3.connect(home / "ratchet.db")) as connection, connection:
        connection.execute(statement)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_until_it_is_told_to_stop_and_ends_well(daemon, secrets, number):
    daemon.start()
    token = {"Authorization": f"Bearer {secrets['node']}"}
    posted = httpx.post(f"{daemon.url}/v1/predictions", json=make_prediction(1, datetime.now(UTC)), headers=token, trust_env=False)
    assert posted.status_code == 202
    status = f"/v1/events/{posted.json()['ulid']}"
    daemon.wait_for(lambda: look(daemon.url, status, headers=token).json()["state"] == "handled")
    for path in ("/healthz", "/readyz", "/metrics"):
        assert look(daemon.ops_url, path).status_code == 200
    assert look(daemon.ops_url, "/v1/reviews").status_code == 404, "the ops port serves health and metrics alone"
    began = time.monotonic()
    assert daemon.stop(number) == 0
    assert time.monotonic() - began < 30
    told = daemon.events()
    assert told[-1] == "stopped"
    assert "stopping" in told


@pytest.mark.parametrize("key", ["port", "ops_port"])
def test_a_port_that_is_taken_is_told_in_one_line(daemon, key):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon.begin(**{f"RATCHET_SERVER__{key.upper()}": str(port)})
        assert daemon.process.wait(60) == 1
    assert daemon.log.read_text() == (
        f"ratchet: server.{key} = {port} can't be listened on (Address already in use): stop what listens there, or set another port\n"
    )


def test_a_password_that_can_t_be_read_is_told_in_one_line(daemon):
    told = {"BOOTSTRAP": "127.0.0.1:1", "MECHANISM": "SCRAM-SHA-512", "USER": "ann", "PASSWORD_FILE": "nowhere"}
    daemon.begin(**{f"RATCHET_KAFKA__{name}": value for name, value in told.items()})
    assert daemon.process.wait(60) == 1
    [line] = daemon.log.read_text().splitlines()
    assert "nowhere can't be read" in line
    assert line.endswith("write the password there")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "a" * 70])
def test_a_host_that_is_not_this_machine_s_is_told_in_one_line(daemon, host):
    daemon.begin(RATCHET_SERVER__HOST=host)
    assert daemon.process.wait(60) == 1
    [line] = daemon.log.read_text().splitlines()
    assert line.startswith(f"ratchet: server.host = {host!r}: ")
    assert line.endswith(": set it to an address of this machine, such as 127.0.0.1")


def test_a_role_that_dies_while_it_works_ends_the_process_with_1(daemon, home):
    daemon.start("--role", "consume")
    assert look(daemon.ops_url, "/readyz").status_code == 200
    assert daemon.url is None, "one role alone was asked for"
    execute(home, "ALTER TABLE events RENAME TO gone")
    assert daemon.process.wait(60) == 1
    assert next(line["role"] for line in daemon.lines() if line["event"] == "role_died") == "consume"


def test_a_daemon_whose_database_was_deleted_ends_and_says_so_and_makes_none(daemon, home):
    daemon.start("--role", "consume")
    (home / "ratchet.db").unlink()
    assert daemon.process.wait(60) == 1
    [died] = [line for line in daemon.lines() if line["event"] == "role_died"]
    assert f"there is no {home / 'ratchet.db'}: restore it from a backup" in died["exception"]
    assert daemon.begin().process.wait(60) == 1
    assert "restore it from a backup (docs/operations.md), or make a new, empty one" in daemon.log.read_text().splitlines()[-1]
    assert not (home / "ratchet.db").exists()


def test_a_role_that_does_not_stop_is_left_behind(daemon):
    daemon.begin("--role", "consume", patch=HANG)
    daemon.wait_for(lambda: daemon.ops_url)
    assert daemon.stop() == 1
    assert next(line["role"] for line in daemon.lines() if line["event"] == "role_did_not_stop") == "consume"


def test_a_leader_that_is_killed_is_followed_at_once(daemon, home, secrets):
    daemon.start("--role", "schedule")
    daemon.wait_for(lambda: "leading_began" in daemon.events())
    other = Daemon(home)
    other.log = home / "other.log"
    try:
        other.start("--role", "schedule", patch=QUICK)
        time.sleep(0.5)  # it could have taken the lead twice
        assert "leading_began" not in other.events(), "one leads already"
        daemon.kill()
        other.wait_for(lambda: "leading_began" in other.events(), seconds=5)
        assert other.stop() == 0
    finally:
        other.kill()


def test_the_service_manager_hears_that_it_answers_that_it_lives_and_that_it_ends(daemon, home):
    with listening(home) as manager:
        daemon.begin(NOTIFY_SOCKET=str(home / "n"), WATCHDOG_USEC="200000")
        assert manager.recv(100) == b"READY=1"
        assert look(daemon.url, "/healthz").status_code == look(daemon.ops_url, "/readyz").status_code == 200
        began = time.monotonic()
        assert {manager.recv(100) for _ in range(6)} == {b"WATCHDOG=1"}
        assert time.monotonic() - began < 10, "twice in each period of the watchdog, and some patience"
        assert daemon.stop() == 0
        while (last := manager.recv(100)) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"


def test_a_network_is_not_served_while_nobody_is_known(daemon, home):
    execute(home, "UPDATE tokens SET revoked_at = created_at")
    daemon.begin("--role", "consume", RATCHET_SERVER__HOST="0.0.0.0")
    assert daemon.process.wait(60) == 1
    assert "ratchet tokens add" in daemon.log.read_text().splitlines()[-1]
    assert "listening" not in daemon.events()


def test_a_network_is_served_where_somebody_is_known(daemon):
    daemon.start("--role", "consume", RATCHET_SERVER__HOST="0.0.0.0")
    assert look(daemon.ops_url.replace("0.0.0.0", "127.0.0.1"), "/readyz").status_code == 200


def test_a_trainer_is_stopped_with_the_daemon_and_its_run_did_not_fail(daemon, home):
    now = datetime.now(UTC)
    engine = db.open_engine(f"sqlite:///{home}/ratchet.db")
    send(engine, [make_history(number, now) for number in range(40)], now)
    base = model_fixtures.tiny_base(home / "base")
    daemon.start(RATCHET_AGENTS__ADJUDICATION__BASE_MODEL=str(base))
    daemon.call("train", "--reason", "a test")
    daemon.wait_for(lambda: len(find_trainers(home)) == 1)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < 30
    assert find_trainers(home) == {}
    with db.reading(engine) as connection:
        [run] = runs.read_in_state(connection, "queued")
    assert (run["attempt"], run["failures"], run["error"]) == (1, 0, "stopped as asked")
    engine.dispose()


def test_the_log_holds_no_secret_and_no_claim(daemon, secrets, home):
    text, claim, now = "Mrs Miller has a carcinoma", "claim-of-miller", datetime.now(UTC)
    good = make_prediction(1, now, input={"note": text}, claim_id=claim, confidence=0.1)
    changed = good | {"data": good["data"] | {"input": {"note": text.upper()}}}
    reused = make_prediction(5, now, input={"note": text}, claim_id=claim, prediction_id="p1")
    wrong = [make_prediction(2, now, agent=text), make_prediction(3, now, confidence=text), make_prediction(4, now, **{text: text})]
    label = make_label(1, now, claim_id=claim, rationale=text)
    daemon.start(RATCHET_LOG__LEVEL="debug")
    with httpx.Client(base_url=daemon.url, trust_env=False) as client:
        for secret in secrets.values():
            client.headers["Authorization"] = f"Bearer {secret}"
            for one in (good, changed, reused, *wrong, label):
                client.post("/v1/labels" if one is label else "/v1/predictions", json=one)
            client.post("/v1/predictions", content=text)
            client.get(f"/v1/events/{claim}", params={"note": text, "token": secret})
            client.get("/v1/reviews/next")
            client.post("/login", data={"token": secret})
        daemon.wait_for(lambda: "batch_handled" in daemon.events())
        execute(home, "ALTER TABLE predictions RENAME TO gone")
        client.headers["Authorization"] = f"Bearer {secrets['node']}"
        client.post("/v1/predictions", json=make_prediction(6, now, input={"note": text}, claim_id=claim))
    assert daemon.process.wait(60) == 1, "an error was provoked, and its traceback is in the log"
    logged = daemon.log.read_text()
    assert "OperationalError" in logged
    for hidden in (*secrets.values(), "iller", "ILLER", *(tokens._digest(secret) for secret in secrets.values())):
        assert hidden not in logged
