"""The door for events: single, in a batch or line by line; answered after they are durably stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, cast

import orjson
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, TypeAdapter

from consumers import delivery, schemas
from daemon.web import access, intake, problems
from daemon.web.site import Site, SiteHere
from storage import db, events, predictions, tokens

FORMS: dict[str, intake.Form] = {
    "application/cloudevents+json": "single",
    "application/json": "single",
    "application/cloudevents-batch+json": "batch",
    "application/x-ndjson": "lines",
}
STATUSES = {"stored": 202, "duplicate": 202, "conflict": 409, "forbidden": 403, "refused": 422}
REF = "#/components/schemas/{model}"

router = APIRouter(tags=["events"])
Ulid = Annotated[str, Path(pattern="^[0-7][0-9A-HJKMNP-TV-Z]{25}$", description="The key that Ratchet gave.", examples=["01JNB2Y6T0"])]


class Receipt(BaseModel):
    """What became of one event: stored, or a duplicate of one that was stored before."""

    ulid: str
    outcome: str


class ItemResult(BaseModel):
    """What became of one event of several; `error` where it was not stored."""

    outcome: str
    ulid: str | None = None
    error: problems.Problem | None = None


class BatchReceipt(BaseModel):
    """What became of each event, in order; the good ones are stored."""

    accepted: int
    refused: int
    results: list[ItemResult]


class Refused(BaseModel):
    """A refusal: of one event, or of every event of a batch."""

    error: problems.Problem | None = None
    accepted: int | None = None
    refused: int | None = None
    results: list[ItemResult] | None = None


class Routing(BaseModel):
    """How a prediction was routed."""

    reasons: list[str]
    priority: float
    effective_threshold: float | None
    inclusion_probability: float | None
    policy_version: int | None


class EventStatus(BaseModel):
    """What became of an event."""

    ulid: str
    source: str
    id: str
    type: str
    subject: str
    state: str
    reason: str | None
    received_at: datetime
    handled_at: datetime | None
    routing: Routing | None


def document(model: Any) -> dict[str, Any]:
    """What OpenAPI says of a body that is read as it is: one event of a type, several, or one on each line."""
    one = {"$ref": REF.format(model=model.__name__)}
    several = {"type": "array", "items": one, "maxItems": intake.MAX_ITEMS}
    lines = {"type": "string", "description": "One event on each line."}
    shapes = {"single": one, "batch": several, "lines": lines}
    return {"requestBody": {"required": True, "content": {name: {"schema": shapes[form]} for name, form in FORMS.items()}}}


def event_schemas() -> dict[str, Any]:
    """The schemas that `document` refers to, for OpenAPI's components."""
    found: dict[str, Any] = {}
    for model in (schemas.PredictionEvent, schemas.LabelEvent):
        schema = TypeAdapter(model).json_schema(ref_template=REF)
        found |= schema.pop("$defs", {}) | {model.__name__: schema}
    return found


RESPONSES: dict[int | str, dict[str, Any]] = {
    202: {"model": Receipt | BatchReceipt, "description": "Durably stored."},
    **problems.describe(400, 401, 403, 409, 413, 415),
    422: {"model": Refused, "description": "The event, or every event, is wrong; the problem names the field."},
}


@router.post("/v1/predictions", status_code=202, responses=RESPONSES, openapi_extra=document(schemas.PredictionEvent))
async def post_predictions(request: Request, site: SiteHere, caller: access.Producer) -> Response:
    """Take what a model said about claims in production."""
    return await _take(request, site, caller, schemas.PREDICTION)


@router.post("/v1/labels", status_code=202, responses=RESPONSES, openapi_extra=document(schemas.LabelEvent))
async def post_labels(request: Request, site: SiteHere, caller: access.Anyone) -> Response:
    """Take what experts, or later decisions, say about claims; the kind of label decides which role may send it."""
    return await _take(request, site, caller, schemas.LABEL)


@router.get("/v1/events/{ulid}", responses=problems.describe(401, 403, 404, 422))
def show_event(ulid: Ulid, site: SiteHere, caller: access.Anyone) -> EventStatus:
    """Say what became of an event; a reviewer is not told how a case was routed, for that hints at the model's answer."""
    with db.reading(site.engine) as connection:
        event = events.read(connection, ulid)
        if event is None:
            raise problems.RequestRefusedError(404, "ulid", ulid, "there is no such event: use the ulid that the POST answered with")
        routed = predictions.read(connection, ulid) if caller.role != "reviewer" else None
    fields = {name: getattr(event, name) for name in EventStatus.model_fields.keys() - {"id", "routing"}}
    routing = Routing.model_validate(dict(routed)) if routed and routed["origin"] == "served" else None
    return EventStatus(id=event.event_id, routing=routing, **fields)


async def _take(request: Request, site: Site, caller: tokens.Principal, kind: str) -> Response:
    form = read_form(request)
    body = await request.body()
    if not body.strip():
        raise problems.RequestRefusedError(400, "body", "nothing", "the body is empty: send an event")
    try:
        answer = await site.intake.take(intake.Arrival(body, kind, form, caller, _answer_one if form == "single" else _answer_many))
    except schemas.MalformedError as error:
        hint = "; several events are application/cloudevents-batch+json or application/x-ndjson" if form == "single" else ""
        raise problems.RequestRefusedError(400, "body", f"{len(body)} bytes", f"{error}{hint}") from error
    except intake.TooManyError as error:
        raise problems.RequestRefusedError(413, "body", str(error), f"send at most {intake.MAX_ITEMS} events at once") from error
    outcomes = Counter([result.outcome for result in answer.results])
    for outcome, count in outcomes.items():
        site.metrics.events.labels(kind, outcome).inc(count)
    if outcomes["stored"] and not site.intake.is_handling:
        site.on_stored()
    if isinstance(answer.written, problems.RequestRefusedError):
        raise answer.written
    return cast("Response", answer.written)


def read_form(request: Request) -> intake.Form:
    """How the events lie in the body, by its content type."""
    given = request.headers.get("content-type", "")
    name, _, parameters = given.partition(";")
    form = FORMS.get(name.strip().lower())
    charset = parameters.lower().partition("charset=")[2].split(";")[0].strip(' "')
    if form is None or charset not in {"", "utf-8"}:
        raise problems.RequestRefusedError(415, "Content-Type", given or "nothing", f"use one of {', '.join(FORMS)}, in UTF-8")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise problems.RequestRefusedError(415, "Content-Encoding", request.headers["content-encoding"], "send the body uncompressed")
    return form


def _answer_one(results: Sequence[delivery.Delivered]) -> Response | problems.RequestRefusedError:
    (result,) = results
    if result.refusal is not None:
        return problems.refuse(STATUSES[result.outcome], result.refusal)
    return Response(orjson.dumps({"ulid": result.ulid, "outcome": result.outcome}), 202, media_type=problems.JSON)


def _answer_many(results: Sequence[delivery.Delivered]) -> Response:
    told = [_describe(result) for result in results]
    refused = sum(result.refusal is not None for result in results)
    body = {"accepted": len(told) - refused, "refused": refused, "results": told}
    return Response(orjson.dumps(body), 422 if told and refused == len(told) else 202, media_type=problems.JSON)


def _describe(result: delivery.Delivered) -> dict[str, Any]:
    told: dict[str, Any] = {"ulid": result.ulid, "outcome": result.outcome}
    if result.refusal is not None:
        told["error"] = {"field": result.refusal.field, "value": result.refusal.value, "remedy": result.refusal.remedy}
    return told
