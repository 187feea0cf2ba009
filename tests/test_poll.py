"""The poll loop: what the broker lacks is waited for by whoever runs it."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import pytest
from kafka import KafkaConsumer
from kafka.errors import KafkaTimeoutError

from consumers import broker as brokers
from consumers import poll, records
from tests import broker_fixtures


def test_a_broker_that_goes_away_as_reading_begins_ends_no_process_and_leaves_no_thread(broker, engine, monkeypatch):
    kafka = broker_fixtures.make_topics(broker, "goes-away")
    inlet = records.Inlet(engine, {}, kafka.topics.kinds(), lambda: datetime.now(UTC))
    before = threading.active_count()

    def fail(_consumer):
        raise KafkaTimeoutError

    monkeypatch.setattr(KafkaConsumer, "topics", fail)
    with pytest.raises(brokers.BrokerError, match=r"goes-away can't be read .KafkaTimeoutError"):
        poll.run(kafka.to_access(), kafka.group, inlet, threading.Event())
    assert threading.active_count() == before
