"""daemon.web.reviews and desk: one expert a case, no hint at the model's answer before theirs, and one door for labels."""

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy import text

from storage import db, predictions, reviews
from tests.event_fixtures import make_label, make_prediction, send
from tests.web_fixtures import Site, site

pytestmark = pytest.mark.databases("sqlite", "postgresql")

__all__ = ["site"]
HINTS = ("APPROVED-BY-MODEL", "0.4321", "v9.9", "below_threshold", "must_review")


@pytest.fixture
def queued(site: Site) -> Site:
    """A site with three cases in its queue."""
    labels = ("APPROVED", "DENIED", "PENDING")
    sent = [make_prediction(n, site.clock(), confidence=0.4321, decision=labels[n % 3], model_version="v9.9") for n in range(3)]
    send(site.engine, sent, site.clock())
    site.handle()
    return site


def call(site, name, method, path, **options):
    async def ask():
        async with site.client(name) as client:
            return await client.request(method, "/v1/reviews" + path, **options)

    return asyncio.run(ask())


def take(site, name="ann"):
    answer = call(site, name, "GET", "/next")
    return answer.json() if answer.status_code == 200 else None


def give(site, case, answer, name="ann", **more):
    return call(site, name, "POST", f"/{case['id']}/answer", json={"answer": answer, **more})


def read_labels(site):
    with db.reading(site.engine) as connection:
        return connection.execute(text("SELECT * FROM labels ORDER BY received_at, id")).mappings().all()


def test_a_case_is_shown_to_one_expert_at_a_time(queued):
    first, second = take(queued, "ann"), take(queued, "ben")
    assert first["id"] != second["id"]
    assert take(queued, "ann")["id"] == first["id"]
    assert first["is_yours"]
    assert first["input"] == {"diagnosis": "E11.9", "treatment": "insulin pump"}


def test_nothing_hints_at_the_model_s_answer_before_the_expert_s(queued):
    case = call(queued, "ann", "GET", "/next")
    looked = call(queued, "ann", "GET", f"/{case.json()['id']}")
    for shown in (case, looked):
        assert not any(hint in shown.text for hint in HINTS)
        assert all(shown.json()[name] is None for name in ("model", "reasons", "history", "yours"))
    assert not any("decision" in key or "confidence" in key or "priority" in key for key in case.json())


def test_an_answer_is_a_label_event_like_any_other_and_closes_the_review_at_once(queued):
    case = take(queued)
    done = give(queued, case, "DENIED", rationale="Not documented.", seconds_spent=31.5)
    assert (done.status_code, done.json()["outcome"]) == (202, "stored")
    with db.reading(queued.engine) as connection:
        event = connection.execute(text("SELECT * FROM events WHERE ulid = :ulid"), {"ulid": done.json()["ulid"]}).mappings().one()
    assert (event["type"], event["source"], event["principal"], event["state"]) == ("ratchet.label.submitted.v1", "api", "ann", "handled")
    label = read_labels(queued)[0]
    assert (label["answer"], label["expert"], label["rationale"], label["seconds_spent"]) == ("DENIED", "ann", "Not documented.", 31.5)
    told = call(queued, "ann", "GET", f"/{case['id']}").json()
    assert (told["state"], told["yours"]["answer"], told["model"]["confidence"]) == ("answered", "DENIED", 0.4321)
    assert [step["action"] for step in told["history"]] == ["opened", "leased", "answered"]
    assert take(queued)["id"] != case["id"]


def test_a_double_submit_is_one_label_and_a_changed_answer_supersedes(queued):
    case = take(queued)
    first = give(queued, case, "DENIED")
    assert give(queued, case, "DENIED").json() == {**first.json(), "outcome": "duplicate"}
    queued.clock.now += timedelta(seconds=5)
    assert give(queued, case, "APPROVED").json()["outcome"] == "stored"
    queued.clock.now += timedelta(seconds=5)
    assert give(queued, case, "DENIED").json()["outcome"] == "stored"
    assert [(label["answer"], label["superseded_by"] is None) for label in read_labels(queued)] == [
        ("DENIED", False),
        ("APPROVED", False),
        ("DENIED", True),
    ]


def test_an_answer_to_somebody_else_s_case_is_409_and_says_what_to_do(queued):
    case = take(queued, "ann")
    refused = give(queued, case, "DENIED", "ben")
    assert refused.status_code == 409
    assert "ask for the next one" in refused.json()["error"]["remedy"]
    assert call(queued, "ben", "GET", f"/{case['id']}").json()["input"] is None
    assert read_labels(queued) == []


def test_a_lease_that_ran_out_returns_the_case(queued):
    case = take(queued, "ann")
    queued.clock.now += timedelta(minutes=16)
    assert take(queued, "ben")["id"] == case["id"]
    assert give(queued, case, "DENIED", "ann").status_code == 409
    assert give(queued, case, "DENIED", "ben").status_code == 202


def test_an_answer_that_is_not_one_is_422(queued):
    case = take(queued)
    refused = give(queued, case, "MAYBE")
    assert refused.status_code == 422
    assert "APPROVED, DENIED, PENDING" in refused.json()["error"]["remedy"]
    for body in ({"answer": "DENIED", "color": 1}, {"answer": "DENIED", "seconds_spent": -1}, {"answer": 7}, {}, [], "x"):
        assert call(queued, "ann", "POST", f"/{case['id']}/answer", json=body).status_code == 422
    broken = {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}}
    assert call(queued, "ann", "POST", f"/{case['id']}/answer", **broken).status_code in {400, 422}
    surrogate = {"content": b'{"answer": "DENIED", "\\ud800": "\\ud800"}', "headers": {"Content-Type": "application/json"}}
    assert call(queued, "ann", "POST", f"/{case['id']}/answer", **surrogate).status_code == 422
    assert read_labels(queued) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [('{"answer": "DENIED"}', "text/plain"), ('{"answer": "DEN', "application/json"), ("[]", "application/json"), ("", "application/json")],
)
def test_a_body_that_is_no_json_object_is_told_what_to_send(queued, content, kind):
    case = take(queued)
    refused = call(queued, "ann", "POST", f"/{case['id']}/answer", content=content, headers={"Content-Type": kind})
    assert refused.status_code == 422
    assert refused.json()["error"]["field"] == "body"
    assert refused.json()["error"]["remedy"] == "send one whole JSON object, with the header `Content-Type: application/json`"


def test_a_skipped_case_goes_to_another_expert_with_its_reason(queued):
    case = take(queued, "ann")
    assert call(queued, "ann", "POST", f"/{case['id']}/skip", json={"reason": "I know the member"}).status_code == 204
    assert take(queued, "ann")["id"] != case["id"]
    assert take(queued, "ben")["id"] == case["id"]
    history = call(queued, "ops", "GET", f"/{case['id']}").json()["history"]
    assert ("ann", "skipped", "I know the member") in [(step["actor"], step["action"], step["note"]) for step in history]
    assert call(queued, "ann", "POST", f"/{case['id']}/skip", json={"reason": "again"}).status_code == 409
    assert call(queued, "ann", "POST", f"/{case['id']}/skip", json={"reason": ""}).status_code == 422


def test_looking_at_the_model_s_answer_first_is_recorded(queued):
    case = take(queued)
    shown = call(queued, "ann", "POST", f"/{case['id']}/reveal").json()
    assert shown["model"]["version"] == "v9.9"
    assert "revealed" in [step["action"] for step in shown["history"]]
    assert call(queued, "ben", "POST", f"/{case['id']}/reveal").status_code == 409


def test_a_blind_case_never_shows_it_before_the_answer(queued):
    with db.writing(queued.engine) as connection:
        for row in reviews.list_live(connection):
            case = predictions.read(connection, row["prediction"])
            reviews.ask_for_exam(connection, case, "adjudication", None, "exam", queued.clock())
    case = take(queued)
    refused = call(queued, "ann", "POST", f"/{case['id']}/reveal")
    assert refused.status_code == 409
    assert "blind" in refused.json()["error"]["remedy"]
    assert call(queued, "ann", "GET", f"/{case['id']}").json()["model"] is None
    give(queued, case, "DENIED")
    assert call(queued, "ann", "GET", f"/{case['id']}").json()["model"] is not None


def test_a_case_that_becomes_blind_hides_what_was_revealed(queued):
    case = take(queued)
    call(queued, "ann", "POST", f"/{case['id']}/reveal")
    with db.writing(queued.engine) as connection:
        row = predictions.read(connection, reviews.read(connection, case["id"])["prediction"])
        reviews.ask_for_exam(connection, row, "adjudication", None, "exam", queued.clock())
    assert take(queued)["model"] is None


def test_when_nothing_waits_next_is_204(site):
    assert call(site, "ann", "GET", "/next").status_code == 204
    assert call(site, "ann", "GET", "/next", params={"agent": "adjudication"}).status_code == 204
    assert call(site, "ann", "GET", "/next", params={"agent": "nobody"}).status_code == 422


def test_the_queue_is_the_operator_s_and_holds_no_contents(queued):
    listed = call(queued, "ops", "GET", "")
    assert len(listed.json()) == 3
    assert "insulin" not in listed.text
    for name, path in (("ann", ""), ("node", "/next"), ("ops", "/next"), ("node", "/01KJPY44E0SJ0B0HPRJC1B9XZN")):
        assert call(queued, name, "GET", path).status_code == 403


def test_an_unknown_review_is_404(site):
    for method, path in (("GET", ""), ("POST", "/reveal")):
        assert call(site, "ann", method, "/01KJPY44E0SJ0B0HPRJC1B9XZN" + path).status_code == 404
    assert give(site, {"id": "01KJPY44E0SJ0B0HPRJC1B9XZN"}, "DENIED").status_code == 404


def test_an_answer_after_the_lease_ran_out_is_taken_while_nobody_else_has_the_case(queued):
    case = take(queued, "ann")
    queued.clock.now += timedelta(minutes=16)
    assert give(queued, case, "DENIED", rationale="Thought about for long.").status_code == 202
    assert read_labels(queued)[0]["rationale"] == "Thought about for long."
    assert call(queued, "ann", "GET", f"/{case['id']}").json()["state"] == "answered"


def test_who_lost_the_case_and_its_answer_to_another_expert_is_told_so(queued):
    case = take(queued, "ann")
    queued.clock.now += timedelta(minutes=16)
    assert give(queued, take(queued, "ben"), "DENIED", "ben").status_code == 202
    refused = give(queued, case, "DENIED", "ann")
    assert (refused.status_code, "answered by another expert: ask for the next one" in refused.text) == (409, True)


def test_an_expired_case_is_not_answered_any_more(queued):
    case = take(queued)
    with db.writing(queued.engine) as connection:
        connection.execute(text("UPDATE reviews SET state = 'expired', leased_by = NULL, lease_until = NULL, closed_at = opened_at"))
    refused = give(queued, case, "DENIED")
    assert (refused.status_code, "is not asked any more" in refused.text) == (409, True)


def test_a_label_that_came_by_another_way_closes_the_case_and_the_holders_answer_is_a_second_read(queued):
    case = take(queued)
    number = int(case["claim_id"].removeprefix("c"))
    send(queued.engine, [make_label(number, queued.clock(), expert="ben")], queued.clock(), queued.principal("ben"))
    queued.handle()
    assert call(queued, "ann", "GET", f"/{case['id']}").json()["model"] is None
    assert give(queued, case, "APPROVED", rationale="I read it too.").status_code == 202
    kinds = [(label["expert"], label["kind"], label["review"], label["rationale"]) for label in read_labels(queued)]
    assert kinds == [("ben", "review", case["id"], None), ("ann", "second_read", case["id"], "I read it too.")]


def test_an_agent_that_is_not_there_is_refused_by_name_and_not_taken_for_one_without_cases(queued):
    for who, path in (("ann", "/next"), ("ops", "")):
        refused = call(queued, who, "GET", f"{path}?agent=zz")
        assert (refused.status_code, refused.json()["error"]["value"]) == (422, '"zz"')
