"""daemon.web.events, intake and access: nothing is acknowledged before it is stored, and every refusal says what would be right."""

import asyncio
import sqlite3
from datetime import timedelta

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from daemon.web import intake
from storage import db, tokens
from tests.event_fixtures import envelope, make_label, make_prediction
from tests.web_fixtures import Site, site

pytestmark = pytest.mark.databases("sqlite", "postgresql")

__all__ = ["site"]
BATCH = {"Content-Type": "application/cloudevents-batch+json"}
LINES = {"Content-Type": "application/x-ndjson"}


def post(site, path, name="node", **options):
    async def call():
        async with site.client(name) as client:
            return await client.post(path, **options)

    return asyncio.run(call())


def get(site, path, name="node", **options):
    async def call():
        async with site.client(name) as client:
            return await client.get(path, **options)

    return asyncio.run(call())


def count_events(site):
    with db.reading(site.engine) as connection:
        return connection.execute(text("SELECT count(*) FROM events WHERE source <> 'ratchet'")).scalar_one()


def problem(answer):
    assert answer.headers["content-type"] == "application/json"
    told = answer.json()["error"]
    assert all(isinstance(told[name], str) for name in ("field", "value", "remedy"))
    return told


def test_an_event_is_stored_before_it_is_acknowledged(site):
    answer = post(site, "/v1/predictions", json=make_prediction(1, site.clock()))
    assert (answer.status_code, answer.json()["outcome"]) == (202, "stored")
    assert count_events(site) == 1
    assert site.stored == [1]


def test_the_same_event_again_is_a_duplicate_and_other_content_a_conflict(site):
    event = make_prediction(1, site.clock())
    first = post(site, "/v1/predictions", json=event).json()["ulid"]
    site.clock.now += timedelta(seconds=5)
    again = post(site, "/v1/predictions", json=event)
    assert (again.status_code, again.json()) == (202, {"ulid": first, "outcome": "duplicate"})
    other = post(site, "/v1/predictions", json=make_prediction(1, site.clock(), decision="DENIED"))
    assert other.status_code == 409
    assert problem(other)["field"] == "id"
    assert count_events(site) == 1


def test_the_good_ones_of_a_batch_are_stored_and_each_item_has_its_result(site):
    events = [make_prediction(1, site.clock()), make_prediction(2, site.clock(), confidence=1.7), make_prediction(3, site.clock())]
    answer = post(site, "/v1/predictions", content=orjson.dumps(events), headers=BATCH)
    told = answer.json()
    assert (answer.status_code, told["accepted"], told["refused"]) == (202, 2, 1)
    assert [one["outcome"] for one in told["results"]] == ["stored", "refused", "stored"]
    assert told["results"][1]["error"]["field"] == "data.confidence"
    assert count_events(site) == 2


@pytest.mark.parametrize("headers", [BATCH, LINES], ids=["batch", "lines"])
@pytest.mark.parametrize(
    "value", [b"[" * 1000 + b"]" * 1000, b'{"a":' * 90_000 + b"1" + b"}" * 90_000, b"9" * 5000], ids=["1000", "90000", "9s"]
)
def test_an_item_that_nests_absurdly_or_holds_an_absurd_number_costs_that_item_only(site, headers, value):
    events = [orjson.dumps(make_prediction(n, site.clock(), input={"note": "[", "codes": 4711})) for n in range(3)]
    events[1] = events[1].replace(b"4711", value)
    body = b"\n".join(events) if headers == LINES else b"[" + b",".join(events) + b"]"
    results = post(site, "/v1/predictions", content=body, headers=headers).json()["results"]
    assert [one["outcome"] for one in results] == ["stored", "refused", "stored"]
    assert results[1]["error"]["field"].startswith("data.input.codes")
    assert count_events(site) == 2


def test_a_batch_of_which_nothing_is_right_is_refused_and_an_empty_one_is_not(site):
    assert post(site, "/v1/predictions", content=b'[{"a": 1}]', headers=BATCH).status_code == 422
    assert post(site, "/v1/predictions", content=b"[]", headers=BATCH).json() == {"accepted": 0, "refused": 0, "results": []}
    assert site.stored == []


def test_a_broken_line_costs_that_line_only_and_is_named(site):
    good = orjson.dumps(make_prediction(1, site.clock()))
    body = b"\n".join([b'{"broken', b"", good, good + good, b"7"])
    results = post(site, "/v1/predictions", content=body, headers=LINES).json()["results"]
    assert [one["outcome"] for one in results] == ["refused", "stored", "refused", "refused"]
    assert [one["error"]["field"] for one in results if "error" in one] == ["line 1", "line 4", "event"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"   ", 400),
        (b"{not json}", 400),
        (b'{"a": NaN}', 422),
        (b"\xff\xfe", 400),
        (b"{},{}", 400),
        (b"[]", 422),
        (b"null", 422),
        (b"[" * 5000 + b"]" * 5000, 422),
        (b"{}", 422),
    ],
)
def test_a_body_that_is_no_event_is_refused(site, body, status):
    answer = post(site, "/v1/predictions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    problem(answer)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"agent": "nobody"}, "data.agent"),
        ({"confidence": 1.7}, "data.confidence"),
        ({"confidence": "high"}, "data.confidence"),
        ({"occurred_at": "2026-03-02T09:30:00"}, "data.occurred_at"),
        ({"occurred_at": "0001-01-01T00:00:00+14:00"}, "data.occurred_at"),
        ({"input": {}}, "data.input"),
        ({"input": {"a": "x" * 300}, "claim_id": "x" * 300}, "data.claim_id"),
        ({"color": "red"}, "data.color"),
    ],
)
def test_a_field_that_is_wrong_is_named(site, changes, field):
    answer = post(site, "/v1/predictions", json=make_prediction(1, site.clock(), **changes))
    assert answer.status_code == 422
    assert problem(answer)["field"] == field


@pytest.mark.parametrize("number", [b"1" + b"0" * 40, b"-1" + b"0" * 40, b"1e999", b"9" * 400 + b".5"])
def test_a_number_that_can_t_be_kept_is_refused_and_not_changed(site, number):
    body = orjson.dumps(make_prediction(1, site.clock(), input={"amount": 7})).replace(b'"amount":7', b'"amount":' + number)
    answer = post(site, "/v1/predictions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert problem(answer)["field"] == "data.input.amount"
    assert "send it as text" in problem(answer)["remedy"]


@pytest.mark.parametrize("given", ["text/plain", "", "application/json; charset=latin-1", "application/xml"])
def test_another_content_type_is_415(site, given):
    answer = post(site, "/v1/predictions", content=b"{}", headers={"Content-Type": given})
    assert answer.status_code == 415
    assert "application/x-ndjson" in problem(answer)["remedy"]


def test_a_compressed_body_is_415(site):
    headers = {"Content-Type": "application/json; charset=UTF-8", "Content-Encoding": "gzip"}
    assert post(site, "/v1/predictions", content=b"{}", headers=headers).status_code == 415


def test_a_body_that_is_too_large_is_413_with_and_without_its_length(engine, now, tmp_path):
    small = Site(engine, lambda: now, tmp_path, max_body_bytes=2000)

    async def stream():
        for _ in range(30):
            yield b" " * 100

    try:
        for content in (b" " * 3000, stream()):
            answer = post(small, "/v1/predictions", content=content, headers=LINES)
            assert answer.status_code == 413
            assert "at most 2000 bytes" in problem(answer)["remedy"]
        assert post(small, "/login", content=b"token=" + b"x" * 3000).status_code == 413
    finally:
        small.app.state.site.intake.close()


def test_too_many_events_at_once_are_413(site, monkeypatch):
    monkeypatch.setattr(intake, "MAX_ITEMS", 3)
    events = [make_prediction(number, site.clock()) for number in range(4)]
    assert post(site, "/v1/predictions", content=orjson.dumps(events), headers=BATCH).status_code == 413
    assert count_events(site) == 0


def test_a_request_without_a_valid_token_is_401(site):
    for name, headers in [(None, {}), (None, {"Authorization": "Bearer wrong"}), (None, {"Authorization": "Basic YTpi"})]:
        answer = post(site, "/v1/predictions", name, json=make_prediction(1, site.clock()), headers=headers)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"].startswith('Bearer realm="ratchet"')
    assert count_events(site) == 0


def test_the_role_of_a_token_decides_what_it_may_send(site):
    assert post(site, "/v1/predictions", "ann", json=make_prediction(1, site.clock())).status_code == 403
    assert post(site, "/v1/labels", "node", json=make_label(1, site.clock())).status_code == 403
    assert post(site, "/v1/labels", "ann", json=make_label(1, site.clock())).status_code == 202
    assert post(site, "/v1/labels", "node", json=make_label(1, site.clock(), kind="late_truth")).status_code == 202
    assert post(site, "/v1/labels", "ops", json=make_label(1, site.clock(), kind="adjudication")).status_code == 202


def test_a_label_bears_the_name_of_the_token_s_owner(site):
    answer = post(site, "/v1/labels", "ann", json=make_label(1, site.clock(), expert="ben"))
    assert answer.status_code == 422
    assert problem(answer)["field"] == "data.expert"


def test_a_revoked_token_is_useless_within_seconds(site):
    assert post(site, "/v1/predictions", json=make_prediction(1, site.clock())).status_code == 202
    with db.writing(site.engine) as connection:
        tokens.revoke(connection, "node", site.clock())
    site.clock.now += timedelta(seconds=3)
    assert post(site, "/v1/predictions", json=make_prediction(2, site.clock())).status_code == 401


def test_an_event_can_be_asked_for_and_tells_how_it_was_routed(site):
    ulid = post(site, "/v1/predictions", json=make_prediction(1, site.clock(), confidence=0.2)).json()["ulid"]
    assert get(site, f"/v1/events/{ulid}").json()["state"] == "received"
    site.handle()
    told = get(site, f"/v1/events/{ulid}").json()
    assert (told["state"], told["subject"], told["routing"]["reasons"]) == ("handled", "adjudication/c1", ["below_threshold"])
    assert "insulin" not in str(told)
    assert get(site, f"/v1/events/{ulid}", "ann").json()["routing"] is None


def test_a_label_that_came_first_waits(site):
    ulid = post(site, "/v1/labels", "ann", json=make_label(1, site.clock())).json()["ulid"]
    site.handle()
    assert get(site, f"/v1/events/{ulid}").json()["state"] == "waiting"


def test_an_unknown_event_is_404_and_what_is_no_id_422(site):
    assert get(site, "/v1/events/01KJPY44E0SJ0B0HPRJC1B9XZN").status_code == 404
    assert get(site, "/v1/events/../../etc/passwd").status_code == 404
    assert get(site, "/v1/events/x").status_code == 422


def test_events_sent_at_once_share_commits_and_all_are_stored(site):
    async def send_all():
        async with site.client("node") as client:
            sent = [client.post("/v1/predictions", json=make_prediction(number, site.clock())) for number in range(60)]
            bad = client.post("/v1/predictions", content=b"{broken", headers={"Content-Type": "application/json"})
            return await asyncio.gather(*sent, bad)

    *answers, bad = asyncio.run(send_all())
    assert bad.status_code == 400
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["ulid"] for answer in answers}) == count_events(site) == 60


@pytest.mark.databases("sqlite")
def test_a_database_that_is_gone_is_503_and_nothing_is_acknowledged(site, capsys):
    with site.engine.begin() as connection:
        connection.execute(text("ALTER TABLE events RENAME TO elsewhere"))
    answer = post(site, "/v1/predictions", json=make_prediction(1, site.clock()))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    assert problem(answer)["field"] == "database"
    assert "no such table" in capsys.readouterr().out, "the log says why"


def test_what_is_not_committed_is_not_acknowledged_though_its_answer_was_written_meanwhile(site):
    events = [make_prediction(number, site.clock()) for number in range(3)]

    def fail(_connection):
        sqlalchemy_event.remove(site.engine, "commit", fail)
        raise OperationalError("COMMIT", {}, sqlite3.OperationalError("disk I/O error"))

    sqlalchemy_event.listen(site.engine, "commit", fail)
    assert post(site, "/v1/predictions", content=orjson.dumps(events), headers=BATCH).status_code == 503
    answer = post(site, "/v1/predictions", content=orjson.dumps(events), headers=BATCH)
    assert [one["outcome"] for one in answer.json()["results"]] == ["stored"] * 3, "nothing of the first try is there"


def test_an_answer_that_was_written_is_written_anew_when_what_it_says_changed(site, monkeypatch):
    events = [make_prediction(number, site.clock()) for number in range(3)]
    store, tries = intake.Intake._store, []

    def be_cut_off(self, group):
        store(self, group)
        tries.append(group)
        if len(tries) == 1:
            site.clock.now += timedelta(seconds=1)
            raise OperationalError("COMMIT", {}, sqlite3.OperationalError("cut off"), connection_invalidated=True)

    monkeypatch.setattr(intake.Intake, "_store", be_cut_off)
    monkeypatch.setattr(intake.Arrival, "settle", settle_last(intake.Arrival.settle, tries))
    answer = post(site, "/v1/predictions", content=orjson.dumps(events), headers=BATCH)
    assert answer.status_code == 202
    assert len(tries) == 2
    assert [one["outcome"] for one in answer.json()["results"]] == ["duplicate"] * 3, "the first try was committed all the same"


def settle_last(settle, tries):
    """The first try's commit is never heard of."""
    return lambda arrival, outcome: settle(arrival, outcome) if tries else None


def test_one_request_s_failure_is_not_its_neighbour_s(site, monkeypatch):
    parse = intake.parse

    def fail_on_seven(arrival):
        if b'"p7"' in arrival.body:
            raise RuntimeError("unforeseen")
        return parse(arrival)

    monkeypatch.setattr(intake, "parse", fail_on_seven)

    async def send_all():
        async with site.client("node") as client:
            return await asyncio.gather(*(client.post("/v1/predictions", json=make_prediction(n, site.clock())) for n in range(10)))

    answers = asyncio.run(send_all())
    assert [answer.status_code for answer in answers] == [500 if number == 7 else 202 for number in range(10)]


def test_neither_claims_nor_tokens_reach_the_log(site, capsys):
    marked = make_prediction(1, site.clock(), input={"note": "SECRET-CLAIM"}, claim_id="SECRET-ID")
    post(site, "/v1/predictions", json=marked)
    post(site, "/v1/predictions", json={**marked, "id": "SECRET-CLAIM", "data": {**marked["data"], "confidence": 7}})
    with site.engine.begin() as connection:
        connection.execute(text("DROP TABLE events"))
    post(site, "/v1/predictions?token=SECRET-QUERY", json=marked)
    shown = "".join(capsys.readouterr())
    assert '"route": "/v1/predictions", "status": 202' in shown
    assert "SECRET" not in shown
    assert site.secrets["node"] not in shown


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.binary(max_size=200) | JSON.map(lambda value: orjson.dumps(value, default=str) if _is_plain(value) else b"[1e999]")


def _is_plain(value):
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return False
    return True


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES, changes=st.dictionaries(st.sampled_from(["input", "confidence", "group", "occurred_at", "attributes"]), JSON))
def test_nothing_that_is_sent_breaks_the_door(site, body, changes):
    event = make_prediction(1, site.clock())
    crafted = orjson.dumps({**event, "data": {**event["data"], **changes}}) if _is_plain(changes) else body
    for headers in (BATCH, LINES, {"Content-Type": "application/json"}):
        for content in (body, crafted):
            assert post(site, "/v1/predictions", content=content, headers=headers).status_code in {202, 400, 409, 422}


def test_openapi_describes_bodies_and_refusals(site):
    told = get(site, "/openapi.json", None).json()
    body = told["paths"]["/v1/predictions"]["post"]["requestBody"]["content"]
    assert body["application/cloudevents+json"]["schema"] == {"$ref": "#/components/schemas/PredictionEvent"}
    assert "input" in told["components"]["schemas"]["PredictionMade"]["properties"]
    assert {"202", "400", "401", "403", "409", "413", "415", "422", "503"} <= told["paths"]["/v1/labels"]["post"]["responses"].keys()
    assert "/review" not in told["paths"]
    assert get(site, "/docs", None).status_code == 404


def test_an_unknown_address_and_a_wrong_method_are_told_in_the_same_form(site):
    assert problem(get(site, "/v1/nothing"))["value"] == "/v1/nothing"
    wrong = get(site, "/v1/predictions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    problem(wrong)


def test_a_large_body_is_read_to_its_end_before_413_unless_the_client_waits_to_be_asked(engine, now, tmp_path):
    small = Site(engine, lambda: now, tmp_path, max_body_bytes=1000)
    headers = {**LINES, "Expect": "100-continue"}
    try:
        assert post(small, "/v1/predictions", content=b" " * 5000, headers=headers).status_code == 413
    finally:
        small.app.state.site.intake.close()


def test_a_wrong_type_of_event_is_refused_at_the_other_s_door(site):
    answer = post(site, "/v1/labels", "ann", json=envelope("ratchet.prediction.made.v1", "x", {}, "node"))
    assert answer.status_code == 422
