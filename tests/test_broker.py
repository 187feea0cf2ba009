"""The way to the broker: plain, over TLS with SCRAM and PLAIN, and every way in which it fails told apart."""

import dataclasses
import logging
import socket
import subprocess
import sys
import threading

import pytest

from consumers import broker as brokers
from daemon import config
from daemon.kafka import Kafka
from tests.broker_fixtures import secure


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_a_user_is_let_in_over_tls(broker, mechanism):
    with brokers.connect(secure(broker, mechanism)) as admin:
        assert isinstance(admin.list_topics(), list)


@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_a_wrong_password_is_told_and_not_shown(broker, mechanism, monkeypatch):
    monkeypatch.setattr(brokers, "PROBE_SECONDS", 2.0)
    wrong = dataclasses.replace(secure(broker, mechanism), password="wrong-horse")
    with pytest.raises(brokers.AccessRefusedError, match=r"check .* user, the password and the mechanism") as refused:
        brokers.connect(wrong)
    assert "wrong-horse" not in f"{refused.value} {wrong}"


def test_a_certificate_that_nobody_vouches_for_is_told(broker):
    with pytest.raises(brokers.AccessRefusedError, match=r"not trusted .*set \[kafka\] ca_file"):
        brokers.connect(dataclasses.replace(secure(broker), ca_file=None))


def test_tls_to_a_port_that_does_not_speak_it_is_told(broker):
    with pytest.raises(brokers.AccessRefusedError, match="does not speak TLS"):
        brokers.connect(dataclasses.replace(secure(broker), bootstrap=broker.bootstrap))


def test_no_tls_to_a_port_that_wants_it_is_told(broker, monkeypatch):
    monkeypatch.setattr(brokers, "PROBE_SECONDS", 1.0)
    with pytest.raises(brokers.AccessRefusedError, match="may want TLS"):
        brokers.connect(brokers.Access(broker.secure))


def test_an_absent_broker_is_told_from_one_that_refuses():
    with pytest.raises(brokers.BrokerAbsentError, match=r"no broker answers at 127.0.0.1:1 .Connection refused"):
        brokers.connect(brokers.Access("127.0.0.1:1"))


def test_a_broker_that_takes_connections_and_never_answers_is_absent(monkeypatch):
    monkeypatch.setattr(brokers, "PROBE_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(brokers.BrokerAbsentError, match="does not answer"):
        brokers.connect(brokers.Access(f"127.0.0.1:{silent.getsockname()[1]}"))


def test_a_connection_that_fails_leaves_nothing_behind(broker, monkeypatch):
    monkeypatch.setattr(brokers, "PROBE_SECONDS", 0.5)
    before = threading.active_count()
    for _ in range(2):  # it is tried every few seconds for as long as it fails
        with pytest.raises(brokers.AccessRefusedError):
            brokers.connect(brokers.Access(broker.secure))
    assert threading.active_count() == before
    assert sum(isinstance(one, logging.NullHandler) for one in logging.getLogger("kafka.net").handlers) <= 1


def test_what_is_missing_for_kafka_is_said_in_one_sentence(monkeypatch):
    monkeypatch.setattr(brokers, "PACKAGES", ("kafka-python", "faust-streaming-of-nowhere"))
    with pytest.raises(brokers.ExtraMissingError, match=r"faust-streaming-of-nowhere is not installed: install ratchet-daemon\[kafka\]"):
        brokers.connect(brokers.Access("127.0.0.1:1"))


def test_nothing_of_kafka_is_imported_until_it_is_configured():
    program = "import sys; from daemon import cli, service, doctor; print({'kafka', 'faust', 'aiokafka'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_password_comes_from_a_file_or_the_environment_and_is_never_shown(tmp_path):
    (tmp_path / "secret").write_text("right-horse\n")
    (tmp_path / "ratchet.toml").write_text(
        '[kafka]\nbootstrap = "a:1, b:2"\nmechanism = "SCRAM-SHA-512"\nuser = "ann"\npassword_file = "secret"\n'
    )
    access = config.load(tmp_path / "ratchet.toml", {}).kafka.to_access()
    assert access.password == "right-horse"
    assert access.servers() == [("a", 1), ("b", 2)]
    (tmp_path / "ratchet.toml").write_text('[kafka]\nbootstrap = "[::1]:9"\nmechanism = "SCRAM-SHA-512"\nuser = "ann"\n')
    reading = config.read(tmp_path / "ratchet.toml", {"RATCHET_KAFKA__PASSWORD": "0123"})
    assert reading.settings.kafka.to_access().password == "0123"
    assert reading.settings.kafka.to_access().servers() == [("::1", 9)]
    assert "0123" not in f"{list(reading.values())}{reading.settings}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('bootstrap = "nowhere"', "should be `HOST:PORT` of a broker"),
        ('mechanism = "PLAIN"\nuser = "ann"\npassword = "hush"', "PLAIN sends the password as it is"),
        ('mechanism = "SCRAM-SHA-512"\nuser = "ann"', "needs `user`, and either `password` or `password_file`"),
        ('user = "ann"\npassword = "hush"', "`user` needs `mechanism`"),
        ('pasword = "hush"', "did you mean kafka.password?"),
        ("password = 9", "should be a valid string"),
        ('topics = { queue = "predictions" }', "two topics have one name"),
        ("topics = { min_in_sync = 2 }", "no record could be written"),
        ('tls = true\ncertificate_file = "a"', "belong together"),
    ],
)
def test_a_mistake_is_refused_with_its_remedy_and_without_the_password(tmp_path, text, said):
    (tmp_path / "ratchet.toml").write_text(f"[kafka]\n{text}\n")
    with pytest.raises(config.ConfigRefusedError) as refused:
        config.load(tmp_path / "ratchet.toml", {})
    assert said in str(refused.value)
    assert "hush" not in str(refused.value)


def test_a_password_file_that_is_missing_is_named():
    kafka = Kafka(bootstrap="a:1", mechanism="SCRAM-SHA-512", user="ann", password_file="/nowhere/secret")
    with pytest.raises(ValueError, match=r"kafka.password_file /nowhere/secret can't be read"):
        kafka.to_access()
