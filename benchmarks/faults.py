"""Faults: a daemon reads Kafka while brokers, databases, disks, clocks and workers fail; what is lost, applied twice or other is counted.

What is done, and what is counted, stands in `tests/fault_fixtures.py`: the tests do the same with shorter time-outs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.figures import Figure, finish
from tests import broker_fixtures, fault_fixtures, postgres_fixtures

Fault = Callable[[fault_fixtures.Trial], None]
LOCKED = "the database locked"
FAULTS: dict[str, Fault] = {
    "a silent broker": fault_fixtures.silence,
    "the broker killed, away for long": fault_fixtures.kill_broker,
    LOCKED: fault_fixtures.lock,
    "a full disk": fault_fixtures.fill_disk,
    "the clock back an hour": fault_fixtures.turn_clock_back,
    "all events twice": fault_fixtures.repeat,
    "a poisoned partition": fault_fixtures.poison,
    "the relay killed": fault_fixtures.kill_relay,
    "the broker killed, away for 10 s": fault_fixtures.interrupt_broker,
    "a consumer killed in a batch": fault_fixtures.kill_consumer,
    "workers and schedulers join and die": fault_fixtures.join_and_die,
}
DISK = "2g"
FEW = 2000


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeated", type=int, default=fault_fixtures.LONG.repeated, help="so many events come twice")
    parser.add_argument("--short", action="store_true", help="with the time-outs of the tests, to try the script")
    parser.add_argument("--consumers", nargs="+", default=["faust", "poll"], choices=["faust", "poll"])
    parser.add_argument("--only", nargs="+", default=list(FAULTS), choices=list(FAULTS), help="these alone, and none of PostgreSQL's")
    asked = parser.parse_args()
    if missing := broker_fixtures.find_missing():
        sys.exit(missing)
    pace = fault_fixtures.SHORT if asked.short else fault_fixtures.LONG
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tallies: dict[str, fault_fixtures.Tally] = {}
    figures: list[Figure] = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (folder / "kafka").mkdir()
        broker = broker_fixtures.make_broker(folder / "kafka")
        stack.callback(broker.kill)
        server = stack.enter_context(postgres_fixtures.running_server())
        progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        of_each = len(asked.only) + 2 * (len(asked.only) == len(FAULTS))
        bar = progress.add_task("", total=len(asked.consumers) * of_each)
        for consumer in asked.consumers:
            paced = fault_fixtures.Pace(**{**vars(pace), "repeated": min(asked.repeated, FEW) if asked.short else asked.repeated})
            for name, tally, trial in suffer_all(folder / consumer, broker, consumer, paced, server, asked.only):
                tallies[f"{consumer}: {name}"] = tally
                if name == LOCKED and not asked.short:
                    figures.append(describe_memory(f"{consumer}: {name}", trial))
                progress.update(bar, description=f"{consumer}: {name}", advance=1)
                progress.console.print(f"{consumer}: {name}: {tally}", markup=False)
    figures = [*describe(tallies), *figures]
    finish("faults", figures)
    sys.exit(any(figure.holds is False for figure in figures))


def suffer_all(
    folder: Path,
    broker: broker_fixtures.Broker,
    consumer: str,
    pace: fault_fixtures.Pace,
    server: postgres_fixtures.Server,
    only: Sequence[str],
) -> Iterator[tuple[str, fault_fixtures.Tally, fault_fixtures.Trial]]:
    """Do everything to a daemon on SQLite, then what concerns the server to one on PostgreSQL."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    with fault_fixtures.small_disk(disk, DISK) as is_mounted:
        trial = fault_fixtures.Trial(folder / f"{consumer}-sqlite", broker, consumer, pace, f"sqlite:///{disk}/ratchet.db")
        with contextlib.closing(trial):
            trial.start("consume", "web", "schedule")
            for name, fault in ((name, FAULTS[name]) for name in only):
                if is_mounted or fault is not fault_fixtures.fill_disk:
                    yield name, suffer(trial, fault), trial
                trial.traffic.is_poisoning = False
    if len(only) < len(FAULTS):
        return
    url = fault_fixtures.make_narrow(server, server.make_database())
    trial = fault_fixtures.Trial(folder / f"{consumer}-postgresql", broker, consumer, pace, url)
    with contextlib.closing(trial):
        trial.start()
        yield "PostgreSQL crashed", suffer(trial, functools.partial(fault_fixtures.crash_server, server=server)), trial
        yield "PostgreSQL without connections", suffer(trial, functools.partial(fault_fixtures.refuse_connections, server=server)), trial


def suffer(trial: fault_fixtures.Trial, fault: Fault) -> fault_fixtures.Tally:
    with trial.traffic.flowing():
        fault(trial)
    return trial.settle()


def describe_memory(name: str, trial: fault_fixtures.Trial) -> Figure:
    """What the consumer takes more while the records wait, against what they would take."""
    return Figure(f"{name}: MiB more taken while records wait, against their size", trial.grown, trial.waited, at_most=0.25)


def describe(tallies: dict[str, fault_fixtures.Tally]) -> list[Figure]:
    """What came so far under each fault, and what of it is not as it should be."""
    figures = []
    for name, tally in tallies.items():
        faults = {**tally.faults, "deaths": 0}
        figures += [
            Figure(f"{name}: acknowledged since the first fault", tally.acknowledged),
            Figure(f"{name}: of them stored", tally.stored),
            Figure(f"{name}: of them parked", tally.parked),
            Figure(f"{name}: lost, applied twice, other than in order, unread, untold or disordered", sum(faults.values()), at_most=0),
            Figure(f"{name}: daemons that ended by themselves and were started again", tally.deaths),
        ]
    return figures


if __name__ == "__main__":
    main()
