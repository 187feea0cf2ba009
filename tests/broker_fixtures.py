"""A real Kafka broker for tests, without Docker: one for each test process, with topics of their own for each test."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import RetriableError
from kafka.structs import OffsetAndMetadata

from consumers import broker as brokers
from consumers import topics
from daemon.kafka import Kafka

START = Path(__file__).parents[1] / "deploy" / "kafka" / "start_kafka.sh"
SCRAM_USER, PLAIN_USER, PASSWORD = "ann", "bob", "right-horse"
FIRST_PORT, LAST_PORT, STEP = 21000, 29000, 4
QUICK_START = "-XX:TieredStopAtLevel=1"
"""It computes half as much until it answers: what it does in a test is not worth being optimised."""
EXTRA = """\
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},SASL_SSL://127.0.0.1:{secure},PROXIED://127.0.0.1:{proxied}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_SSL://127.0.0.1:{secure},PROXIED://127.0.0.1:{proxy}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,PROXIED:PLAINTEXT
group.min.session.timeout.ms=1000
sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_{user}="{password}";
listener.name.sasl_ssl.ssl.keystore.type=PKCS12
listener.name.sasl_ssl.ssl.keystore.location={folder}/broker.p12
listener.name.sasl_ssl.ssl.keystore.password={password}
listener.name.sasl_ssl.ssl.key.password={password}
"""


@dataclass(frozen=True)
class Broker:
    """A broker in a folder: `bootstrap` takes plain connections, `secure` takes TLS with SASL; `certificate` is its own authority.

    Who comes by the port `proxied` is told that it is at the port `proxy`, where a test may put something in between.
    """

    folder: Path
    port: int

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def secure(self) -> str:
        return f"127.0.0.1:{self.port + 1}"

    @property
    def proxied(self) -> int:
        return self.port + 2

    @property
    def proxy(self) -> int:
        return self.port + 3

    @property
    def certificate(self) -> Path:
        return self.folder / "broker.pem"

    def start(self) -> None:
        """Start it, or start it again with its data; returns when it answers, at all its ports."""
        if not self.certificate.exists():
            self._make_certificate()
        extra = self.folder / "extra.properties"
        names = {"port": self.port, "secure": self.port + 1, "proxied": self.proxied, "proxy": self.proxy, "controller": self.port + 10000}
        extra.write_text(EXTRA.format(**names, user=PLAIN_USER, password=PASSWORD, folder=self.folder))
        scram = f"--add-scram SCRAM-SHA-512=[name={SCRAM_USER},password={PASSWORD}]"
        self._call("start", str(self.port), KAFKA_EXTRA=str(extra), KAFKA_FORMAT_ARGS=scram, KAFKA_HEAP="256m", KAFKA_OPTS=QUICK_START)
        wait_until(lambda: not _is_free(self.port + 1) and not _is_free(self.proxied))

    def stop(self) -> None:
        self._call("stop")

    def kill(self) -> None:
        """End it as a power cut does."""
        self._call("kill")

    def _call(self, command: str, *arguments: str, **environment: str) -> None:
        done = subprocess.run(
            [START, command, self.folder, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def _make_certificate(self) -> None:
        shared = ["-alias", "broker", "-keystore", self.folder / "broker.p12", "-storetype", "PKCS12", "-storepass", PASSWORD]
        made = ["-genkeypair", "-keyalg", "EC", "-dname", "CN=broker", "-ext", "san=dns:localhost,ip:127.0.0.1", "-validity", "30"]
        subprocess.run(["keytool", *made, *shared], check=True, capture_output=True)
        subprocess.run(["keytool", "-exportcert", "-rfc", "-file", self.certificate, *shared], check=True, capture_output=True)


def find_missing() -> str | None:
    """What a broker needs and this machine lacks; None when there is nothing."""
    missing = [name for name in ("java", "keytool", "mvn") if shutil.which(name) is None]
    return f"{' and '.join(missing)} is absent: install openjdk-17-jre-headless and maven" if missing else None


def find_port() -> int:
    """A port whose three neighbours, and whose controller's port, are free as well."""
    for port in range(FIRST_PORT + os.getpid() % 1000 * STEP, LAST_PORT, STEP):
        if all(map(_is_free, (*range(port, port + STEP), port + 10000))):
            return port
    raise AssertionError("no free port")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def make_broker(folder: Path) -> Broker:
    """A running broker; skips the test when Java or Maven is absent."""
    missing = find_missing()
    if missing:
        pytest.skip(missing)
    broker = Broker(folder, find_port())
    broker.start()
    return broker


def make_topics(broker: Broker, name: str) -> Kafka:
    """As `name_topics`, and the topics are there."""
    kafka = name_topics(broker, name)
    topics.create(kafka.to_access(), kafka.topics.describe())
    return kafka


def produce(broker: Broker, topic: str, values: Iterable[bytes | None], compression: str | None = None) -> None:
    """Send records and wait until all are acknowledged; the one of even number goes to partition 0."""
    options = {"bootstrap_servers": broker.bootstrap, "linger_ms": 5, "allow_auto_create_topics": False}
    producer = KafkaProducer(**options, compression_type=compression)
    sent = [producer.send(topic, key=b"key", value=value, partition=number % 2) for number, value in enumerate(values)]
    producer.flush()
    for one in sent:
        one.get(timeout=10)
    producer.close()


def read_lag(kafka: Kafka, topic: str) -> int:
    """How many records of a topic the group has not acknowledged."""
    places = _list_places(kafka, topic)

    def ask(admin: KafkaAdminClient) -> Any:
        done = admin.list_group_offsets({kafka.group: places})[kafka.group]
        ends = admin.list_partition_offsets(dict.fromkeys(places, -1))
        return sum(ends[place].offset - max(0, done[place].offset if place in done else 0) for place in places)

    return int(_ask(kafka, ask))


def acknowledge(kafka: Kafka, topic: str, offset: int) -> None:
    """Let the group, of which nobody reads, have acknowledged each partition of a topic up to an offset."""
    offsets = {place: OffsetAndMetadata(offset, "", -1) for place in _list_places(kafka, topic)}
    _ask(kafka, lambda admin: admin.alter_group_offsets(kafka.group, offsets))


def _list_places(kafka: Kafka, topic: str) -> list[TopicPartition]:
    return [TopicPartition(topic, number) for number in range(kafka.topics.partitions)]


def _ask(kafka: Kafka, question: Callable[[KafkaAdminClient], Any]) -> Any:
    """The broker's answer; one that was started a moment ago has to find its groups first."""
    deadline = time.monotonic() + 30
    while True:
        try:
            with brokers.connect(kafka.to_access()) as admin:
                return question(admin)
        except RetriableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def name_topics(broker: Broker, name: str) -> Kafka:
    """The configuration of one test: topics and a group that no other test has."""
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    topics = {"predictions": f"{name}-predictions", "labels": f"{name}-labels", "queue": f"{name}-queue"}
    topics |= {"events": f"{name}-events", "dead_letters": f"{name}-dead-letters", "partitions": 2}
    return Kafka.model_validate({"bootstrap": broker.bootstrap, "group": name, "topics": topics})


def consume(broker: Broker, topic: str, count: int) -> list[ConsumerRecord]:
    """The first `count` records of a topic, by partition; fails when they do not come."""
    reader = KafkaConsumer(topic, bootstrap_servers=broker.bootstrap, auto_offset_reset="earliest", consumer_timeout_ms=20_000)
    records = list(itertools.islice(reader, count))
    reader.close()
    assert len(records) == count, f"{len(records)} of {count} records came"
    return records


def secure(broker: Broker, mechanism: brokers.Mechanism = "SCRAM-SHA-512") -> brokers.Access:
    """The way to the broker over TLS, as the user that the mechanism knows."""
    user = SCRAM_USER if mechanism.startswith("SCRAM") else PLAIN_USER
    return brokers.Access(broker.secure, tls=True, ca_file=broker.certificate, mechanism=mechanism, user=user, password=PASSWORD)


def wait_until(holds: Callable[[], object], seconds: float = 90) -> None:
    """Look again and again; fails when it does not come to hold in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
