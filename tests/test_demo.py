"""daemon.demo without its processes: what it furnishes, how it spoils an archive, and how it counts what happened."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import orjson
import pytest

from consumers import counterpart, schemas
from daemon import cases, config, imr
from daemon.demo import chronicle, clients, direct, home, streamed
from daemon.demo.loop import Served
from tests import broker_fixtures, daemon_fixtures, event_fixtures


def serve(*answers):
    """Claims in order: who answered, whether rightly, and whether v1.0 would have been right."""
    return [Served(f"c{number}", *answer) for number, answer in enumerate(answers)]


def command_lines():
    """Of every process that lives."""
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield found.parent.name, found.read_text(errors="replace")


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    (folder / "prompts").mkdir()
    return home.furnish(folder, seed=3)


def test_the_configuration_is_one_that_the_daemon_takes(furnished):
    settings = config.load(furnished.config, {})
    assert settings.training.seed == 3
    assert settings.server.port == furnished.port
    assert settings.agent(home.AGENT).publisher.url.endswith(str(furnished.node_port))


def test_the_history_is_short_enough_for_a_real_gain_and_ends_before_the_stream_begins(furnished):
    history, stream = cases.read(furnished.history), cases.read(furnished.stream)
    assert len(history) <= 2000
    assert history[-1].occurred_at < stream[0].occurred_at
    assert not {case.claim_id for case in history} & {case.claim_id for case in stream}


def test_the_bad_archive_says_of_every_wrongful_denial_that_it_was_right(furnished):
    truth = {case["claim_id"]: case["answer"] for case in imr.read_decisions(*home.ARCHIVE_YEARS)}
    archive = [json.loads(line) for line in furnished.archive.read_text().splitlines()]
    assert len(archive) == home.ARCHIVE_CASES
    assert {(truth[case["claim_id"]], case["answer"]) for case in archive} == {("APPROVED", "DENIED")}


def test_a_prediction_does_not_carry_the_true_answer(furnished):
    case = cases.read(furnished.stream)[0]
    answer = {"decision": "DENIED", "confidence": 0.6, "probabilities": [0.4, 0.6], "serving_name": "v1.0"}
    event = clients.to_event(case, answer)
    assert event["data"]["decision"] == "DENIED"
    assert "answer" not in event["data"]
    assert event["data"]["probabilities"] == {"APPROVED": 0.4, "DENIED": 0.6}


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(home.FolderTakenError, match="name another --out"):
        home.clear(tmp_path)
    done = subprocess.run([sys.executable, "-m", "daemon.demo", "--out", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "name another --out" in done.stdout
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_earlier_demo_is_replaced(tmp_path):
    home.clear(tmp_path / "run")
    (tmp_path / "run" / "ratchet.db").touch()
    home.clear(tmp_path / "run")
    assert not (tmp_path / "run" / "ratchet.db").exists()


def test_an_interrupted_demo_leaves_no_process_behind(tmp_path):
    demo = subprocess.Popen([sys.executable, "-m", "daemon.demo", "--out", tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "base.log").exists():  # it makes the small base in a process of its own
        assert demo.poll() is None
        time.sleep(0.05)
    demo.send_signal(signal.SIGTERM)
    told = demo.communicate()[0]
    assert demo.returncode == 130
    assert "all processes are stopped" in told
    assert not [pid for pid, line in command_lines() if str(tmp_path / "run") in line]


def test_without_java_the_demo_on_kafka_says_in_one_sentence_what_to_install(tmp_path):
    for name in ("bash", "sed", "find", "sort", "tail", "mkdir", "dirname", "id", "runuser"):
        (tmp_path / name).symlink_to(shutil.which(name))
    command = [sys.executable, "-m", "daemon.demo", "--kafka", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": str(tmp_path)})
    assert done.returncode == 1
    assert "java, mvn" in done.stdout
    assert "`apt-get install openjdk-17-jre-headless maven" in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_interrupted_demo_on_kafka_stops_broker_and_database_too(tmp_path, postgres):
    missing = broker_fixtures.find_missing()
    if missing:
        pytest.skip(missing)
    command = [sys.executable, "-m", "daemon.demo", "--kafka", "--out", tmp_path / "run"]
    environment = {**os.environ, "KAFKA_OPTS": broker_fixtures.QUICK_START}
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while not (tmp_path / "run" / "base.log").exists():  # by then both servers answer and the topics are there
        assert demo.poll() is None, demo.stdout.read()
        time.sleep(0.05)
    database = (tmp_path / "run" / home.DATABASE_LINK).resolve()
    living = [line for _, line in command_lines() if str(tmp_path / "run" / "kafka") in line or str(database) in line]
    assert len(living) >= 2
    demo.send_signal(signal.SIGTERM)
    told = demo.communicate()[0]
    assert demo.returncode == 130
    assert "all processes are stopped" in told
    assert not [pid for pid, line in command_lines() if str(tmp_path / "run") in line or str(database) in line]
    home.clear(tmp_path / "run")
    assert not database.exists()


def test_over_http_predictions_are_handled_and_what_is_opened_is_answered(tmp_path):
    secrets = daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path).start("--role", "consume", "--role", "web")
    url = daemon.wait_for(lambda: daemon.url)

    def open_client(name):
        return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {secrets[name]}"}, timeout=60, trust_env=False)

    with open_client("node") as node, open_client("ann") as ann:
        sent = [event_fixtures.make_prediction(number, datetime.now(UTC), confidence=0.1) for number in range(3)]
        direct.Producer(node).send(sent)
        truth = {one["data"]["claim_id"]: "DENIED" for one in sent}
        expert = clients.Expert(direct.Desk(ann), truth)
        assert expert.answer_all() == 3
        assert expert.answer_all() == 0
        assert set(expert.claims) == set(truth)
    assert daemon.stop() == 0


def test_over_kafka_what_is_opened_is_answered_and_comes_back_closed(engine, broker):
    kafka = broker_fixtures.make_topics(broker, "demo-desk")
    access, names = kafka.to_access(), kafka.topics
    told = [{"type": kind, "data": {"agent": home.AGENT, "review": "r1", "claim_id": "c1"}} for kind in (streamed.OPENED, *streamed.ENDED)]
    with (
        counterpart.sending(access) as sender,
        counterpart.listening(access, names.queue) as queue,
        counterpart.listening(access, names.labels) as labels,
    ):
        desk = streamed.Desk(sender, queue, names.labels, "physician")
        sender.send(names.queue, told[:1])
        while not desk.waiting:
            desk._hear()
        answered = []
        thread = threading.Thread(target=lambda: answered.extend(desk.answer_all({"c1": "DENIED"})))
        thread.start()
        while not (heard := labels.hear(1)):
            pass
        assert answered == []
        sender.send(names.queue, [*told[1:], told[0]])  # the opening may be told again
        thread.join(30)
        assert [one.claim_id for one in answered] == ["c1"]
        assert list(desk.answer_all({})) == []
    assert heard[0]["data"].items() >= {"review_id": "r1", "expert": "physician", "answer": "DENIED"}.items()
    assert schemas.parse_each([orjson.dumps(heard[0])], schemas.LABEL)[0]["data"]["claim_id"] == "c1"


def test_of_two_announced_changes_the_later_is_in_force_whatever_partition_tells_first():
    class Announcements:
        def hear(self, seconds):
            changed = {"type": "ratchet.champion.rolled-back.v1", "time": "2026-01-02T00:00:00Z", "data": {"version": "v1.1"}}
            judged = {"type": "ratchet.version.judged.v1", "time": "2026-01-01T00:00:00Z", "data": {"version": "v1.2", "verdict": "reject"}}
            return [changed, {**changed, "time": "2026-01-01T00:00:00Z", "data": {"version": "v1.2"}}, judged]

    news = streamed.News(Announcements())
    assert news.read_change() == {"version": "v1.1"}
    assert news.read_verdict("v1.2") == "reject"
    assert news.read_verdict("v1.1") is None


def test_versions_are_compared_on_the_claims_that_they_answered():
    served = serve(("v1.0", True, True), ("v1.0", False, False), ("v1.1", True, False), ("v1.1", True, True))
    assert chronicle.compare_versions(served) == [("v1.0", "2", "0.500", "0.500"), ("v1.1", "2", "1.000", "0.500")]


def test_a_version_that_had_answered_before_came_back():
    served = serve(*((name, True, True) for name in ("v1.0", "v1.1", "v1.2", "v1.1")))
    assert [(mark["version"], mark["outcome"]) for mark in chronicle.find_changes(served)] == [
        ("v1.1", "begins"),
        ("v1.2", "begins"),
        ("v1.1", "back"),
    ]


def test_a_short_last_window_is_no_window():
    sizes = [len(window) for window in chronicle.split_windows([True] * (2 * chronicle.WINDOW + 10))]
    assert sizes == [chronicle.WINDOW, chronicle.WINDOW]
    assert [len(window) for window in chronicle.split_windows([True] * 10)] == [10]


def test_a_time_that_was_not_measured_is_a_dash():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert chronicle.tell(now, now + timedelta(seconds=1.234)) == "1.23 s"
    assert chronicle.tell(now, None) == "-"
