"""The two applications: the one that everybody talks to, and the small one for operations that every role serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from importlib import metadata
from typing import Any

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.staticfiles import StaticFiles
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as RoutingError

from consumers import embedded, rules
from daemon.settings import Settings
from daemon.web import access, desk, drafts, events, health, intake, limits, pages, problems, reviews, sessions
from daemon.web.metrics import Metrics
from daemon.web.site import Site
from daemon.web.traffic import Traffic
from storage import db, tokens

TEXT = """Predictions come in, unsure ones become reviews, experts' answers become labels. Events are CloudEvents 1.0.
Every refusal names the field, the value and the remedy."""

log = structlog.get_logger()
OURS = ("/v1/", "/openapi.json", "/healthz", "/readyz", "/metrics")


def create_app(
    engine: Engine,
    settings: Settings,
    agents: Mapping[str, rules.Agent],
    clock: Callable[[], datetime],
    on_stored: Callable[[], None],
    metrics: Metrics | None = None,
    counters: embedded.Counters | None = None,
) -> FastAPI:
    """The API, the review page, the status page, and health.

    With `counters` events are handled as they come in; without, `on_stored` is called in the event loop after they were committed.
    """
    metrics = metrics or Metrics(engine, settings.agents, clock)
    leases = {name: timedelta(seconds=settings.agents[name].review.lease_seconds) for name in agents}
    with db.reading(engine) as connection:
        key = tokens.derive_key(connection, "session")
    site = Site(
        engine=engine,
        agents=settings.agents,
        clock=clock,
        on_stored=on_stored,
        doorkeeper=access.Doorkeeper(engine, clock),
        intake=intake.Intake(engine, agents, clock, counters),
        desk=desk.Desk(engine, agents, leases, clock),
        sessions=sessions.Sessions(key, clock),
        metrics=metrics,
    )

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        yield
        site.intake.close()

    app = _create(engine, metrics, lifespan=live, openapi_url="/openapi.json")
    app.state.site = site
    for router in (events.router, reviews.router, health.router, pages.router):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=pages.FOLDER / "static"))
    app.add_exception_handler(sessions.LoginNeededError, pages.ask_to_log_in)
    app.add_exception_handler(sessions.FormOutdatedError, _show_again)
    app.add_middleware(limits.BodyLimit, max_bytes=settings.server.max_body_bytes)
    app.add_middleware(Traffic, metrics=metrics)  # added last, so it is outermost
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def create_ops_app(engine: Engine, metrics: Metrics) -> FastAPI:
    """Health and metrics alone, for the ops port."""
    app = _create(engine, metrics, openapi_url=None)
    app.include_router(health.router)
    app.add_middleware(Traffic, metrics=metrics)
    return app


def _create(engine: Engine, metrics: Metrics, **options: Any) -> FastAPI:
    """An application whose refusals all have one form; no page of it loads anything from elsewhere."""
    app = FastAPI(
        title="Ratchet",
        description=TEXT,
        version=metadata.version("ratchet-daemon"),
        docs_url=None,
        redoc_url=None,
        **options,
    )
    app.state.engine, app.state.metrics = engine, metrics
    for kind in (RoutingError, RequestValidationError, *db.UNAVAILABLE):
        app.add_exception_handler(kind, _refuse)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    status, problem = problems.find_problem(error, request)
    headers = dict(getattr(error, "headers", None) or {})
    if status == 503:  # noqa: PLR2004
        headers["Retry-After"] = "5"
        log.error("database_unavailable", why=db.explain(error))
    if "text/html" in request.headers.get("accept", "") and not request.url.path.startswith(OURS):
        return pages.render_problem(request, status, problem)
    return problems.to_json(status, problem, headers)


async def _show_again(request: Request, error: Exception) -> Response:
    if drafts.find(request).text:
        return await run_in_threadpool(pages.show_again, request, request.app.state.site)
    return await _refuse(request, error)


def _describe(app: FastAPI) -> dict[str, Any]:
    """OpenAPI, with the schemas of events, whose bodies no parameter declares."""
    if app.openapi_schema is None:
        told = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        told["components"]["schemas"] |= events.event_schemas()
        app.openapi_schema = told
    return app.openapi_schema
