"""storage.registry: numbers are given once, verdicts written once, and the champion changes by compare-and-swap."""

from datetime import timedelta

import pytest

from storage import db, events, ledger, registry
from tests.version_fixtures import BASE, make_made, register

pytestmark = pytest.mark.databases("sqlite", "postgresql")

AGENT = "adjudication"


@pytest.fixture
def connection(engine):
    with db.writing(engine) as connection:
        yield connection


def change(connection, to, expected, now, kind="promote", **more):
    return registry.change_champion(connection, AGENT, to, expected, kind, "ann", "because", now, **more)


def test_v0_is_the_bare_base_and_in_service_before_anything_is_trained(connection, tmp_path, now):
    for _ in range(2):
        registry.register_bare(connection, AGENT, make_made(tmp_path, None), now)
    assert registry.champion(connection, AGENT) == "v0"
    assert [row["version"] for row in registry.history(connection)] == ["v0"]
    row = registry.read(connection, AGENT, "v0")
    assert registry.serving_name(row) == "adjudication-v0-bbbbbbbbbbbb"


def test_a_new_base_template_or_label_set_is_a_major_version(connection, tmp_path, now):
    registry.register_bare(connection, AGENT, make_made(tmp_path, None), now)
    changes = [{}, {}, {"prompt_digest": "p2"}, {"prompt_digest": "p2"}, {"labels_digest": "l2"}, {"base_digest": "b2"}, {}]
    names = [registry.register(connection, AGENT, make_made(tmp_path, seed, **more), now) for seed, more in enumerate(changes)]
    assert names == ["v1.0", "v1.1", "v2.0", "v2.1", "v3.0", "v4.0", "v5.0"]


def test_a_run_that_registers_twice_has_one_version(connection, tmp_path, now):
    first = registry.register(connection, AGENT, make_made(tmp_path, 1, run="r1"), now)
    assert registry.register(connection, AGENT, make_made(tmp_path, 2, run="r1"), now) == first
    assert len(registry.list_all(connection, AGENT)) == 1


def test_agents_number_their_versions_apart(connection, tmp_path, now):
    assert registry.register(connection, AGENT, make_made(tmp_path, 1), now) == "v1.0"
    assert registry.register(connection, "scribe", make_made(tmp_path, 2), now) == "v1.0"
    assert registry.champion(connection, "scribe") is None


def test_a_verdict_is_written_once(connection, tmp_path, now):
    name = registry.register(connection, AGENT, make_made(tmp_path, 1), now)
    assert registry.give_verdict(connection, AGENT, name, "reject", ["It is worse."], now)
    assert not registry.give_verdict(connection, AGENT, name, "promote", ["It is not."], now)
    assert registry.read(connection, AGENT, name)["verdict"] == "reject"


def test_an_unknown_version_is_named_with_those_there_are(connection, tmp_path, now):
    register(connection, tmp_path, 1, now)
    with pytest.raises(registry.UnknownVersionError, match=r"no version 'v7.0': there are v0, v1.0"):
        registry.read(connection, AGENT, "v7.0")
    with pytest.raises(registry.UnknownVersionError):
        change(connection, "v7.0", "v0", now)


def test_the_champion_changes_only_from_what_was_expected(connection, tmp_path, now):
    register(connection, tmp_path, 2, now)
    change(connection, "v1.0", "v0", now)
    with pytest.raises(registry.ChampionChangedError, match=r"the champion is v1.0, not v0"):
        change(connection, "v1.1", "v0", now)
    with pytest.raises(registry.ChampionChangedError):
        change(connection, "v1.1", None, now)
    assert registry.champion(connection, AGENT) == "v1.0"


def test_of_two_processes_that_promote_at_once_one_wins(engine, tmp_path, now):
    with db.writing(engine) as connection:
        register(connection, tmp_path, 2, now)
        expected = registry.champion(connection, AGENT)
    with db.writing(engine) as connection:
        change(connection, "v1.0", expected, now)
    with pytest.raises(registry.ChampionChangedError), db.writing(engine) as connection:
        change(connection, "v1.1", expected, now)
    with db.reading(engine) as connection:
        assert [row["version"] for row in registry.history(connection)] == ["v0", "v1.0"]


def test_every_change_is_an_event_and_a_ledger_entry_in_the_same_transaction(connection, tmp_path, now):
    register(connection, tmp_path, 1, now)
    before = ledger.head(connection)[0]
    change(connection, "v1.0", "v0", now, is_forced=True)
    change(connection, "v0", "v1.0", now, kind="rollback")
    change(connection, "v1.0", "v0", now, kind="promote")
    change(connection, "v0", "v1.0", now, kind="revert")
    assert [row["kind"] for row in ledger.show(connection, limit=4)] == ["revert", "promote", "rollback", "promote"]
    assert ledger.head(connection)[0] == before + 4
    assert registry.read(connection, AGENT, "v1.0")["is_forced"]
    assert events.count_by_state(connection)["unsent"] == 1 + 1 + 4
    assert not ledger.verify(connection)


def test_changes_at_the_same_instant_keep_their_order(connection, tmp_path, now):
    register(connection, tmp_path, 3, now)
    path = ["v1.0", "v1.1", "v1.2", "v1.1", "v1.2", "v1.1"]
    for expected, to in zip(["v0", *path], path, strict=False):
        change(connection, to, expected, now)
    assert [row["version"] for row in registry.history(connection, AGENT)] == ["v0", *path]
    assert registry.champion_at(connection, AGENT, now) == "v1.1"
    assert registry.in_force(connection, AGENT)["version"] == "v1.1"


def test_who_was_in_production_when(connection, tmp_path, now):
    register(connection, tmp_path, 2, now)
    change(connection, "v1.0", "v0", now + timedelta(days=1))
    change(connection, "v1.1", "v1.0", now + timedelta(days=2))
    days = {day: registry.champion_at(connection, AGENT, now + timedelta(days=day)) for day in (-1, 0, 1, 1.9, 2, 100)}
    assert days == {-1: None, 0: "v0", 1: "v1.0", 1.9: "v1.0", 2: "v1.1", 100: "v1.1"}


def test_an_older_request_gives_way_and_a_settled_one_stays(connection, tmp_path, now):
    register(connection, tmp_path, 2, now)
    first = change(connection, "v1.0", "v0", now)
    second = change(connection, "v1.1", "v1.0", now)
    assert [row["id"] for row in registry.read_requested(connection)] == [second]
    assert not registry.settle_deployment(connection, first, "confirmed", None, now)
    assert registry.settle_deployment(connection, second, "confirmed", "the server says so", now)
    assert not registry.settle_deployment(connection, second, "reverted", None, now)
    assert not registry.mark_published(connection, second, now)
    states = {row["version"]: row["state"] for row in registry.history(connection)}
    assert states == {"v0": "superseded", "v1.0": "superseded", "v1.1": "confirmed"}


@pytest.mark.parametrize(
    ("changes", "predecessor"),
    [
        ([], None),
        (["v1.0"], "v0"),
        (["v1.0", "v1.1", "v1.2"], "v1.1"),
        (["v1.0", "v1.1", "-v1.0"], "v0"),
        (["v1.0", "v1.1", "v1.2", "-v1.1", "-v1.0"], "v0"),
        (["v1.0", "v1.1", "v1.2", "-v1.0"], "v0"),
        (["v1.0", "v1.1", "-v1.0", "v1.1"], "v1.0"),
        (["v1.0", "v1.1", "-v1.0", "v1.1", "v1.2"], "v1.1"),
        (["v1.0", "v1.1", "-v1.0", "v1.2"], "v1.0"),
        (["v1.0", "v1.1", "-v1.0", "-v1.1"], "v1.0"),
    ],
)
def test_a_rollback_goes_to_the_champion_before_and_never_to_what_was_gone_back_from(connection, tmp_path, now, changes, predecessor):
    register(connection, tmp_path, 3, now)
    current = "v0"
    for step in changes:
        version = step.removeprefix("-")
        change(connection, version, current, now, kind="rollback" if step != version else "promote")
        current = version
    assert registry.predecessor(connection, AGENT) == predecessor


def test_a_promotion_that_was_taken_back_is_no_predecessor(connection, tmp_path, now):
    register(connection, tmp_path, 2, now)
    change(connection, "v1.0", "v0", now)
    failed = change(connection, "v1.1", "v1.0", now)
    registry.settle_deployment(connection, failed, "reverted", "no answer", now)
    change(connection, "v1.0", "v1.1", now, kind="revert")
    assert registry.predecessor(connection, AGENT) == "v0"


def test_the_next_run_continues_from_the_latest_candidate_that_did_no_harm(connection, tmp_path, now):
    registry.register_bare(connection, AGENT, make_made(tmp_path, None), now)
    assert registry.latest_candidate(connection, AGENT) is None
    for seed, verdict in enumerate(["promote", "superseded", "reject"]):
        name = registry.register(connection, AGENT, make_made(tmp_path, seed), now)
        registry.give_verdict(connection, AGENT, name, verdict, [], now)
    assert registry.latest_candidate(connection, AGENT)["name"] == "v1.1"


def test_a_version_that_was_rolled_back_is_trained_on_again_once_it_was_promoted_again(connection, tmp_path, now):
    registry.register_bare(connection, AGENT, make_made(tmp_path, None), now)
    for seed in (1, 2):
        registry.register(connection, AGENT, make_made(tmp_path, seed), now)
    change(connection, "v1.0", "v0", now)
    change(connection, "v1.1", "v1.0", now)
    change(connection, "v1.0", "v1.1", now, kind="rollback")
    assert registry.latest_candidate(connection, AGENT)["name"] == "v1.0"
    change(connection, "v1.1", "v1.0", now)
    assert registry.latest_candidate(connection, AGENT)["name"] == "v1.1"
    change(connection, "v1.0", "v1.1", now, kind="rollback")
    assert registry.latest_candidate(connection, AGENT)["name"] == "v1.0"


def test_a_version_is_found_by_its_name_and_by_its_serving_name(connection, tmp_path, now):
    register(connection, tmp_path, 1, now)
    row = registry.read(connection, AGENT, "v1.0")
    assert registry.find(connection, AGENT, registry.serving_name(row))["name"] == "v1.0"
    assert registry.find(connection, AGENT, "v1.0")["base_digest"] == BASE
    assert registry.find(connection, AGENT, "gpt") is None
