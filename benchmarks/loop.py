"""The loop: from a label to a dataset version, from a trigger to a verdict, from a rollback to the server's confirmation.

The pipeline, the trainer (a process for each run) and the reference node are the real ones; experts answer at once, so that what is
measured is the machine's part.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import structlog
from rich.console import Console

from benchmarks.figures import Figure, finish
from benchmarks.training import make_base
from daemon import deployments, imr
from daemon.agents import Exam, Publisher
from daemon.launchers import processes
from storage import datasets, db, exams, registry, reviews, runs, schema
from tests.event_fixtures import handle, make_label, send
from tests.pipeline_fixtures import World, always, make_settings
from trainers import spec

AGENT = "adjudication"
TRUTH = "APPROVED"
"""The answer to every claim that comes in; history knows the other one alone, so that a candidate that learned is sure to differ."""
POLL_SECONDS, GIVE_UP_SECONDS = 0.05, 300
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=1000, help="of history")
    parser.add_argument("--claims", type=int, default=300, help="that teach the candidate, and as many that its exam can draw from")
    parser.add_argument("--repeats", type=int, default=20, help="of the labels and the rollbacks")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        base = make_base(folder, list(imr.read_decisions(2001, 2005))[:400])
        world = make_world(folder, base, stack.enter_context(run_node(base)))
        stack.callback(world.engine.dispose)
        world.import_history(asked.cases, answer="DENIED")
        console.print("training v1.0, which enters service without an exam")
        run_until(world, lambda: champion(world) == "v0")
        world.ask_for_run()
        run_until(world, lambda: champion(world) == "v1.0")
        world.predict(asked.claims, model_version="v1.0", confidence=0.5)
        labels = [time_label(world, number) for number in range(asked.repeats)]
        teach(world, range(asked.repeats, asked.claims))
        world.predict(asked.claims, model_version="v1.0", confidence=0.5)
        console.print(f"label to dataset version: {median(labels):.3f} s; training v1.1")
        verdict, training = time_verdict(world)
        console.print(f"trigger to verdict: {verdict:.1f} s, of which training {training:.1f} s")
        rollbacks = [time_rollback(world) for _ in range(asked.repeats)]
    finish(
        "loop",
        [
            Figure(f"label to dataset version of {asked.cases} cases, s, median", median(labels)),
            Figure("the same, worst", max(labels)),
            Figure("trigger to verdict, experts answering at once, s", verdict),
            Figure("share of it that is training", training / verdict),
            Figure("rollback to confirmed by the reference node, s, median", median(rollbacks), at_most=1),
            Figure("the same, worst", max(rollbacks), at_most=1),
        ],
    )


def make_world(folder: Path, base: Path, node: str) -> World:
    """A loop whose trainer is a process for each run, and whose server is the node."""
    engine = db.open_engine(f"sqlite:///{folder}/ratchet.db")
    schema.upgrade(engine)
    options = spec.Options(learning_rate=2e-3, epochs=3, batch_rows=32)
    publisher = Publisher(kind="reference", url=node)
    settings = make_settings(folder, base, training=options, exam=Exam(max_asked=40), publisher=publisher)
    trainer = processes.Processes(settings.training.python)
    return World(engine, settings, trainer, datetime.now(UTC) - timedelta(hours=1), truth=always(TRUTH))


@contextlib.contextmanager
def run_node(base: Path) -> Iterator[str]:
    """The reference node in a process of its own; yields its address."""
    command = [sys.executable, "-m", "trainers.serve", "--base", str(base), "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as node:
        assert node.stdout is not None
        try:
            yield node.stdout.readline().split()[-1]
        finally:
            node.terminate()


def run_until(world: World, is_reached: Any) -> None:
    """Tick and answer whatever is asked until the condition holds."""
    until = time.monotonic() + GIVE_UP_SECONDS
    while not is_reached():
        if time.monotonic() > until:
            raise SystemExit(f"not reached within {GIVE_UP_SECONDS} s: {describe_standing(world)}")
        world.now = datetime.now(UTC)
        if not world.pipeline.tick(world.now) and not world.answer_all():
            time.sleep(POLL_SECONDS)


def describe_standing(world: World) -> str:
    """What the loop waits for, where it does not come to an end."""
    with db.reading(world.engine) as connection:
        exams_open = [(row["candidate"], row["report"]) for row in exams.list_open(connection, AGENT)]
        under_way = [(row["id"], row["kind"], row["state"]) for row in runs.read_in_state(connection, *runs.LIVE)]
        waiting = reviews.count_live(connection, AGENT)
    return f"runs under way {under_way}, exams open {exams_open}, reviews {waiting}"


def champion(world: World) -> str | None:
    with db.reading(world.engine) as connection:
        return registry.champion(connection, AGENT)


def time_label(world: World, number: int) -> float:
    """Seconds from a label that comes in to a dataset version that holds it."""
    world.now = datetime.now(UTC)
    handler = world.handler
    began = time.perf_counter()
    send(world.engine, [make_truth(number, world.now)], world.now)
    handle(world.engine, handler, world.now)
    datasets.build(world.engine, AGENT, world.settings.storage.snapshots, {}, world.now)
    return time.perf_counter() - began


def teach(world: World, numbers: Iterable[int]) -> None:
    """Late truth for these claims."""
    world.now = datetime.now(UTC)
    send(world.engine, [make_truth(number, world.now) for number in numbers], world.now)
    handle(world.engine, world.handler, world.now)


def make_truth(number: int, at: datetime) -> dict[str, Any]:
    return make_label(number, at, expert="inference-1", kind="late_truth", answer=TRUTH)


def time_verdict(world: World) -> tuple[float, float]:
    """Seconds from a manual trigger to the verdict, and of the training process in it."""
    began = time.perf_counter()
    run = world.ask_for_run()
    run_until(world, lambda: verdict(world, "v1.1") is not None)
    took = time.perf_counter() - began
    with db.reading(world.engine) as connection:
        row = runs.read(connection, run)
    return took, (row["finished_at"] - row["started_at"]).total_seconds()


def verdict(world: World, version: str) -> str | None:
    with db.reading(world.engine) as connection:
        found = registry.find(connection, AGENT, version)
    return found["verdict"] if found else None


def time_rollback(world: World) -> float:
    """Seconds from the decision to roll back to the node's confirmation of the version before."""
    actor, reason = "benchmark", "a rollback is measured"
    with db.reading(world.engine) as connection:
        newer, older = champion(world), registry.predecessor(connection, AGENT)
    began = time.perf_counter()
    with db.writing(world.engine) as connection:
        change = deployments.rollback(connection, AGENT, actor, reason, now_utc())
    row = deployments.await_settled(world.engine, world.agent, change, now_utc)
    took = time.perf_counter() - began
    if row["state"] != "confirmed" or row["version"] != older:
        raise SystemExit(f"the rollback to {older} was not confirmed: {row['state']}, {row['detail']}")
    with db.writing(world.engine) as connection:
        back = deployments.promote(connection, AGENT, str(newer), actor, reason, now_utc(), force=True)
    deployments.await_settled(world.engine, world.agent, back, now_utc)
    return took


def now_utc() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    main()
