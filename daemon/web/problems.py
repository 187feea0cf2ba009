"""How a request is refused: one form for every error, with the field, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException as RoutingError

from consumers import schemas

JSON = "application/json"
NO_OBJECT = "send one whole JSON object, with the header `Content-Type: application/json`"
REMEDIES = {
    404: "nothing is here: /openapi.json lists what there is",
    405: "this address takes other methods: the header Allow names them",
}


class Problem(BaseModel):
    """What is wrong, and what would be right."""

    field: str
    value: str
    remedy: str


class ProblemBody(BaseModel):
    """The body of every refusal."""

    error: Problem


class RequestRefusedError(HTTPException):
    """A request that is answered with a problem."""

    def __init__(self, status: int, field: str, value: str, remedy: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, f"{field}: {remedy}", dict(headers or {}))
        self.problem = Problem(field=field, value=value, remedy=remedy)


def refuse(status: int, refusal: schemas.Refusal) -> RequestRefusedError:
    """The error that answers with a refusal of the event door."""
    return RequestRefusedError(status, refusal.field, refusal.value, refusal.remedy)


def find_problem(error: Exception, request: Request) -> tuple[int, Problem]:
    """Status and problem of an error that a handler or the framework raised."""
    if isinstance(error, RequestRefusedError):
        return error.status_code, error.problem
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        if first["loc"] == ("body",) or first["type"] == "json_invalid":
            return 422, Problem(field="body", value=schemas.shorten(error.body), remedy=NO_OBJECT)
        remedy = "this is no id: use the one that Ratchet gave" if first["loc"][0] == "path" else schemas.advise(first)
        value = "nothing" if first["type"] == "missing" else schemas.shorten(first.get("input"))
        return 422, Problem(field=".".join(str(part) for part in first["loc"]), value=value, remedy=remedy)
    if isinstance(error, RoutingError):
        remedy = REMEDIES.get(error.status_code, str(error.detail))
        return error.status_code, Problem(field="path" if error.status_code in REMEDIES else "body", value=request.url.path, remedy=remedy)
    return 503, Problem(field="database", value="not available", remedy="try again in a few seconds: what you send twice is stored once")


def to_json(status: int, problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that a program gets. Half a surrogate pair, which is no text, is written as an escape."""
    told = {name: value.encode("utf-8", "backslashreplace").decode() for name, value in problem.model_dump().items()}
    return Response(orjson.dumps({"error": told}), status, dict(headers or {}), JSON)


def describe(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of these refusals."""
    return {status: {"model": ProblemBody, "description": DESCRIPTIONS[status]} for status in sorted({*statuses, 503})}


DESCRIPTIONS = {
    400: "The body can't be read.",
    401: "There is no token, or it is not valid.",
    403: "The token's role may not do this.",
    404: "There is no such thing.",
    409: "The state of things forbids it; the remedy says what to do.",
    413: "The body is too large.",
    415: "The body is of a type that is not taken here.",
    422: "Something in the request is wrong; the problem names it.",
    503: "The database is not available; try again, what is sent twice is stored once.",
}
