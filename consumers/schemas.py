"""The events that come in: CloudEvents 1.0 with one data type each, checked strictly before anything is stored."""

from __future__ import annotations

import hashlib
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NotRequired, cast

import orjson
from pydantic import AwareDatetime, ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter, ValidationError, with_config
from pydantic_core import ErrorDetails
from typing_extensions import TypedDict

from consumers import decoder
from storage import events

MAX_TEXT = 200_000
MAX_SHOWN = 100
MOST_PROBABILITY = 1.01
"""What the probabilities of all labels may sum to: senders round each."""
AS_SENT = orjson.OPT_UTC_Z
CANONICAL = AS_SENT | orjson.OPT_SORT_KEYS
"""How JSON is written down: with the fields in the sender's order, and in one order for all."""
PREDICTION, LABEL, HISTORY = "ratchet.prediction.made.v1", "ratchet.label.submitted.v1", "ratchet.history.imported.v1"

Name = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f]+$")]
Label = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f]+$")]
Text = Annotated[str, StringConstraints(max_length=MAX_TEXT, pattern=r"^[^\x00]*$")]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
EARLIEST, LATEST = datetime(1900, 1, 1, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
Time = Annotated[AwareDatetime, Field(ge=EARLIEST, lt=LATEST)]
Fields = Annotated[dict[Name, JsonValue], Field(max_length=500)]

DEEPEST = 190
"""So many levels of an event every reader and writer takes."""
TOO_DEEP = f"this nests too deep, {DEEPEST} levels are taken"
TOO_LARGE = "a number is beyond 64 bits: send it as text"
NO_NUMBER = "JSON has no such number: send a number, or leave the field out"
HALF_CHARACTER = "a text holds half a character, which is no UTF-8: correct or leave it out"
NUL = "a text holds the character NUL, which PostgreSQL does not keep: leave it out"
LONGEST_INTEGER = 20
"""So many characters a whole number of 64 bits has at most, its sign among them."""
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{\]}]', re.DOTALL)
"""A text or a bracket of JSON."""
OPENING = re.compile(r"^(Input|String|Tuple|Dictionary|List|Value) should")
ADVICE = {
    "missing": "this field is missing: add it",
    "extra_forbidden": "unknown field: correct its name, or leave it out",
    "timezone_aware": "the time names no zone: add it, such as Z or +01:00",
    "string_pattern_mismatch": "this holds control characters: leave them out",
}
"""What to do about an error of Pydantic's, where its own words don't say it."""

LabelKind = Literal["review", "second_read", "adjudication", "late_truth"]


@with_config(ConfigDict(extra="forbid", strict=True))
class PredictionMade(TypedDict):
    """What a model said about a claim in production."""

    prediction_id: Name
    agent: Name
    claim_id: Name
    group: NotRequired[Name]
    input: Annotated[Fields, Field(min_length=1)]
    decision: Label
    confidence: NotRequired[Share | None]
    probabilities: NotRequired[Annotated[dict[Label, Share], Field(max_length=100)] | None]
    model_version: NotRequired[Name | None]
    attributes: NotRequired[Fields]
    occurred_at: Time


@with_config(ConfigDict(extra="forbid", strict=True))
class LabelSubmitted(TypedDict):
    """What an expert, or a later decision such as an appeal, says about a claim."""

    agent: Name
    claim_id: NotRequired[Name]
    prediction_id: NotRequired[Name]
    review_id: NotRequired[Name]
    expert: NotRequired[Name]
    answer: Label
    rationale: NotRequired[Text | None]
    seconds_spent: NotRequired[Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)] | None]
    answered_at: Time
    kind: NotRequired[LabelKind]


@with_config(ConfigDict(extra="forbid", strict=True))
class HistoryImported(TypedDict):
    """A case that was decided before Ratchet watched: its input and the answer that stood."""

    agent: Name
    claim_id: Name
    group: NotRequired[Name]
    input: Annotated[Fields, Field(min_length=1)]
    attributes: NotRequired[Fields]
    answer: Label
    rationale: NotRequired[Text | None]
    occurred_at: Time


class _Envelope(TypedDict):
    specversion: Literal["1.0"]
    id: Name
    source: Name
    time: NotRequired[Time]
    subject: NotRequired[Name]
    datacontenttype: NotRequired[Literal["application/json"]]
    dataschema: NotRequired[Name]


@with_config(ConfigDict(extra="ignore", strict=True))
class PredictionEvent(_Envelope):
    """A CloudEvent that carries a prediction."""

    type: Literal["ratchet.prediction.made.v1"]
    data: PredictionMade


@with_config(ConfigDict(extra="ignore", strict=True))
class LabelEvent(_Envelope):
    """A CloudEvent that carries a label."""

    type: Literal["ratchet.label.submitted.v1"]
    data: LabelSubmitted


@with_config(ConfigDict(extra="ignore", strict=True))
class HistoryEvent(_Envelope):
    """A CloudEvent that carries a case of imported history."""

    type: Literal["ratchet.history.imported.v1"]
    data: HistoryImported


AnyEvent = PredictionEvent | LabelEvent | HistoryEvent
_EVENTS: dict[str, Any] = {PREDICTION: PredictionEvent, LABEL: LabelEvent, HISTORY: HistoryEvent}
_FIELDS = {kind: list(typing.get_type_hints(event)["data"].__annotations__) for kind, event in _EVENTS.items()}
_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    PREDICTION: TypeAdapter(list[PredictionEvent]),
    LABEL: TypeAdapter(list[LabelEvent]),
    HISTORY: TypeAdapter(list[HistoryEvent]),
}
_DECODERS = {kind: decoder.Decoder(event, EARLIEST, LATEST) for kind, event in _EVENTS.items()}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an event can't be taken: the field, the value, and what would be right."""

    field: str
    value: str
    remedy: str

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.field}: {self.remedy} (got {self.value})"


class MalformedError(ValueError):
    """The body as a whole can't be read as JSON."""


class UnstorableError(ValueError):
    """An event holds what our JSON can't keep as it is: a number beyond 64 bits, too deep a nesting, NUL or half a character."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def parse(body: bytes, kind: str) -> list[AnyEvent | Refusal]:
    """Check a JSON array of events of one type; an item that is not right becomes a `Refusal` in its place.

    Raises `MalformedError` when the body is not a JSON array.
    """
    events = _DECODERS[kind].decode(body)
    if events is not None:
        return cast("list[AnyEvent | Refusal]", events)
    adapter = _ADAPTERS[kind]
    # Python's JSON readers let NaN pass, and all of them NUL. The search costs nothing beside the parse that it saves.
    if not any(mark in body for mark in (b"NaN", b"Infinity", rb"\u0000")):
        try:
            events = adapter.validate_json(body, strict=True)
            if not any(_has_infinity(event["data"]) for event in events):
                return cast("list[AnyEvent | Refusal]", events)
        except ValidationError:
            pass  # at least one item is wrong: look at them one by one, to say which
    items = _read_json(body)
    if not isinstance(items, list):
        raise MalformedError(f"the body must be a JSON array of events, this is {type(items).__name__}")
    return [_parse_one(kind, item) for item in items]


def parse_each(values: Sequence[bytes | None], kind: str) -> list[AnyEvent | Refusal]:
    """Check events that came each by itself, all at once, which is fast; whatever is wrong with one is a `Refusal` in its place."""
    if all(value and value[:1] == b"{" and value.rstrip()[-1:] == b"}" for value in values):  # else two might be one only together
        try:
            items = parse(b"[" + b",".join(cast("Sequence[bytes]", values)) + b"]", kind)
            if len(items) == len(values):
                return items
        except MalformedError:
            pass
    return [_parse_alone(value, kind) for value in values]


def parse_single(body: bytes, kind: str) -> list[AnyEvent | Refusal]:
    """Check what should be one event: there may be none or several. Raises `MalformedError`, which says where in `body` it breaks off."""
    try:
        return parse(b"[" + body + b"]", kind)
    except MalformedError:
        _read_json(body)  # without our bracket, by which every place would be one too far
        raise


def _parse_alone(value: bytes | None, kind: str) -> AnyEvent | Refusal:
    if not value:
        return Refusal("value", "nothing", "one event is wanted, this is empty")
    try:
        items = parse_single(value, kind)
    except MalformedError as error:
        return Refusal("value", shorten(value.decode(errors="replace")), str(error).replace("the body", "this"))
    return items[0] if len(items) == 1 else Refusal("value", f"{len(items)} events", "one event is wanted")


class _Unread(str):
    """A number that no float or integer of 64 bits is, as it was sent: NaN, an infinity, or one that is too large."""

    __slots__ = ()


def _read_json(body: bytes) -> Any:
    """The body as it was sent, what can't be taken of it included. Raises `MalformedError`."""
    try:
        text = body.decode()
        try:
            return _load(text)
        except RecursionError:
            return _load(_prune(text))
    except ValueError as error:
        raise MalformedError(f"the body is not JSON: {error}") from error


def _load(text: str) -> Any:
    return json.loads(text, parse_constant=_Unread, parse_float=_read_float, parse_int=_read_integer)


def _read_float(text: str) -> float | _Unread:
    number = float(text)
    return number if math.isfinite(number) else _Unread(text)


def _read_integer(text: str) -> int | _Unread:
    return int(text) if len(text) <= LONGEST_INTEGER else _Unread(text)


def _prune(text: str) -> str:
    """The JSON without what lies too deep to be read: it still nests deeper than is taken, and is refused where it does."""
    kept, begin, depth = [], 0, 0
    for token in TOKEN.finditer(text):
        if token[0] in {"[", "{"}:
            depth += 1
            if depth == 2 * DEEPEST:
                kept.append(text[begin : token.end()])
                begin = len(text)
        elif token[0] in {"]", "}"}:
            if depth == 2 * DEEPEST:
                begin = token.start()
            depth -= 1
    return "".join((*kept, text[begin:]))


def _find_unstorable(value: Any, *path: str | int) -> Refusal | None:
    """The first part of a value that we can't keep, by the path to it."""
    if len(path) > DEEPEST:
        return Refusal(_name_path(path[:3]), f"more than {DEEPEST} levels", TOO_DEEP)
    parts: Iterable[tuple[str | int, Any]]
    if isinstance(value, dict):
        parts = ((key, part) for key, held in value.items() for part in (key, held))
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        remedy = _find_remedy(value)
        return Refusal(_name_path(path), shorten(value), remedy) if remedy else None
    return next((found for key, part in parts if (found := _find_unstorable(part, *path, key))), None)


def _find_remedy(value: Any) -> str | None:
    """What to do about a text or number that we can't keep; None where we can."""
    if isinstance(value, _Unread):
        return TOO_LARGE if value[-1].isdigit() else NO_NUMBER
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**64 else TOO_LARGE
    if not isinstance(value, str):
        return None
    return NUL if "\0" in value else HALF_CHARACTER if re.search("[\ud800-\udfff]", value) else None


def _name_path(path: Iterable[str | int]) -> str:
    return ".".join(map(_name_part, path)) or "event"


def _name_part(key: str | int) -> str:
    """One part of a field's path. It may be whatever was sent: a reason must be text that a database takes, and is announced."""
    name = str(key)
    return name if name.isprintable() and len(name) <= MAX_SHOWN else shorten(name)


def _parse_one(kind: str, item: Any) -> AnyEvent | Refusal:
    if unstorable := _find_unstorable(item):
        return unstorable
    try:
        return cast("AnyEvent", _ADAPTERS[kind].validate_json(orjson.dumps([item]), strict=True)[0])
    except ValidationError as error:
        return _refuse(kind, error.errors(include_url=False, include_context=False)[0])


def _refuse(kind: str, first: ErrorDetails) -> Refusal:
    field = _name_path(first["loc"][1:])
    value = "nothing" if first["type"] == "missing" else shorten(first["input"])
    if first["type"] == "extra_forbidden":
        return Refusal(field, value, f"unknown field: leave it out, or use one of {', '.join(_FIELDS[kind])}")
    return Refusal(field, value, advise(first))


def advise(error: ErrorDetails) -> str:
    """What would be right in place of what Pydantic found wrong."""
    said = OPENING.sub("should", error["msg"]).removeprefix("Value error, ").replace(" after validation", "")
    return ADVICE.get(error["type"], said.partition(", unable to")[0])


def explain(error: ValidationError) -> str:
    """The first of what Pydantic found wrong: the key, the value, and what would be right."""
    first = error.errors(include_url=False, include_context=False)[0]
    given = f"{'.'.join(map(str, first['loc']))} = {shorten(first['input'])}: " if first["loc"] else ""
    return given + advise(first)


def _has_infinity(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_infinity, value.values()))
    return any(map(_has_infinity, value)) if isinstance(value, list) else isinstance(value, float) and math.isinf(value)


def shorten(value: Any) -> str:
    """A value for an error message, in JSON as it was sent: short enough to read, long enough to recognise; all of it is printable."""
    sent = value if isinstance(value, _Unread) else json.dumps(value, ensure_ascii=False, default=_write_foreign)
    shown = "".join(one if one.isprintable() else json.dumps(one)[1:-1] for one in sent[: MAX_SHOWN + 1])
    return shown if len(shown) <= MAX_SHOWN else shown[:MAX_SHOWN] + "…"


def _write_foreign(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def check(event: AnyEvent, labels_of: Mapping[str, Sequence[str]], latest: datetime = LATEST) -> Refusal | None:
    """What the types can't say: whether agent and answer are known, a label says what it labels, and the time is not past `latest`."""
    data: Any = event["data"]
    if refusal := _check_values(data, latest):
        return refusal
    labels = labels_of.get(data["agent"])
    if labels is None:
        return Refusal(
            "data.agent", shorten(data["agent"]), f"unknown agent: use one of {', '.join(sorted(labels_of)) or 'none configured'}"
        )
    if "answer" in data and data["answer"] not in labels:
        return Refusal("data.answer", shorten(data["answer"]), f"unknown answer: use one of {', '.join(labels)}")
    if event["type"] == LABEL and not ({"claim_id", "prediction_id", "review_id"} & data.keys()):
        return Refusal("data.claim_id", "nothing", "name a claim_id, a prediction_id or a review_id")
    subject = event.get("subject")
    if subject is not None and "claim_id" in data and subject != subject_of(data):
        return Refusal("subject", shorten(subject), f"subject is AGENT/CLAIM_ID: use {subject_of(data)} or leave it out")
    return None


def _check_values(data: Mapping[str, Any], latest: datetime) -> Refusal | None:
    field = "answered_at" if "answered_at" in data else "occurred_at"
    if data[field] > latest:
        return Refusal(f"data.{field}", data[field].isoformat(), "this is in the future: check the clock and the zone of whoever sends it")
    if (shares := data.get("probabilities")) and sum(shares.values()) > MOST_PROBABILITY:
        return Refusal("data.probabilities", shorten(shares), "these sum to more than 1: send each label's share, or leave them out")
    return None


def subject_of(data: Mapping[str, Any]) -> str:
    """`agent/claim_id`; a label that names no claim has what it names instead."""
    return f"{data['agent']}/{data.get('claim_id') or data.get('prediction_id') or data.get('review_id')}"


def to_incoming(event: AnyEvent, principal: str | None) -> events.Incoming:
    """An event as the log stores it: its data with the fields in the sender's order, and a digest that knows no order.

    Raises `UnstorableError`.
    """
    data: Any = event["data"]
    subject = subject_of(data)
    try:
        text = orjson.dumps(data, option=AS_SENT)
    except orjson.JSONEncodeError as error:
        raise UnstorableError(_find_unstorable(data, "data") or Refusal("data", "what can't be kept", str(error))) from error
    ordered = orjson.dumps(data, option=CANONICAL)
    digest = hashlib.sha256(f"{event['type']}\0{subject}\0".encode() + ordered).hexdigest()
    at = event.get("time") or data.get("occurred_at") or data["answered_at"]
    return events.Incoming(event["source"], event["id"], event["type"], subject, at, text.decode(), digest, principal)


def json_schemas() -> dict[str, Any]:
    """The JSON Schema of every event type, for `docs/`."""
    return {kind: TypeAdapter(model).json_schema() for kind, model in _EVENTS.items()}
