"""Ingestion: events accepted and events handled per second over real HTTP, against a bare FastAPI route with a bare `executemany`.

The daemon runs in a process of its own, once with the web role alone (accepted) and once as `ratchet up` runs it (handled: from the
first request until no event is left unhandled); so does the bare route. One client posts batches, one after another.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import multiprocessing
import os
import random
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import harmonic_mean, median, quantiles
from typing import Any

import fastapi
import orjson
import uvicorn
from pydantic import TypeAdapter
from rich.console import Console

from benchmarks.figures import Figure, finish
from consumers import schemas
from storage import db, tokens

NOTE = "The member has used multiple daily injections for eight years; HbA1c was 8.9 percent before the change. "
BATCH_TYPE, SINGLE_TYPE = "application/cloudevents-batch+json", "application/json"
WAIT_SECONDS = 60
console = Console(stderr=True)


@dataclass
class Server:
    """A server to post to, the database it writes, and what was measured of it."""

    port: int
    database: Path
    token: str = ""
    rates: list[float] = field(default_factory=list)

    def post(self, bodies: Sequence[bytes], content_type: str) -> list[float]:
        """Post the bodies one after another on one connection; returns the seconds that each took."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        took = []
        for body in bodies:
            began = time.perf_counter()
            connection.request("POST", "/v1/predictions", body, {"Content-Type": content_type, "Authorization": f"Bearer {self.token}"})
            response = connection.getresponse()
            response.read()
            took.append(time.perf_counter() - began)
            if response.status != fastapi.status.HTTP_202_ACCEPTED:
                raise SystemExit(f"the server answered {response.status}")
        connection.close()
        return took

    def wait_until_handled(self) -> None:
        """Wait until nothing is left to do."""
        with self._reading() as connection:
            while connection.execute("SELECT 1 FROM events WHERE state = 'received' LIMIT 1").fetchone():
                time.sleep(0.01)

    def check_handled(self) -> None:
        """Look through all events, which takes a while, that each was handled."""
        with self._reading() as connection:
            taken = "SELECT state, count(*) FROM events WHERE type = ? GROUP BY state"  # the daemon's own lie there too
            states = dict(connection.execute(taken, [schemas.PREDICTION]).fetchall())
        if set(states) != {"handled"}:
            raise SystemExit(f"not every event was handled: {states}")

    def _reading(self) -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(f"file:{self.database}?mode=ro", uri=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", type=int, default=15_000, help="in a run")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--singles", type=int, default=1000)
    asked = parser.parse_args()
    numbers = itertools.count()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bare = stack.enter_context(serve_bare(Path(folder)))
        web = stack.enter_context(serve_daemon(Path(folder) / "web", "web"))
        whole = stack.enter_context(serve_daemon(Path(folder) / "whole", "web", "consume", "schedule"))
        for server in (bare, web, whole):
            server.post(make_bodies(numbers, 3, asked.batch), BATCH_TYPE)  # the first requests import and compile
        whole.wait_until_handled()
        for run in range(asked.runs):
            for server in (bare, web, whole):
                bodies = make_bodies(numbers, asked.events // asked.batch, asked.batch)
                began = time.perf_counter()
                server.post(bodies, BATCH_TYPE)
                if server is whole:
                    server.wait_until_handled()
                server.rates.append(len(bodies) * asked.batch / (time.perf_counter() - began))
            whole.check_handled()
            told = ", ".join(f"{name} {server.rates[-1]:.0f}" for name, server in (("bare", bare), ("accepted", web), ("handled", whole)))
            console.print(f"run {run + 1}/{asked.runs}: {told} events/s")
        singles = [body[1:-1] for body in make_bodies(numbers, asked.singles, 1)]
        percentiles = quantiles(web.post(singles, SINGLE_TYPE), n=100)
    finish("ingest", [*judge(bare.rates, web.rates, whole.rates), *describe_single(percentiles)])


def judge(bare: list[float], accepted: list[float], handled: list[float]) -> Iterator[Figure]:
    for name, rates, goal in (("accepted", accepted, 0.7), ("handled end to end", handled, 0.4)):
        yield Figure(f"events/s {name}, over all runs", harmonic_mean(rates), harmonic_mean(bare), at_least=goal)
        yield Figure(f"events/s {name}, best run", max(rates), max(bare))
        yield Figure(f"events/s {name}, median run", median(rates), median(bare))
        yield Figure(f"events/s {name}, worst run", min(rates), min(bare))


def describe_single(percentiles: list[float]) -> Iterator[Figure]:
    for percent in (50, 99):
        yield Figure(f"POST of one event, p{percent}, ms", percentiles[percent - 1] * 1000)


def make_bodies(numbers: Iterator[int], count: int, size: int) -> list[bytes]:
    """Batches of new predictions of about 600 bytes, with confidences as a calibrated model has them."""
    return [orjson.dumps([make_event(next(numbers)) for _ in range(size)]) for _ in range(count)]


def make_event(number: int) -> dict[str, Any]:
    drawn = random.Random(number)
    data = {
        "prediction_id": f"p{number}",
        "agent": "adjudication",
        "claim_id": f"c{number}",
        "group": f"member-{number % 5000}",
        "input": {"diagnosis": "E11.9", "treatment": "insulin pump", "age": drawn.randrange(18, 90), "note": NOTE * 2},
        "decision": drawn.choice(("APPROVED", "DENIED")),
        "confidence": round(1 - 0.5 * drawn.random() ** 2, 4),
        "model_version": "adjudication-v1.0",
        "attributes": {"region": drawn.choice(("west", "east"))},
        "occurred_at": datetime.now(UTC).isoformat(),
    }
    return {"specversion": "1.0", "type": schemas.PREDICTION, "source": "node-1", "id": f"p{number}", "data": data}


@contextlib.contextmanager
def serve_daemon(home: Path, *roles: str) -> Iterator[Server]:
    """`ratchet init`, then `ratchet up` with these roles, in a process of its own."""
    ratchet = [sys.executable, "-c", "from daemon import cli; raise SystemExit(cli.main())"]
    subprocess.run([*ratchet, "init", str(home)], check=True, stdout=subprocess.DEVNULL)
    engine = db.open_engine(f"sqlite:///{home}/ratchet.db")
    with db.writing(engine) as connection:
        token = tokens.add(connection, "node-1", "producer", datetime.now(UTC))
    engine.dispose()
    port = find_port()
    settings = {"RATCHET_SERVER__PORT": str(port), "RATCHET_SERVER__OPS_PORT": "0", "RATCHET_LOG__FORMAT": "json"}
    with (home / "log").open("w") as log:
        command = [*ratchet, "up", *(part for role in roles for part in ("--role", role))]
        daemon = subprocess.Popen(command, cwd=home, env={**os.environ, **settings}, stdout=log, stderr=log)
    try:
        wait_for(port)
        yield Server(port, home / "ratchet.db", token)
    finally:
        daemon.terminate()
        daemon.wait()


@contextlib.contextmanager
def serve_bare(folder: Path) -> Iterator[Server]:
    """The baseline in a process of its own."""
    server = Server(find_port(), folder / "bare.db")
    process = multiprocessing.get_context("spawn").Process(target=run_bare, args=(server.port, server.database), daemon=True)
    process.start()
    try:
        wait_for(server.port)
        yield server
    finally:
        process.terminate()
        process.join()


def run_bare(port: int, database: Path) -> None:
    """A route that validates in a thread and stores by one `executemany`; durable, and nothing more."""
    connection = sqlite3.connect(database, check_same_thread=False)
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE events (source TEXT, id TEXT, data TEXT, UNIQUE (source, id))")
    adapter, lock, app = TypeAdapter(list[schemas.PredictionEvent]), threading.Lock(), fastapi.FastAPI()

    def store(body: bytes) -> int:
        rows = [(event["source"], event["id"], orjson.dumps(event["data"]).decode()) for event in adapter.validate_json(body)]
        with lock, connection:
            connection.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?)", rows)
        return len(rows)

    @app.post("/v1/predictions", status_code=fastapi.status.HTTP_202_ACCEPTED)
    async def post_predictions(request: fastapi.Request) -> dict[str, int]:
        return {"accepted": await asyncio.to_thread(store, await request.body())}

    uvicorn.run(app, port=port, log_config=None, access_log=False)


def find_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until somebody listens."""
    until = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < until:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise SystemExit(f"no server came up within {WAIT_SECONDS} s")


if __name__ == "__main__":
    main()
