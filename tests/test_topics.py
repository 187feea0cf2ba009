"""Topics on a real broker: made, compared with the configuration, missed."""

import pytest

from consumers import broker as brokers
from consumers import topics
from daemon import cli, config, doctor
from tests import broker_fixtures


@pytest.fixture
def kafka(broker, request):
    return broker_fixtures.name_topics(broker, request.node.name)


def test_missing_topics_are_made_as_configured_and_made_once(kafka):
    access, wanted = kafka.to_access(), kafka.topics.describe()
    assert [finding.partitions for finding in topics.check(access, wanted)] == [None] * 5
    assert topics.create(access, wanted) == list(kafka.topics.names())
    assert topics.create(access, wanted) == []
    assert all(finding.is_well for finding in topics.check(access, wanted))


def test_what_differs_from_the_configuration_is_named(kafka):
    access, wanted = kafka.to_access(), kafka.topics.describe()
    topics.create(access, wanted[:1])
    other = topics.Topic(wanted[0].name, 8, 1, 24, 1)
    (finding,) = topics.check(access, [other])
    assert finding.differs == ("partitions 2, configured 8", "retention_hours 168, configured 24")
    assert not finding.is_well


def test_a_topic_that_the_broker_refuses_is_an_error_with_its_reason(kafka):
    too_many = topics.Topic("refused", 1, 3, 24, 1)
    with pytest.raises(topics.TopicRefusedError, match=r"refused: .*replication factor"):
        topics.create(kafka.to_access(), [too_many])


def test_a_missing_topic_is_an_error_that_names_it_and_the_remedy(kafka):
    access, wanted = kafka.to_access(), kafka.topics.describe()
    topics.create(access, wanted[:1])
    with brokers.connect(access) as admin, pytest.raises(topics.TopicMissingError) as missed:
        topics.require(admin, kafka.topics.names()[:2])
    assert str(missed.value).startswith(f"there is no topic {wanted[1].name}: run `ratchet topics create`")


def test_a_topic_that_we_may_not_see_is_not_called_missing():
    class Admin:
        def describe_topics(self, names):
            return [{"name": name, "error_code": 29} for name in names]

    with pytest.raises(brokers.AccessRefusedError, match=r"may not see the topic a, b: give \[kafka\] user the rights"):
        topics.require(Admin(), ["b", "a"])


@pytest.fixture
def home(tmp_path, monkeypatch):
    assert cli.main(["init", str(tmp_path)]) == 0
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_make_and_check_the_topics(home, kafka, monkeypatch, capsys):
    monkeypatch.setenv("RATCHET_KAFKA__BOOTSTRAP", kafka.bootstrap)
    for key in ("predictions", "labels", "queue", "events", "dead_letters"):
        monkeypatch.setenv(f"RATCHET_KAFKA__TOPICS__{key.upper()}", getattr(kafka.topics, key))
    assert cli.main(["topics", "check"]) == 1
    assert "missing" in capsys.readouterr().out
    assert cli.main(["topics", "create"]) == 0
    assert cli.main(["topics", "check"]) == 0
    assert "as configured" in capsys.readouterr().out


def test_without_kafka_the_commands_say_what_to_set(home, capsys):
    assert cli.main(["topics", "check"]) == 1
    assert "set [kafka] bootstrap" in capsys.readouterr().err


def test_the_doctor_looks_at_the_broker_and_the_topics(home, kafka, monkeypatch):
    def look(bootstrap):
        monkeypatch.setenv("RATCHET_KAFKA__BOOTSTRAP", bootstrap)
        settings = config.load(home / "ratchet.toml").model_copy(update={"kafka": kafka.model_copy(update={"bootstrap": bootstrap})})
        return next(finding for finding in doctor.examine(settings) if finding.name == "kafka")

    assert "no broker answers" in look("127.0.0.1:1").detail
    assert look(kafka.bootstrap).remedy == "run `ratchet topics create`"
    topics.create(kafka.to_access(), kafka.topics.describe())
    assert look(kafka.bootstrap).is_well
