"""daemon.herald: each change of a champion is a line of the log, once, whoever made it."""

import asyncio

import pytest
from structlog.testing import capture_logs

from daemon import deployments, herald, scheduler
from storage import db
from tests.pipeline_fixtures import ScriptedLauncher, World, make_base, make_settings
from tests.test_scheduler import run_until
from tests.version_fixtures import register

pytestmark = pytest.mark.databases("sqlite", "postgresql")
AGENT = "adjudication"


@pytest.fixture
def change(engine, tmp_path, now):
    """Changes the champion as the commands do; v0 is in service, v1.0 and v1.1 could be."""
    with db.writing(engine) as connection:
        register(connection, tmp_path, 2, now)

    def change(way, *arguments):
        with db.writing(engine) as connection:
            way(connection, AGENT, *arguments, "ann", "why ever", now)

    return change


def listen(herald_, fence):
    with capture_logs() as said:
        herald_.tell(fence)
    return said


def to_changes(said):
    return [(line["kind"], line["previous"], line["version"], line["actor"]) for line in said if line["event"] == "champion_changed"]


def test_each_change_is_told_once_in_order(engine, change):
    ours = herald.Herald(engine, [AGENT])
    [found] = listen(ours, 1)
    assert (found["event"], found["champions"]) == ("champions_found", {AGENT: "v0"})
    change(deployments.promote, "v1.0")
    change(deployments.promote, "v1.1")
    assert to_changes(listen(ours, 1)) == [("promote", "v0", "v1.0", "ann"), ("promote", "v1.0", "v1.1", "ann")]
    assert listen(ours, 1) == []
    change(deployments.rollback)
    assert to_changes(listen(ours, 1)) == [("rollback", "v1.1", "v1.0", "ann")]
    assert listen(ours, 1) == []


def test_an_agents_first_version_is_a_change_too(engine, tmp_path, now):
    ours = herald.Herald(engine, [AGENT])
    assert [line["champions"] for line in listen(ours, 1)] == [{}]
    with db.writing(engine) as connection:
        register(connection, tmp_path, 0, now)
    assert to_changes(listen(ours, 1)) == [("promote", None, "v0", "ratchet")]


def test_who_leads_next_says_what_it_finds_and_nothing_of_what_was(engine, change):
    first = herald.Herald(engine, [AGENT])
    listen(first, 1)
    change(deployments.promote, "v1.0")
    for next_one, fence in ((herald.Herald(engine, [AGENT]), 2), (first, 3)):
        assert [(line["event"], line["champions"]) for line in listen(next_one, fence)] == [("champions_found", {AGENT: "v1.0"})]
        assert listen(next_one, fence) == []


def test_the_leading_daemon_tells_a_change_that_a_command_made(engine, change, tmp_path, now, monkeypatch):
    monkeypatch.setattr(scheduler, "TICK_SECONDS", 0.1)
    world = World(engine, make_settings(tmp_path, make_base(tmp_path / "base")), ScriptedLauncher(), now)
    with capture_logs() as said:

        def is_told():
            names = [line["event"] for line in said]
            if "champions_found" in names and not is_changed:
                is_changed.append(change(deployments.promote, "v1.1"))
            return "champion_changed" in names

        is_changed = []
        asyncio.run(run_until(world.pipeline, is_told))
    assert to_changes(said) == [("promote", "v0", "v1.1", "ann")]
