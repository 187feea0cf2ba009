"""Whether the process lives, whether it can work, and its metrics: for service managers, load balancers and Prometheus."""

from __future__ import annotations

import shutil
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy import Engine

from daemon import status
from daemon.web import metrics, problems
from storage import db, events

MIN_FREE_BYTES = 1 << 20


class StreamHealth(BaseModel):
    """How Kafka is read: what keeps it if anything does, how many records and messages wait, and for how long.

    `lag` is by topic and partition. Of each daemon: its batches, records and their time since it began, and its last batch.
    """

    problem: str | None
    lag: dict[str, int]
    oldest_seconds: float | None
    backlog: int
    daemons: dict[str, dict[str, Any]]


class Health(BaseModel):
    """That all is well."""

    status: str = "ok"


class Readiness(Health):
    """That we can work. A stream that waits for its broker is told, and is no reason to send nobody here: the rest works."""

    stream: StreamHealth | None


TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
}
router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def show_health() -> Health:
    """Answers while the event loop turns."""
    return Health()


@router.get("/readyz", responses={503: {"model": problems.ProblemBody, "description": "The database is not there, or its disk is full."}})
def show_readiness(request: Request) -> Readiness:
    """Answers well while the database does, and has room for what comes."""
    engine: Engine = request.app.state.engine
    _require_place(engine)
    with db.reading(engine) as connection:
        events.oldest_received_at(connection)
        told = status.describe_stream(connection, request.app.state.metrics.clock())
    return Readiness(stream=StreamHealth(**told) if told else None)


def _require_place(engine: Engine) -> None:
    """Refuse to be ready where the file of an SQLite database is gone, or can't grow."""
    file = db.find_file(engine.url)
    if file is None:
        return
    if not file.exists():
        remedy = "stop the daemon, restore the database from a backup (docs/operations.md), and start it again"
        raise problems.RequestRefusedError(503, "database", f"there is no {file}", remedy)
    if (free := shutil.disk_usage(file.parent).free) < MIN_FREE_BYTES:
        raise problems.RequestRefusedError(503, "database", f"{free} bytes free", f"make room under {file.parent}: nothing can be stored")


@router.get("/metrics", response_class=Response, responses=TEXT)
def show_metrics(request: Request) -> Response:
    """What came in, how requests went, how things stand."""
    told: metrics.Metrics = request.app.state.metrics
    return Response(told.render(), headers={"Content-Type": metrics.CONTENT_TYPE})
