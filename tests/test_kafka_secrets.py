"""A daemon that comes to its broker over TLS with a password, at its most talkative, tells nobody of that password, nor of a claim."""

from __future__ import annotations

from datetime import UTC, datetime

import orjson
import pytest

from storage import db
from storage.tables import Prediction
from tests import broker_fixtures, daemon_fixtures, event_fixtures, fault_fixtures
from tests.test_fleet import count


@pytest.mark.parametrize("consumer", ["faust", "poll"])
def test_the_log_holds_no_password_of_the_broker_and_no_claim(broker, tmp_path, consumer):
    kafka = broker_fixtures.make_topics(broker, f"talkative-{consumer}")
    access = broker_fixtures.secure(broker)
    secure = {"BOOTSTRAP": access.bootstrap, "TLS": "true", "CA_FILE": str(access.ca_file), "MECHANISM": str(access.mechanism)}
    secure |= {"USER": str(access.user), "PASSWORD": str(access.password)}
    settings = fault_fixtures.to_settings(kafka, consumer) | {f"KAFKA__{name}": value for name, value in secure.items()}
    daemon_fixtures.make_home(tmp_path)
    daemon = daemon_fixtures.Daemon(tmp_path, LOG__LEVEL="debug", **settings)
    engine, at = db.open_engine(f"sqlite:///{tmp_path}/ratchet.db"), datetime.now(UTC)
    claim = {"claim_id": "claim-of-miller", "input": {"note": "Mrs Miller has a carcinoma"}}
    try:
        daemon.start()
        made = [orjson.dumps(event_fixtures.make_prediction(n, at, confidence=0.1, **claim)) for n in range(3)]
        broker_fixtures.produce(broker, kafka.topics.predictions, [*made, b'{"note": "Mrs Miller has a carcinoma"'])
        daemon.wait_for(lambda: count(engine, Prediction) == 3 and "record_parked" in daemon.events())
        assert daemon.stop() == 0
    finally:
        daemon.process.kill()
        engine.dispose()
    told = daemon.log.read_text()
    assert "stream_began" in told
    for hidden in (str(access.password), "iller"):
        assert hidden not in told
