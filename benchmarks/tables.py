"""Big tables: how fast events are handled and what is asked most is answered, with 10 thousand predictions stored and with 10 million.

Both databases are filled by one statement a table, which the database itself makes the rows of. One in twenty predictions was reviewed,
one in a thousand waits for an expert. Every statement that is timed is explained as well: a scan of a whole big table is told.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import orjson
import structlog
from rich.console import Console
from sqlalchemy import Connection, Engine, event, text

from benchmarks.figures import Figure, finish
from consumers import delivery, handlers, rules, schemas, windows
from daemon import agents, status
from daemon.prompts import PromptFile
from storage import db, events, labels, predictions, reviews, schema
from tests.event_fixtures import LABELS, PRODUCER, make_agent, make_prediction
from tests.postgres_fixtures import Server

AGENT, BATCH, SMALL, WARMING = "adjudication", 500, 10_000, 20
NOTE = "The member has used multiple daily injections for eight years; HbA1c was 8.9 percent before the change. " * 3
BIG = ("events", "predictions", "reviews", "labels", "review_steps")
console = Console(stderr=True)

NUMBERS = {
    "sqlite": "(WITH RECURSIVE n(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n) AS n",
    "postgresql": "(SELECT generate_series({first}, {last}) AS i) AS n",
}
KEY = {"sqlite": "printf('%026d', i)", "postgresql": "lpad(i::text, 26, '0')"}
AT = {"sqlite": "{begin} + i * 1000000", "postgresql": "to_timestamp({begin} / 1000000.0) + i * interval '1 second'"}
WORDS = {"sqlite": {"false": "0", "json": "TEXT"}, "postgresql": {"false": "false", "json": "json"}}
DATA = """{{"prediction_id":"old' || i || '","agent":"adjudication","claim_id":"oldc' || i || '","input":{{"note":"{note}"}}}}"""
FILL = (
    """INSERT INTO events
    (ulid, source, event_id, type, subject, time, received_at, data, digest, state, handled_at)
    SELECT {key}, 'node-1', 'old' || i, 'ratchet.prediction.made.v1', 'adjudication/oldc' || i, {at}, {at}, '{data}', {key}, 'handled', {at}
    FROM {numbers}""",
    """INSERT INTO predictions
    (id, agent, prediction_id, claim_id, group_key, origin, input_digest, attributes, decision, confidence, model_version,
    occurred_at, received_at, policy_version, reasons, priority, effective_threshold, inclusion_probability)
    SELECT {key}, 'adjudication', 'old' || i, 'oldc' || i, 'member' || i % 100000, 'served', {key},
    '{{"region":"west"}}', 'APPROVED', 0.5 + i % 49 * 0.01, 'v1.0', {at}, {at}, 1,
    CAST(CASE WHEN i % 20 = 0 THEN '["below_threshold"]' ELSE '[]' END AS {json}), 0.5, 0.7, 1.0 FROM {numbers}""",
    """INSERT INTO reviews
    (id, agent, prediction, claim_id, reasons, priority, state, is_blind, opened_at, closed_at)
    SELECT {key}, 'adjudication', {key}, 'oldc' || i, '["below_threshold"]', 0.3 + i % 21 * 0.01,
    CASE WHEN i % 1000 = 0 THEN 'open' ELSE 'answered' END, {false}, {at}, CASE WHEN i % 1000 = 0 THEN NULL ELSE {at} END
    FROM {numbers} WHERE i % 20 = 0""",
    """INSERT INTO labels
    (id, agent, claim_id, prediction, review, expert, kind, answer, answered_at, received_at, dataset)
    SELECT {key}, 'adjudication', 'oldc' || i, {key}, {key}, 'ann', 'review', 'DENIED', {at}, {at},
    CASE WHEN i > {last} - 2000 THEN NULL ELSE 1 END FROM {numbers} WHERE i % 20 = 0 AND i % 1000 <> 0""",
    """INSERT INTO review_steps (review, at, actor, action, is_unsent)
    SELECT {key}, {at}, 'ratchet', 'opened', {false} FROM {numbers} WHERE i % 20 = 0""",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000, help="how many predictions, each with its event, the big tables hold")
    parser.add_argument("--batches", type=int, default=40, help="how many batches of 500 events are handled at each size")
    parser.add_argument("--databases", nargs="+", default=["postgresql", "sqlite"], choices=list(NUMBERS))
    parser.add_argument("--folder", type=Path, help="where the databases are made and removed; about 2.5 GB for each million rows")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    figures = []
    for kind in asked.databases:
        with opened(kind, asked.folder, (SMALL, asked.rows)) as engines:
            figures += measure(kind, engines, asked.batches)
    finish("tables", figures)


@contextlib.contextmanager
def opened(kind: str, parent: Path | None, sizes: Sequence[int]) -> Iterator[dict[int, Engine]]:
    """A fresh database of this kind for each size, with the settings that a user would have; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ratchet-tables-", dir=parent))
    folder.chmod(0o711)
    server = Server(folder / "pg")
    engines = {}
    try:
        if kind == "postgresql":
            server.call("start", "shared_buffers=512MB", "max_wal_size=4GB", "maintenance_work_mem=256MB")
        for size in sizes:
            if kind == "postgresql":
                server.execute(f"CREATE DATABASE tables_{size}")
            url = server.url(f"tables_{size}") if kind == "postgresql" else f"sqlite:///{folder}/{size}.db"
            engines[size] = db.open_engine(url)
            schema.upgrade(engines[size])
        yield engines
        for engine in engines.values():
            engine.dispose()
    finally:
        if kind == "postgresql":
            server.call("wipe")
        shutil.rmtree(folder)


def measure(kind: str, engines: Mapping[int, Engine], batches: int) -> list[Figure]:
    """Every figure of the big database against the same of the small one; events they handle by turns."""
    found: dict[int, dict[str, float]] = {}
    for size, engine in engines.items():
        began = time.monotonic()
        fill(engine, 1, size)
        console.print(f"{kind}: {size} predictions, filled in {time.monotonic() - began:.0f} s")
        for batch in range(WARMING):
            handle(engine, f"first-{batch}")
        found[size] = time_questions(engine, size) | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        engine.dispose()  # the process would go on holding the pages of both
    took = [[handle(engine, f"then-{batch}") for engine in engines.values()] for batch in range(batches)]
    handled_small, handled_big = (BATCH / median(times) for times in zip(*took, strict=True))
    small, big = found.values()
    rows = max(engines)
    figures = [Figure(f"{kind}: events handled/s with {rows:,} stored, against {SMALL:,}", handled_big, handled_small, at_least=0.9)]
    figures += [Figure(f"{kind}: {name}, ms", big[name], small[name]) for name in QUESTIONS]
    return [*figures, Figure(f"{kind}: memory of the process, MiB", big["memory"], small["memory"], at_most=1.1)]


def fill(engine: Engine, first: int, last: int) -> None:
    """Bring the tables to `last` predictions, in pieces: a transaction of millions of rows would fill the disk with its log."""
    kind = engine.dialect.name
    begin = int((datetime.now(UTC) - timedelta(seconds=last)).timestamp() * 1e6)
    names = {"key": KEY[kind], "at": AT[kind].format(begin=begin), "note": NOTE, "data": DATA.format(note=NOTE), **WORDS[kind]}
    for start in range(first, last + 1, 250_000):
        end = min(start + 249_999, last)
        with engine.connect().execution_options(writes=True) as connection, connection.begin():
            if kind == "postgresql":
                connection.execute(text("SET LOCAL session_replication_role = replica"))  # the references are right: don't look each up
                connection.execute(text("SET LOCAL synchronous_commit = off"))
            for statement in FILL:
                sql = statement.format(**names, last=last, numbers=NUMBERS[kind].format(first=start, last=end))
                connection.exec_driver_sql(sql.replace("%", "%%") if kind == "postgresql" else sql)
    if kind == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
    schema.analyze(engine)
    engine.dispose()  # the daemon's connections are opened anew now and then


def make_new(name: str, number: int, now: datetime) -> dict[str, Any]:
    changes = {"prediction_id": name, "claim_id": name, "input": {"note": NOTE}, "confidence": 0.6 + number % 40 / 100}
    return make_prediction(number, now, **changes) | {"id": name}


def handle(engine: Engine, name: str) -> float:
    """The seconds in which a batch of events is checked, stored, routed, opened for review and committed."""
    now, agent = datetime.now(UTC), {AGENT: make_agent(budget_share=0.1)}
    body = orjson.dumps([make_new(f"{name}-{number}", number, now) for number in range(BATCH)])
    began = time.perf_counter()
    items = schemas.parse(body, schemas.PREDICTION)
    with db.writing(engine, alone=False) as connection:
        _, new = delivery.deliver_as(connection, items, {AGENT: LABELS}, PRODUCER, now, "handled")
        handlers.handle_new(connection, new, agent, now)
    return time.perf_counter() - began


def ask_status(engine: Engine, _: int) -> None:
    agent = agents.Agent(name=AGENT, labels=LABELS, prompt=PromptFile(text="{{ input }}"))
    status.collect(engine, {AGENT: agent}, datetime.now(UTC))


def ask_next_review(engine: Engine, _: int) -> None:
    with contextlib.suppress(InterruptedError), db.writing(engine) as connection:
        assert reviews.lease_next(connection, [AGENT], "ben", datetime.now(UTC), timedelta(minutes=15)) is not None
        raise InterruptedError  # the case stays in the queue


def ask_window(engine: Engine, _: int) -> None:
    with db.reading(engine) as connection:
        windows.read_window(connection, AGENT, rules.RoutingPolicy(budget_share=0.1), {})


def ask_waiting_labels(engine: Engine, _: int) -> None:
    with db.writing(engine, alone=False) as connection:
        labels.count_fresh(connection, AGENT)
        events.read_waiting(connection, [f"{AGENT}/c{number}" for number in range(BATCH)])


def ask_why(engine: Engine, rows: int) -> None:
    with db.reading(engine) as connection:
        [prediction] = predictions.of_claim(connection, f"oldc{rows // 40 * 20}", AGENT)
        labels.of_predictions(connection, [prediction["id"]])
        labels.of_claim(connection, prediction["claim_id"], AGENT)
        for review in reviews.of_prediction(connection, prediction["id"]):
            reviews.history(connection, review["id"])


def ask_event(engine: Engine, rows: int) -> None:
    with db.reading(engine) as connection:
        assert events.read(connection, f"{rows // 2:026d}") is not None


QUESTIONS: dict[str, Callable[[Engine, int], None]] = {
    "status": ask_status,
    "next review": ask_next_review,
    "routing window": ask_window,
    "labels that wait": ask_waiting_labels,
    "why": ask_why,
    "event by its key": ask_event,
}


def time_questions(engine: Engine, rows: int) -> dict[str, float]:
    """The median of 15 answers to each question, in ms; what it reads whole is told."""
    answers = {}
    for name, ask in QUESTIONS.items():
        explain(engine, name, ask, rows)
        took = []
        for _ in range(15):
            began = time.perf_counter()
            ask(engine, rows)
            took.append((time.perf_counter() - began) * 1000)
        answers[name] = median(took)
        console.print(f"  {name}: {answers[name]:.2f} ms")
    return answers


def explain(engine: Engine, name: str, ask: Callable[[Engine, int], None], rows: int) -> None:
    """Tell each statement of a question that reads a whole big table."""
    asked: list[tuple[str, Any]] = []

    def note(_: Connection, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    ask(engine, rows)
    event.remove(engine, "before_cursor_execute", note)
    how, scan = ("EXPLAIN ", "Seq Scan on ") if engine.dialect.name == "postgresql" else ("EXPLAIN QUERY PLAN ", "SCAN ")
    with engine.connect() as connection:
        for statement, parameters in asked:
            if not statement.lstrip().startswith(("SELECT", "UPDATE", "DELETE")):
                continue
            plan = [str(row[-1]).strip() for row in connection.exec_driver_sql(how + statement, parameters)]
            whole = [line for line in plan for table in BIG if f"{scan}{table}" in line and "INDEX" not in line]
            if whole and rows > SMALL:
                console.print(f"  {name} reads a whole table: {whole[0]}\n    {' '.join(statement.split())[:300]}")


if __name__ == "__main__":
    main()
