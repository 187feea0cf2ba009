"""Whether the process lives, whether it can work, and its metrics: for service managers, load balancers and Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel
from sqlalchemy import Engine

from daemon.web import metrics, problems
from storage import db, events


class Health(BaseModel):
    """That all is well."""

    status: str = "ok"


TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
}
router = APIRouter(tags=["operations"])


@router.get("/healthz")
async def show_health() -> Health:
    """Answers while the event loop turns."""
    return Health()


@router.get("/readyz", responses={503: {"model": problems.ProblemBody, "description": "The database is not available."}})
def show_readiness(request: Request) -> Health:
    """Answers well while the database does."""
    engine: Engine = request.app.state.engine
    with db.reading(engine) as connection:
        events.oldest_received_at(connection)
    return Health()


@router.get("/metrics", response_class=Response, responses=TEXT)
def show_metrics(request: Request) -> Response:
    """What came in, how requests went, how things stand."""
    told: metrics.Metrics = request.app.state.metrics
    return Response(told.render(), headers={"Content-Type": metrics.CONTENT_TYPE})
