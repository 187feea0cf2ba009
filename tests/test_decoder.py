"""The quick reading of events gives what the exact types give, to the byte, or leaves it to them."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from consumers import decoder, schemas
from tests.event_fixtures import make_history, make_label, make_prediction

AT = datetime.fromisoformat("2026-03-02T09:30:00.123456+00:00")
EVENTS = {schemas.PREDICTION: schemas.PredictionEvent, schemas.LABEL: schemas.LabelEvent, schemas.HISTORY: schemas.HistoryEvent}
EXACT = {kind: TypeAdapter(list[event]) for kind, event in EVENTS.items()}
QUICK = {kind: decoder.Decoder(event, schemas.EARLIEST, schemas.LATEST) for kind, event in EVENTS.items()}
FULL = {
    schemas.PREDICTION: {
        **make_prediction(1, AT, probabilities={"APPROVED": 0.75, "DENIED": 0.25}, confidence=1, attributes={"region": None}),
        "time": "2026-03-02T09:30:00Z",
        "subject": "adjudication/c1",
        "datacontenttype": "application/json",
        "unknown": {"is": "ignored"},
    },
    schemas.LABEL: make_label(1, AT, prediction_id="p1", rationale="Clear enough.", seconds_spent=12, kind="review"),
    schemas.HISTORY: make_history(1, AT, rationale=None, input={"age": 7, "nested": [{"b": 1.5, "a": [True, "é"]}]}),
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SNIPPETS = [
    *(b'"', b"\\", b"\\n", b"\\u0041", b"\\ud800", b"\x00", b"\x7f", b"\xff", b"\xc3\xa9", b",", b":", b"{", b"}", b"[", b"]", b" ", b"-"),
    *(b"0", b"1", b"9", b".", b"e", b"e400", b"1e400", b"NaN", b"Infinity", b"null", b"true", b"18446744073709551616", b"0.5", b"1.0"),
    *(b'"agent":"other",', b'"a":1,"a":2,', b'"claim_id":"",', b"T", b"t", b"Z", b"z", b"+02:00", b"+24:00", b"+01:60", b"-00:00", b".5"),
]


def give(value: Any) -> str:
    """Everything that could differ: the kinds of numbers, the order of fields, the digits and the zone of times."""
    return json.dumps(value, default=datetime.isoformat)


def agree(body: bytes, kind: str) -> bool:
    """Whether the decoder read the body; what it reads is held against the exact types."""
    events = QUICK[kind].decode(body)
    if events is not None:
        exact = EXACT[kind].validate_json(body, strict=True)
        assert [give(one["data"]) for one in events] == [give(one["data"]) for one in exact]
        assert events == exact
        assert [orjson.dumps(one.get("time"), option=orjson.OPT_UTC_Z) for one in events] == [
            orjson.dumps(one.get("time"), option=orjson.OPT_UTC_Z) for one in exact
        ]
    return events is not None


@pytest.mark.parametrize("kind", EVENTS)
def test_well_formed_events_are_read_by_it(kind: str) -> None:
    assert agree(orjson.dumps([FULL[kind], {**FULL[kind], "id": "another"}]), kind)
    assert agree(b"[]", kind)


@pytest.mark.parametrize(
    "text", ["2026-03-02T09:30:00Z", "2026-03-02T09:30:00.5Z", "2026-03-02T09:30:00.123Z", "2026-03-02T09:30:00.123456+05:30"]
)
def test_a_time_with_no_three_or_six_digits_of_a_second_is_read(text: str) -> None:
    body = orjson.dumps([make_prediction(1, AT, occurred_at=text)])
    assert agree(body, schemas.PREDICTION) == (".5Z" not in text)


@settings(deadline=None)
@given(place=st.sampled_from([*FULL[schemas.PREDICTION], *(f"data.{name}" for name in FULL[schemas.PREDICTION]["data"])]), junk=JSON)
def test_any_json_in_any_place_is_read_alike_or_left_alone(place: str, junk: Any) -> None:
    event = json.loads(json.dumps(FULL[schemas.PREDICTION]))
    *path, name = place.split(".")
    (event["data"] if path else event)[name] = junk
    agree(json.dumps([event], ensure_ascii=False).encode(errors="surrogatepass"), schemas.PREDICTION)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(list(EVENTS)), data=st.data())
def test_any_edit_of_the_bytes_is_read_alike_or_left_alone(kind: str, data: st.DataObject) -> None:
    body = orjson.dumps([FULL[kind]])
    for _ in range(data.draw(st.integers(1, 2))):
        at, gone = data.draw(st.integers(0, len(body))), data.draw(st.integers(0, 3))
        body = body[:at] + data.draw(st.sampled_from(SNIPPETS)) + body[at + gone :]
    agree(body, kind)


@settings(deadline=None)
@given(text=st.from_regex(r"\A\d{4}[-W]\w\w[-W]\d\d[Tt ]\d\d:\d\d(:\d\d)?([.,]\d{1,9})?(Z|[+-]\d\d:?\d\d)\Z"))
@example("2026-W10-1T09:30:00Z")
@example("2026-03-02T24:00:00Z")
@example("2026-03-02T09:30:60Z")
@example("2026-03-02T09:30:00+01:60")
@example("2026-03-02T09:30:00,123Z")
@example("1899-12-31T23:59:59Z")
@example("2200-01-01T00:00:00Z")
@example("\uff12026-03-02T09:30:00Z")
def test_any_writing_of_a_time_is_read_alike_or_left_alone(text: str) -> None:
    agree(orjson.dumps([{**make_prediction(1, AT, occurred_at=text), "time": text}]), schemas.PREDICTION)


@pytest.mark.parametrize("wrong", [b"\xff", rb"\ud800", rb"\ud83d"])
def test_a_text_that_is_none_is_refused_even_where_nobody_reads_it(wrong: bytes) -> None:
    body = orjson.dumps([FULL[schemas.PREDICTION]]).replace(b"ignored", wrong)
    assert QUICK[schemas.PREDICTION].decode(body) is None


@pytest.mark.parametrize("escaped", [r"a\nb", r"a\u0000b", r"a\u001fb", r"a\tb"])
def test_a_name_with_a_control_character_is_left_to_the_exact_types(escaped: str) -> None:
    body = orjson.dumps([make_prediction(1, AT)]).replace(b'"c1"', f'"{escaped}"'.encode())
    assert QUICK[schemas.PREDICTION].decode(body) is None
    with pytest.raises(ValidationError):
        EXACT[schemas.PREDICTION].validate_json(body, strict=True)


def test_a_limit_that_it_does_not_know_is_refused_when_the_types_are_made() -> None:
    class Even(TypedDict):
        number: Annotated[float, Field(multiple_of=2)]

    with pytest.raises(TypeError, match="multiple_of"):
        decoder.Decoder(Even, schemas.EARLIEST, schemas.LATEST)
