"""What comes in is checked strictly, and a refusal names the field, the value and what would be right."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine

from consumers import schemas
from storage import db, events
from tests.event_fixtures import LABELS, make_label, make_prediction

WRONG = [
    ({"confidence": 1.7}, "data.confidence", "1.7", "less than or equal to 1"),
    ({"confidence": "0.5"}, "data.confidence", '"0.5"', "a valid number"),
    ({"confidence": True}, "data.confidence", "true", "a valid number"),
    ({"input": None}, "data.input", "null", "an object"),
    ({"agent": {"ä": [0.9, False]}}, "data.agent", '{"ä": [0.9, false]}', "a valid string"),
    ({"occurred_at": "2026-01-01T00:00:00"}, "data.occurred_at", "2026-01-01T00:00:00", "add it, such as Z or"),
    ({"occurred_at": 1767225600}, "data.occurred_at", "1767225600", "a valid datetime"),
    ({"agent": 5}, "data.agent", "5", "a valid string"),
    ({"claim_id": ""}, "data.claim_id", '""', "at least 1 character"),
    ({"claim_id": "a\x00b"}, "data.claim_id", r'"a\u0000b"', "the character NUL"),
    ({"claim_id": "a\x01b"}, "data.claim_id", r'"a\u0001b"', "leave them out"),
    ({"input": {}}, "data.input", "{}", "at least 1 item"),
    ({"input": {"text": "x"}, "decison": "APPROVED"}, "data.decison", "APPROVED", "leave it out, or use one of"),
    ({"probabilities": {"APPROVED": -0.1}}, "data.probabilities.APPROVED", "-0.1", "greater than or equal to 0"),
]


@pytest.mark.parametrize(("changes", "field", "value", "remedy"), WRONG)
def test_a_wrong_value_is_refused_by_name(changes: dict[str, Any], field: str, value: str, remedy: str, now: datetime) -> None:
    good, bad = make_prediction(1, now), make_prediction(2, now, **changes)
    first, second = schemas.parse(orjson.dumps([good, bad]), schemas.PREDICTION)
    assert not isinstance(first, schemas.Refusal)
    assert isinstance(second, schemas.Refusal)
    assert second.field == field
    assert value in second.value, "as JSON, for that is what was sent"
    assert remedy in second.remedy
    assert not second.remedy.startswith(("Input", "Extra", "String")), "what would be right is told in our words"


UNSTORABLE = [
    (b"NaN", "NaN", "JSON has no such number"),
    (b"-Infinity", "-Infinity", "JSON has no such number"),
    (b"1e999", "1e999", "64 bits: send it as text"),
    (b"-" + b"1" * 30, "-" + "1" * 30, "64 bits: send it as text"),
    (b"1" * 5000, "1" * 100 + "…", "64 bits: send it as text"),
    (b'"\\ud800"', r'"\ud800"', "half a character"),
    (b'{"\\ud800": 1}', r'"\ud800"', "half a character"),
    (b"[" * 300 + b"]" * 300, "more than 190 levels", "nests too deep"),
    (b"[" * 900 + b"]" * 900, "more than 190 levels", "nests too deep"),
    (b"[" * 100_000 + b"]" * 100_000, "more than 190 levels", "nests too deep"),
    (b'{"[":' * 100_000 + b"NaN" + b"}" * 100_000, "more than 190 levels", "nests too deep"),
]


@pytest.mark.parametrize(("sent", "value", "remedy"), UNSTORABLE, ids=[value[:20] for _, value, _ in UNSTORABLE])
def test_what_our_json_can_t_keep_is_refused_by_the_exact_field_and_costs_nobody_else(
    sent: bytes, value: str, remedy: str, now: datetime
) -> None:
    good, other = make_prediction(1, now), make_prediction(3, now, input={"text": 'a "[[[" in a text \\'})
    bad = orjson.dumps(make_prediction(2, now, input={"a": 1, "ages": [30, 4711]})).replace(b"4711", sent)
    for body in (good, bad, other), (good, bad, other, make_prediction(4, now, confidence=7)):
        first, refused, third, *_ = map(
            keep, schemas.parse_each([one if one is bad else orjson.dumps(one) for one in body], schemas.PREDICTION)
        )
        assert not isinstance(first, schemas.Refusal)
        assert not isinstance(third, schemas.Refusal)
        assert isinstance(refused, schemas.Refusal)
        assert ("data.input.ages.1".startswith(refused.field) and refused.field != "data.input") or "ud800" in refused.field
        assert refused.value == value
        assert remedy in refused.remedy


def keep(item: schemas.AnyEvent | schemas.Refusal) -> events.Incoming | schemas.Refusal:
    """What is stored of an item, or why it is not."""
    if isinstance(item, schemas.Refusal):
        return item
    try:
        return schemas.to_incoming(item, None)
    except schemas.UnstorableError as error:
        return error.refusal


def test_a_text_about_infinity_is_no_number(now: datetime) -> None:
    [event] = schemas.parse(orjson.dumps([make_prediction(1, now, claim_id="Infinity-7")]), schemas.PREDICTION)
    assert not isinstance(event, schemas.Refusal)


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"{}", b'"text"', b"\xff\xfe", b"[" * 5000])
def test_a_body_that_is_no_array_of_events_is_malformed(body: bytes) -> None:
    with pytest.raises(schemas.MalformedError):
        schemas.parse(body, schemas.PREDICTION)


@pytest.mark.parametrize("body", [b'{"a":}', b' {"a": 1,\n}', b'{"a": "\xff"}', b"\xef\xbb\xbf{}"])
def test_where_json_breaks_off_is_told_as_in_what_was_sent(body: bytes) -> None:
    with pytest.raises(ValueError) as expected:  # noqa: PT011  whatever Python says
        json.loads(body.decode())
    with pytest.raises(schemas.MalformedError) as found:
        schemas.parse_single(body, schemas.PREDICTION)
    assert str(found.value) == f"the body is not JSON: {expected.value}"
    [refusal] = schemas.parse_each([body], schemas.PREDICTION)
    assert str(expected.value) in str(refusal)


def test_an_unknown_field_is_told_which_there_are(now: datetime) -> None:
    [refused] = schemas.parse(orjson.dumps([make_prediction(1, now, group_key="g1")]), schemas.PREDICTION)
    assert isinstance(refused, schemas.Refusal)
    assert refused.field == "data.group_key"
    assert "leave it out, or use one of prediction_id, agent, claim_id, group, input" in refused.remedy


def test_an_unknown_agent_or_answer_is_told_what_there_is(now: datetime) -> None:
    [stranger] = schemas.parse(orjson.dumps([make_prediction(1, now, agent="scribe")]), schemas.PREDICTION)
    [label] = schemas.parse(orjson.dumps([make_label(1, now, answer="MAYBE")]), schemas.LABEL)
    assert not isinstance(stranger, schemas.Refusal)
    assert not isinstance(label, schemas.Refusal)
    refused = [schemas.check(event, {"adjudication": LABELS}) for event in (stranger, label)]
    assert "adjudication" in str(refused[0])
    assert "APPROVED, DENIED, PENDING" in str(refused[1])


def test_probabilities_that_sum_to_more_than_one_are_refused(now: datetime) -> None:
    good, bad = ({"APPROVED": 0.67, "DENIED": 0.34}, {"APPROVED": 0.9, "DENIED": 0.9})
    events_ = schemas.parse(orjson.dumps([make_prediction(1, now, probabilities=one) for one in (good, bad)]), schemas.PREDICTION)
    refused = [schemas.check(one, {"adjudication": LABELS}) for one in events_ if not isinstance(one, schemas.Refusal)]
    assert refused[0] is None
    assert "sum to more than 1" in str(refused[1])


def test_the_order_of_fields_makes_no_other_event_but_the_data_keeps_it(engine: Engine, now: datetime) -> None:
    one = make_prediction(1, now, input={"b": 1, "a": 2})
    other = make_prediction(1, now, input={"a": 2, "b": 1})
    first, second = (schemas.to_incoming(schemas.parse(orjson.dumps([event]), schemas.PREDICTION)[0], None) for event in (one, other))  # type: ignore[arg-type]
    with db.writing(engine) as connection:
        outcomes = [events.append(connection, [event], now + timedelta(days=day))[0].outcome for day, event in enumerate((first, second))]
    assert outcomes == ["stored", "duplicate"]
    assert list(orjson.loads(first.data)["input"]) == ["b", "a"]


@pytest.mark.parametrize("note", ["one line", "two\nlines"], ids=["read quickly", "left to the exact types"])
def test_of_a_key_that_stands_twice_the_last_counts(now: datetime, note: str) -> None:
    body = orjson.dumps([make_prediction(1, now, claim_id="first", input={"note": note, "age": 46})])
    for once, twice in ((b'"claim_id":"first"', b'"claim_id":"first","claim_id":"last"'), (b'"age":46', b'"age":46,"age":47')):
        assert once in body
        body = body.replace(once, twice)
    [event] = schemas.parse(body, schemas.PREDICTION)
    assert not isinstance(event, schemas.Refusal)
    assert (event["data"]["claim_id"], event["data"]["input"]) == ("last", {"note": note, "age": 47})


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(junk=JSON, place=st.sampled_from(["specversion", "id", "source", "data", "type", "time", "subject"]))
def test_any_json_in_any_place_is_an_event_or_a_refusal(junk: Any, place: str) -> None:
    event = {**make_prediction(1, datetime.fromisoformat("2026-03-02T09:30:00+00:00")), place: junk}
    [result] = schemas.parse(orjson.dumps([event]), schemas.PREDICTION)
    assert isinstance(result, schemas.Refusal | dict)


def test_every_event_type_has_a_json_schema() -> None:
    found = schemas.json_schemas()
    assert set(found) == {schemas.PREDICTION, schemas.LABEL, schemas.HISTORY}


@pytest.mark.parametrize("key", ["\x00", "k" * 5000])
@pytest.mark.parametrize("value", ["1", "NaN"])
def test_a_reason_that_names_a_field_is_short_text_that_a_database_takes(now: datetime, key: str, value: str) -> None:
    sent = orjson.dumps({**make_prediction(1, now, input={key: 4711})}).replace(b"4711", value.encode())
    [refusal] = schemas.parse_each([sent], schemas.PREDICTION)
    assert isinstance(refusal, schemas.Refusal)
    assert refusal.field.startswith("data.input.")
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 400
