"""daemon.deployments: a promotion that no server confirms is taken back, a rollback never is, and any line is a good one to die at."""

import json
import os
import socket
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
import structlog
from sqlalchemy.exc import DBAPIError

from daemon import deployments
from daemon.serving import pointer, publisher
from storage import alarms, db, leases, ledger, registry
from tests.version_fixtures import answer, copying, drip, listening, make_agent, make_made, register
from trainers import spec

pytestmark = pytest.mark.databases("sqlite", "postgresql")
AGENT = "adjudication"


class Site:
    """An installation with v0 confirmed, some versions, and a server that can be up, slow or down."""

    def __init__(self, engine, folder, now):
        self.engine, self.folder, self.now = engine, folder, now
        self.agent = make_agent(folder, **copying(folder))
        with db.writing(engine) as connection:
            register(connection, folder, 3, now)
        self.advance()

    def configure(self, **publisher):
        self.agent = make_agent(self.folder, **{**copying(self.folder), **publisher})

    def advance(self, seconds=0.0):
        self.now += timedelta(seconds=seconds)
        deployments.advance(self.engine, {AGENT: self.agent}, self.now)

    def reconcile(self, seconds=60.0):
        self.now += timedelta(seconds=seconds)
        deployments.reconcile(self.engine, {AGENT: self.agent}, self.now)

    def promote(self, version, force=False, reason="better"):
        with db.writing(self.engine) as connection:
            return deployments.promote(connection, AGENT, version, "ann", reason, self.now, force=force)

    def rollback(self, to=None):
        with db.writing(self.engine) as connection:
            return deployments.rollback(connection, AGENT, "ann", "it does harm", self.now, to=to)

    def history(self):
        with db.reading(self.engine) as connection:
            return [(row["kind"], row["version"], row["state"]) for row in registry.history(connection)]

    def last(self):
        with db.reading(self.engine) as connection:
            return registry.history(connection)[-1]

    def champion(self):
        with db.reading(self.engine) as connection:
            return registry.champion(connection, AGENT)

    def alarms(self):
        with db.reading(self.engine) as connection:
            return {row["kind"]: row["message"] for row in alarms.list_open(connection)}

    def served(self):
        return json.loads((self.folder / "served.json").read_text())["version"]


@pytest.fixture
def site(engine, tmp_path, now):
    return Site(engine, tmp_path, now)


def test_a_promotion_is_confirmed_by_the_servers_own_word(site):
    assert site.history() == [("promote", "v0", "confirmed")]
    site.promote("v1.0")
    assert site.served() == "v0"
    site.advance()
    assert site.served() == "v1.0"
    row = site.last()
    assert (row["state"], row["previous"]) == ("confirmed", "v0")
    assert row["requested_at"] < row["confirmed_at"]
    assert site.alarms() == {}


def test_where_nobody_can_be_asked_it_is_unverified_and_shown(site):
    site.configure(confirm="none")
    site.promote("v1.0")
    site.advance()
    assert site.last()["state"] == "unverified"
    assert "confirm" in site.last()["detail"]
    assert site.last()["confirmed_at"] == site.now


def test_a_promotion_that_is_not_confirmed_in_time_is_taken_back(site):
    site.promote("v1.0")
    site.advance()
    site.configure(command="false")
    site.promote("v1.1")
    for _ in range(3):
        site.advance(seconds=19)
        assert site.champion() == "v1.1"
    site.advance(seconds=4)
    assert site.champion() == "v1.0"
    assert site.history()[2:] == [("promote", "v1.1", "reverted"), ("revert", "v1.0", "unconfirmed")]
    site.configure()
    site.advance()
    assert site.history()[-1] == ("revert", "v1.0", "confirmed")
    assert site.served() == "v1.0"
    assert list(site.alarms()) == ["promotion_reverted"]
    assert "ended with status 1" in site.alarms()["promotion_reverted"]
    with db.reading(site.engine) as connection:
        kinds = [row["kind"] for row in ledger.show(connection, limit=10)]
        assert not ledger.verify(connection)
    assert [kind for kind in kinds if "deployment" in kind or kind == "revert"][:4] == [
        "deployment confirmed",
        "deployment unconfirmed",
        "revert",
        "deployment reverted",
    ]


def test_the_way_back_is_published_in_the_same_call(site):
    site.configure(confirm_command="echo sha256:0")
    site.promote("v1.0")
    site.advance()
    site.advance(seconds=61)
    assert json.loads((site.folder / "serving" / "current.json").read_text())["version"] == "v0"


def test_a_promotion_after_a_taken_back_one_closes_its_alarm(site):
    site.configure(command="false")
    site.promote("v1.0")
    site.advance(seconds=61)
    site.configure()
    site.advance()
    site.promote("v1.0")
    site.advance()
    assert site.history()[-1] == ("promote", "v1.0", "confirmed")
    assert site.alarms() == {}


def test_a_rollback_is_never_taken_back_but_retried_and_alarmed(site):
    site.promote("v1.0")
    site.advance()
    site.configure(command="false")
    site.rollback()
    for _ in range(4):
        site.advance(seconds=100)
        assert site.champion() == "v0"
        assert site.last()["state"] == "unconfirmed"
    assert list(site.alarms()) == ["rollback_unconfirmed"]
    site.configure()
    site.advance(seconds=1)
    assert site.last()["state"] == "confirmed"
    assert site.served() == "v0"
    assert site.alarms() == {}


def test_a_server_that_restarts_for_a_rollback_is_no_alarm_yet(site):
    site.promote("v1.0")
    site.advance()
    site.configure(confirm_command="false")
    site.rollback()
    site.advance(seconds=59)
    assert (site.last()["state"], site.alarms()) == ("requested", {})
    site.advance(seconds=2)
    assert list(site.alarms()) == ["rollback_unconfirmed"]


def test_the_first_version_of_all_is_not_taken_back_either(engine, tmp_path, now):
    with db.writing(engine) as connection:
        register(connection, tmp_path, 0, now)
    agent = make_agent(tmp_path, command="false")
    deployments.advance(engine, {AGENT: agent}, now + timedelta(seconds=100))
    with db.reading(engine) as connection:
        assert registry.history(connection)[-1]["state"] == "unconfirmed"
        assert [row["kind"] for row in alarms.list_open(connection)] == ["champion_not_served"]


def test_a_server_that_restarts_slowly_is_told_once(site):
    told = site.folder / "told"
    script = site.folder / "tell.sh"
    script.write_text(f"echo x >> {told}")
    site.configure(command=f"sh {script}")
    site.promote("v1.0")
    for _ in range(5):
        site.advance(seconds=5)
    assert site.last()["state"] == "requested"
    (site.folder / "served.json").write_text((site.folder / "serving" / "current.json").read_text())
    site.advance(seconds=5)
    assert site.last()["state"] == "confirmed"
    assert told.read_text() == "x\n"


def test_a_rollback_is_told_again_after_the_time_out(site):
    told = site.folder / "told"
    script = site.folder / "tell.sh"
    script.write_text(f"echo x >> {told}")
    site.promote("v1.0")
    site.advance()
    site.configure(command=f"sh {script}")
    site.rollback()
    for _ in range(13):
        site.advance(seconds=10)
    assert told.read_text() == "x\n" * 3
    assert list(site.alarms()) == ["rollback_unconfirmed"]


def test_a_newer_change_supersedes_one_that_waits(site):
    site.promote("v1.0")
    site.promote("v1.1")
    site.rollback(to="v0")
    site.advance()
    assert [state for _, _, state in site.history()] == ["confirmed", "superseded", "superseded", "confirmed"]
    assert site.served() == "v0"


@pytest.mark.parametrize("place", ["publish", "ask", "mark_published", "settle_deployment", "change_champion"])
def test_a_call_that_dies_anywhere_is_finished_by_the_next(site, monkeypatch, place):
    owner = pointer.Pointer if place in {"publish", "ask"} else registry
    real = getattr(owner, place)
    site.promote("v1.0")
    site.advance()
    site.promote("v1.1")
    if place == "change_champion":
        site.configure(command="false")

    def die(*arguments, **named):
        real(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, place, die)
    with pytest.raises(KeyboardInterrupt):
        site.advance(seconds=61 if place == "change_champion" else 0)
    monkeypatch.setattr(owner, place, real)
    site.configure()
    site.advance()
    assert site.history()[-1] == ("promote", "v1.1", "confirmed")
    assert site.served() == site.champion() == "v1.1"
    with db.reading(site.engine) as connection:
        assert not ledger.verify(connection)


@pytest.mark.parametrize("is_collected", [True, False], ids=["gone", "a zombie"])
def test_a_killed_process_of_this_machine_holds_up_nobody(site, is_collected):
    dead = subprocess.Popen(["sleep", "60"])
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | (0 if is_collected else os.WNOWAIT))
    with db.writing(site.engine) as connection:
        leases.acquire(connection, f"deploy:{AGENT}", f"{socket.gethostname()} {dead.pid} p n", site.now, timedelta(hours=1))
    site.promote("v1.0")
    site.advance()
    dead.wait()
    assert site.last()["state"] == "confirmed"


@pytest.mark.parametrize(
    "holder", [f"other-machine {os.getpid()} p n", f"{socket.gethostname()} {os.getppid()} p n"], ids=["another machine", "a living parent"]
)
def test_a_process_that_may_live_is_waited_for_until_its_lease_ends(site, holder):
    with db.writing(site.engine) as connection:
        leases.acquire(connection, f"deploy:{AGENT}", holder, site.now, timedelta(seconds=100))
    site.promote("v1.0")
    site.advance()
    assert site.last()["state"] == "requested"
    site.advance(seconds=101)
    assert site.last()["state"] == "confirmed"


def test_an_earlier_process_with_our_number_is_dead(site):
    with db.writing(site.engine) as connection:
        leases.acquire(connection, f"deploy:{AGENT}", f"{socket.gethostname()} {os.getpid()} p n", site.now, timedelta(hours=1))
    site.promote("v1.0")
    site.advance()
    assert site.last()["state"] == "confirmed"


def test_of_two_that_advance_at_once_one_speaks_to_the_server(site):
    told = site.folder / "told"
    script = site.folder / "tell.sh"
    script.write_text(f"echo x >> {told}; sleep 0.5; cp {site.folder}/serving/current.json {site.folder}/served.json")
    site.configure(command=f"sh {script}")
    site.promote("v1.0")
    threads = [threading.Thread(target=site.advance) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told.read_text() == "x\n"
    assert site.history()[-1] == ("promote", "v1.0", "confirmed")


def test_a_rollback_that_comes_while_a_promotion_is_published_wins(site, monkeypatch):
    real = pointer.Pointer.publish
    site.promote("v1.0")
    site.advance()
    site.promote("v1.1")

    def publish(self, target):
        if target.version == "v1.1":
            site.rollback()
        real(self, target)

    monkeypatch.setattr(pointer.Pointer, "publish", publish)
    site.advance()
    assert site.history()[-2:] == [("promote", "v1.1", "superseded"), ("rollback", "v1.0", "confirmed")]
    assert site.served() == "v1.0"


def test_no_transaction_is_open_while_the_server_is_spoken_to(site, monkeypatch):
    real = pointer.Pointer.publish

    def publish(self, target):
        with db.writing(site.engine) as connection:
            alarms.raise_alarm(connection, AGENT, "other", "somebody else writes meanwhile", {}, site.now)
        real(self, target)

    monkeypatch.setattr(pointer.Pointer, "publish", publish)
    site.promote("v1.0")
    site.advance()
    assert site.last()["state"] == "confirmed"


def test_a_server_that_forgot_is_told_again(site):
    site.promote("v1.0")
    site.advance()
    (site.folder / "served.json").write_text('{"digest": "sha256:0"}')
    site.reconcile()
    assert site.served() == "v1.0"
    assert site.alarms() == {}


def test_a_server_that_can_t_be_put_right_is_alarmed_until_it_is(site):
    (site.folder / "served.json").write_text('{"digest": "sha256:0"}')
    site.configure(command="false")
    for _ in range(2):
        site.reconcile()
    assert "v0 is the champion, but it is not served" in site.alarms()["champion_not_served"]
    site.configure()
    site.reconcile()
    assert site.alarms() == {}


def test_a_silent_server_is_alarmed_and_not_restarted(site):
    site.configure(confirm_command="false", command=f"touch {site.folder}/restarted")
    site.reconcile()
    assert list(site.alarms()) == ["champion_not_served"]
    assert not (site.folder / "restarted").exists()


class Failing:
    """A publisher of somebody who did not think of everything."""

    def publish(self, target):
        raise RecursionError(target.version)

    def ask(self, target):
        raise RecursionError(target.version)


@pytest.fixture
def two_agents(site):
    """The agents' names and configurations, `adjudication` and `scribe`; both have v0 in service and v1.0 waiting to be."""
    scribe = site.agent.model_copy(update={"name": "scribe"})
    with db.writing(site.engine) as connection:
        register(connection, site.folder / "scribe", 1, site.now, agent="scribe")
    both = {AGENT: site.agent, "scribe": scribe}
    deployments.advance(site.engine, both, site.now)
    return both


def test_a_publisher_that_fails_in_its_own_way_holds_up_no_other_agent(site, two_agents, monkeypatch):
    choose = publisher.choose
    monkeypatch.setattr(publisher, "choose", lambda agent: Failing() if agent.name == AGENT else choose(agent))
    with db.writing(site.engine) as connection:
        for name in two_agents:
            deployments.promote(connection, name, "v1.0", "ann", "better", site.now)
    with structlog.testing.capture_logs() as logged:
        deployments.advance(site.engine, two_agents, site.now)
    assert {(line["agent"], line["error"]) for line in logged if line["event"] == "publisher_failed"} == {(AGENT, "RecursionError")}
    with db.reading(site.engine) as connection:
        assert registry.in_force(connection, AGENT)["state"] == "requested"
        assert registry.in_force(connection, "scribe")["state"] == "confirmed"
    deployments.advance(site.engine, two_agents, site.now + timedelta(seconds=61))
    assert site.champion() == "v0", "a promotion that can't be confirmed is taken back, whatever stands in its way"
    assert "failed (RecursionError)" in site.alarms()["promotion_reverted"]


def test_reconciling_goes_on_past_a_publisher_that_fails(site, two_agents, monkeypatch):
    choose = publisher.choose
    monkeypatch.setattr(publisher, "choose", lambda agent: Failing() if agent.name == AGENT else choose(agent))
    (site.folder / "served.json").write_text('{"digest": "sha256:0"}')
    deployments.reconcile(site.engine, two_agents, site.now + timedelta(seconds=60))
    assert list(site.alarms()) == ["champion_not_served"]
    assert site.served() == "v0"


def test_a_server_is_told_again_when_the_base_is_to_be_held_otherwise(site):
    site.promote("v1.0")
    site.advance()
    in_4bit = site.agent.model_copy(update={"training": spec.Options(method="qlora")})
    deployments.reconcile(site.engine, {AGENT: in_4bit}, site.now + timedelta(seconds=60))
    told = json.loads((site.folder / "served.json").read_text())
    assert (told["version"], told["in_4bit"]) == ("v1.0", True)
    assert site.alarms() == {}


def test_a_database_that_fails_ends_the_work_on_deployments(site):
    site.promote("v1.0")
    with db.writing(site.engine) as connection:
        connection.exec_driver_sql("ALTER TABLE leases RENAME TO gone")
    for work in (site.advance, site.reconcile):
        with pytest.raises(DBAPIError):
            work()


@pytest.mark.parametrize("body", [b"[" * 99_000, b'{"adapter_digest": "\\ud800"}', b'{"adapter_digest": "\\u0000"}', b"\0"])
@pytest.mark.parametrize("kind", ["pointer", "reference"])
def test_a_promotion_is_taken_back_whatever_the_server_answers(site, kind, body):
    with listening(answer(body)) as url:
        site.configure(kind=kind, url=url, confirm="url", command=None)
        site.promote("v1.0")
        site.advance()
        site.advance(seconds=61)
        assert site.history()[1:] == [("promote", "v1.0", "reverted"), ("revert", "v0", "requested")]
        site.advance(seconds=61)
        assert site.last()["state"] == "unconfirmed"
        assert "\0" not in site.last()["detail"]


@pytest.mark.parametrize("body", [b"[" * 99_000, b'{"adapter_digest": "\\ud800"}'])
@pytest.mark.parametrize("kind", ["pointer", "reference"])
def test_reconciling_alarms_whatever_the_server_answers(site, kind, body):
    with listening(answer(body)) as url:
        site.configure(kind=kind, url=url, confirm="url", command=None)
        site.reconcile()
    assert list(site.alarms()) == ["champion_not_served"]


def test_an_open_alarm_names_the_version_that_it_is_about_now(site):
    for version in ("v1.0", "v1.1", "v1.2"):
        site.promote(version)
        site.advance()
    site.configure(command="false")
    for back in ("v1.1", "v1.0"):
        site.rollback(to=back)
        for _ in range(2):
            site.advance(seconds=100)
        assert site.alarms()["rollback_unconfirmed"].startswith(f"{back} is not confirmed by its server: ")
    with db.reading(site.engine) as connection:
        [alarm] = alarms.list_open(connection)
        assert alarm["detail"] == {"deployment": site.last()["id"], "version": "v1.0"}
        assert [row["kind"] for row in ledger.show(connection, limit=50)].count("alarm") == 1


def test_an_alarm_of_a_champion_says_what_its_server_answers_now(site):
    site.configure(confirm_command="false")
    site.reconcile()
    assert "ended with status 1" in site.alarms()["champion_not_served"]
    site.configure(confirm_command="/no/such")
    site.reconcile()
    assert "can't be started" in site.alarms()["champion_not_served"]


@pytest.mark.parametrize("kind", ["pointer", "reference"])
def test_waiting_for_a_server_that_drips_ends_with_the_time(site, kind):
    site.promote("v1.0")
    site.advance()
    with listening(drip()) as url:
        site.configure(kind=kind, url=url, confirm="url", command=None, timeout_seconds=1)
        site.now = datetime.now(UTC)
        deployment = site.rollback()
        began = time.monotonic()
        row = deployments.await_settled(site.engine, site.agent, deployment, lambda: datetime.now(UTC))
        assert time.monotonic() - began < 3
    assert (row["state"], "does not answer within 1 s" in row["detail"]) == ("unconfirmed", True)
    with db.reading(site.engine) as connection:
        assert leases.holder_of(connection, f"deploy:{AGENT}", datetime.now(UTC)) is None


def test_reconciling_leaves_alone_what_is_under_way_and_who_can_t_be_asked(site):
    site.promote("v1.0")
    site.reconcile()
    assert site.served() == "v0"
    site.configure(confirm="none")
    site.advance()
    before = site.history()
    site.reconcile()
    assert (site.history(), site.alarms()) == (before, {})


def test_a_version_without_the_verdict_promote_needs_force_and_a_reason(site, tmp_path):
    with db.writing(site.engine) as connection:
        waiting = registry.register(connection, AGENT, make_made(tmp_path, 7), site.now)
        bad = registry.register(connection, AGENT, make_made(tmp_path, 8), site.now)
        registry.give_verdict(connection, AGENT, bad, "reject", ["It is worse."], site.now)
    for version, why in ((waiting, "has no verdict yet"), (bad, "has the verdict reject")):
        for force, reason in ((False, "sure"), (True, " ")):
            with pytest.raises(deployments.PromotionRefusedError, match=why):
                site.promote(version, force=force, reason=reason)
    site.promote(bad, force=True, reason="the board wants it")
    with db.reading(site.engine) as connection:
        row = registry.read(connection, AGENT, bad)
    assert (row["is_forced"], row["verdict"]) == (True, "reject")
    assert site.last()["is_forced"]


def test_force_marks_nothing_that_was_judged_fit(site):
    site.promote("v1.0", force=True)
    assert not site.last()["is_forced"]


def test_what_can_t_be_promoted_is_refused(site):
    with pytest.raises(deployments.PromotionRefusedError, match="is the champion of adjudication already"):
        site.promote("v0", force=True)
    with pytest.raises(registry.UnknownVersionError):
        site.promote("v9.9")


def test_what_can_t_be_gone_back_to_is_refused(site):
    with pytest.raises(deployments.RollbackRefusedError, match="no version before v0"):
        site.rollback()
    site.promote("v1.0")
    with pytest.raises(deployments.RollbackRefusedError, match="already"):
        site.rollback(to="v1.0")
    with pytest.raises(deployments.RollbackRefusedError, match=r"v1.1 was never in service.*ratchet promote v1.1"):
        site.rollback(to="v1.1")
    with pytest.raises(registry.UnknownVersionError):
        site.rollback(to="v9.9")


def test_what_was_gone_back_from_is_only_promoted_again(site):
    site.promote("v1.1", force=True, reason="a drill")
    site.rollback()
    with pytest.raises(deployments.RollbackRefusedError, match=r"v1.1 was gone back from: use `ratchet promote v1.1`"):
        site.rollback(to="v1.1")
    site.promote("v1.0")
    with pytest.raises(deployments.RollbackRefusedError, match=r"`ratchet promote v1.1` or go back to v0"):
        site.rollback(to="v1.1")
    site.promote("v1.1", force=True, reason="it was an error")
    site.rollback(to="v0")
    assert [row[:2] for row in site.history()][-2:] == [("promote", "v1.1"), ("rollback", "v0")]


@pytest.mark.parametrize("reason", ["", "  "])
def test_a_rollback_without_a_reason_is_refused(site, engine, reason):
    site.promote("v1.0")
    with pytest.raises(deployments.RollbackRefusedError, match="needs a reason"), db.writing(engine) as connection:
        deployments.rollback(connection, AGENT, "ann", reason, site.now)


def test_agents_that_are_configured_no_more_are_left_alone(site):
    site.promote("v1.0")
    deployments.advance(site.engine, {}, site.now)
    assert site.last()["state"] == "requested"


def test_waiting_ends_with_the_confirmation_or_with_the_time(site):
    deployment = site.promote("v1.0")
    row = deployments.await_settled(site.engine, site.agent, deployment, lambda: site.now)
    assert row["state"] == "confirmed"
    site.configure(command="false")
    deployment = site.rollback()
    clock = iter(site.now + timedelta(seconds=seconds) for seconds in range(0, 1000, 20))
    naps = []
    row = deployments.await_settled(site.engine, site.agent, deployment, lambda: next(clock), naps.append)
    assert (row["state"], len(naps)) == ("unconfirmed", 3)
