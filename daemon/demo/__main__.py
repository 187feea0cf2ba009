"""The whole loop in a few minutes, on real decisions, with a real daemon: `python -m daemon.demo --out DIR`."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from consumers import broker
from daemon import config
from daemon.demo import backends, chronicle, clients, home, servers, story
from daemon.demo.home import AGENT, Home
from daemon.demo.loop import Loop, OutcomeDiffersError
from daemon.demo.screen import Screen

SEED = 1
FAILURES = (
    OutcomeDiffersError,
    servers.CommandFailedError,
    clients.NotHandledError,
    home.FolderTakenError,
    backends.BackendMissingError,
    broker.BrokerError,
    httpx.HTTPError,
)


def main() -> int:
    """Run the demo; 0 when everything came as it should, 1 when an outcome differed, 130 when it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m daemon.demo", description="The whole loop in a few minutes, on real decisions.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-run"), metavar="DIR", help="the demo's folder; an earlier demo's is replaced"
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the base and of all trainings (default: {SEED})")
    parser.add_argument("--kafka", action="store_true", help="over a Kafka broker and on a PostgreSQL server, which it starts itself")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    screen = Screen()
    try:
        _perform(asked.out, asked.kafka, asked.seed, screen)
    except FAILURES as error:
        screen.console.print(f"\n[bold red]The demo did not come out as it should:[/] {error}", markup=True)
        screen.console.print(f"Everything is kept in {asked.out}: daemon.log, node.log, and the runs' logs below runs/.")
        return 1
    except KeyboardInterrupt:
        screen.console.print("\nInterrupted: all processes are stopped.")
        return 130
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _perform(folder: Path, is_streamed: bool, seed: int, screen: Screen) -> None:
    if is_streamed:
        backends.check()
    home.clear(folder)
    screen.begin_chapter("1. A folder, real decisions, a small base model")
    with contextlib.ExitStack() as stack:
        sections = _start_backends(folder, screen, stack) if is_streamed else ""
        made = story.prepare(folder, sections, seed, screen)
        loop = stack.enter_context(story.running(made, screen))
        try:
            story.train_first(made, loop, seed)
            story.improve(loop)
            story.spoil(made, loop, seed)
            story.force(made, loop)
        finally:
            if loop.served:
                _tell(made, loop, seed)
        reviewer = servers.run_json("tokens", "add", "you", "--role", "reviewer", "--config", made.config)["token"]
    _show_around(made, screen, reviewer, backends.describe_start(folder) if is_streamed else [])


def _start_backends(folder: Path, screen: Screen, stack: contextlib.ExitStack) -> str:
    with screen.bar("starting Kafka and PostgreSQL"):
        sections = stack.enter_context(backends.started(folder))
    screen.say("a Kafka broker and a PostgreSQL server answer: the one carries predictions, labels and verdicts, the other holds all state")
    return sections


def _tell(made: Home, loop: Loop, seed: int) -> None:
    """What happened, also when it did not end well."""
    loop.screen.begin_chapter("What happened")
    loop.screen.show_table(("what", "outcome", "measured"), chronicle.list_events(loop))
    loop.screen.show_table(("version in service", "claims", "accuracy", "v1.0 on the same"), chronicle.compare_versions(loop.served))
    loop.screen.console.print("ratchet ledger verify: " + servers.run("ledger", "verify", "--config", made.config).strip())
    page = made.folder / "report.html"
    budget = config.load(made.config, {}).agent(AGENT).budget.share or 0.0
    chronicle.write_report(loop, page, seed, budget)
    loop.screen.console.print(f"The curve: {page.absolute()}")


def _show_around(made: Home, screen: Screen, reviewer: str, starts: Sequence[str]) -> None:
    """How to look around; the processes are stopped by now."""
    screen.console.print(f"\nDone in {screen.seconds:.0f} s; all processes are stopped. To look around:\n")
    for line in (
        *(f"  {start}" for start in starts),
        f"  export RATCHET_CONFIG={made.config}",
        f"  {servers.RATCHET} versions list          # also: versions show v1.2, versions history, ledger show, status",
        f"  {servers.RATCHET} up                     # then http://127.0.0.1:{made.port}/review, with the token",
        f"  {reviewer}",
        f"  {sys.executable} -m trainers.serve --base {made.base} --port {made.node_port} --state {made.folder / 'node.json'}",
    ):
        screen.console.print(line, markup=False)


if __name__ == "__main__":
    sys.exit(main())
