"""The reviews over HTTP: for a foreign review page, or an expert's own client."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from consumers import schemas
from daemon.web import access, desk, problems
from daemon.web.site import SiteHere
from storage import db, reviews

router = APIRouter(prefix="/v1/reviews", tags=["reviews"])
ReviewId = Annotated[str, Path(pattern="^[0-7][0-9A-HJKMNP-TV-Z]{25}$", description="The review's id.")]


class Given(BaseModel):
    """An expert's answer to the case on lease to them."""

    model_config = ConfigDict(extra="forbid")
    answer: schemas.Label
    rationale: schemas.Text | None = None
    seconds_spent: Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)] | None = None


class Skip(BaseModel):
    """Why an expert gives a case back."""

    model_config = ConfigDict(extra="forbid")
    reason: Annotated[schemas.Text, Field(min_length=1, max_length=1000)]


class Queued(BaseModel):
    """A review in the queue, without its contents."""

    id: str
    agent: str
    claim_id: str
    state: str
    reasons: list[str]
    priority: float
    is_blind: bool
    exam: str | None
    opened_at: datetime
    expires_at: datetime | None
    leased_by: str | None
    lease_until: datetime | None


@contextmanager
def translated(review: str) -> Iterator[None]:
    """What can be wrong with a review, as HTTP says it."""
    try:
        yield
    except desk.UnknownReviewError as error:
        raise problems.RequestRefusedError(404, "id", review, str(error)) from error
    except reviews.ReviewClosedError as error:
        raise problems.RequestRefusedError(409, "id", review, str(error)) from error
    except desk.AnswerRefusedError as error:
        raise problems.refuse(422, error.refusal) from error


def check_agent(site: SiteHere, agent: Annotated[str | None, Query(description="Only cases of this agent.")] = None) -> str | None:
    """The agent that was asked for; one that is not there has no empty queue, but is refused by name."""
    if agent is not None and agent not in site.agents:
        raise problems.RequestRefusedError(422, "agent", schemas.shorten(agent), f"use one of {', '.join(site.agents)}")
    return agent


AgentFilter = Annotated[str | None, Depends(check_agent)]


@router.get("", responses=problems.describe(401, 403, 422))
def list_queue(site: SiteHere, _: access.Operator, agent: AgentFilter, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> list[Queued]:
    """The queue, most urgent first."""
    with db.reading(site.engine) as connection:
        return [Queued.model_validate(dict(row)) for row in reviews.list_live(connection, agent, limit)]


@router.get("/next", responses={204: {"description": "Nothing waits for this expert."}, **problems.describe(401, 403, 422)})
def take_next(site: SiteHere, caller: access.Reviewer, agent: AgentFilter) -> desk.Case:
    """Lease the next case: it is shown to nobody else until it is answered, skipped, or the lease runs out."""
    case = site.desk.take_next(caller, agent)
    return case or Response(status_code=204)  # type: ignore[return-value]  # FastAPI passes a response on as it is


@router.get("/{id}", responses=problems.describe(401, 403, 404, 422))
def look_at(id: ReviewId, site: SiteHere, caller: access.Reader) -> desk.Case:  # noqa: A002  the name in the address
    """One review, as the caller may see it."""
    with translated(id):
        return site.desk.look_at(id, caller)


@router.post("/{id}/answer", status_code=202, responses=problems.describe(400, 401, 403, 404, 409, 413, 422))
def answer(id: ReviewId, given: Given, site: SiteHere, caller: access.Reviewer) -> desk.Answered:  # noqa: A002  as above
    """Answer a case that nobody else has; answering again changes the answer, and both are kept."""
    with translated(id):
        done = site.desk.answer(id, caller, given.answer, given.rationale or None, given.seconds_spent, "api")
    site.metrics.events.labels(schemas.LABEL, done.outcome).inc()
    return done


@router.post("/{id}/skip", status_code=204, responses=problems.describe(400, 401, 403, 404, 409, 413, 422))
def skip(id: ReviewId, given: Skip, site: SiteHere, caller: access.Reviewer) -> None:  # noqa: A002  as above
    """Give the case back; it is not shown to the caller again."""
    with translated(id):
        site.desk.skip(id, caller, given.reason)


@router.post("/{id}/reveal", responses=problems.describe(401, 403, 404, 409, 422))
def reveal(id: ReviewId, site: SiteHere, caller: access.Reviewer) -> desk.Case:  # noqa: A002  as above
    """Show the model's answer before the caller's own; that they looked is recorded. A blind review refuses."""
    with translated(id):
        return site.desk.reveal(id, caller)
