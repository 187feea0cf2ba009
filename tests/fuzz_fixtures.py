"""Malformed requests against the real daemon, and what is counted afterwards.

Four kinds: requests that schemathesis makes from the served OpenAPI, good ones and bad ones; events that Hypothesis damages, between
sound ones; forms sent to the pages within a session; and bytes that are no HTTP at all.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sqlite3
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import hypothesis
import requests
from hypothesis import strategies as st

from storage import db, ledger
from tests.daemon_fixtures import Daemon
from tests.event_fixtures import make_label, make_prediction

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.core.failures import FailureGroup
    from schemathesis.core.result import Ok
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SEEDED = 20
Tell = Callable[[int], None]
FORMS = ("application/json", "application/cloudevents+json", "application/cloudevents-batch+json", "application/x-ndjson")
FAULTS = ("role_died", "role_did_not_stop", "stage_failed", "request_failed")

surprising = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["\x00", "\ud800", "x" * 300_000, 10**400, 1.7, float("nan"), "2026-13-01", "2026-01-01T00:00:00", "../../etc", []]),
    st.recursive(
        st.none() | st.text(max_size=3), lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=20
    ),
)
"""A value where another one belongs."""
junk = st.one_of(
    st.binary(max_size=500),
    st.sampled_from([b"", b"[", b"{}", b"[]", b"[[]]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe", b"NaN", b'{"id":1e999}']),
)
"""A body that is no event."""


@dataclass
class Target:
    """A daemon under attack, and what came of it."""

    daemon: Daemon
    secrets: dict[str, str]
    seed: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    acknowledged: set[str] = field(default_factory=set)
    sound: int = 0
    complaints: list[str] = field(default_factory=list)
    """Answers with 5xx, no answer at all, or one that the OpenAPI does not know."""

    def __post_init__(self) -> None:
        self.session = requests.Session()
        self.session.trust_env = False
        self.numbers = iter(range(10**9))
        for number in range(SEEDED):  # cases for the reviews to be attacked
            self.send_sound(make_prediction(number, datetime.now(UTC), prediction_id=f"seed{number}", confidence=0.1))
        review = {"Authorization": f"Bearer {self.secrets['ops']}"}
        self.reviews = [
            one["id"] for one in self.daemon.wait_for(lambda: self.session.get(f"{self.daemon.url}/v1/reviews", headers=review).json())
        ]

    def note(self, response: Any) -> None:
        """Count an answer, and keep what it acknowledged."""
        self.statuses[response.status_code] += 1
        if response.status_code == 202:
            told = response.json()
            self.acknowledged |= {one["ulid"] for one in told.get("results", [told]) if one.get("ulid") and "error" not in one}

    def send(self, method: str, path: str, name: str | None = None, **options: Any) -> requests.Response | None:
        """Send one request as the owner of a token; None when it was not answered."""
        headers = options.pop("headers", {}) | ({"Authorization": f"Bearer {self.secrets[name]}"} if name else {})
        try:
            response = self.session.request(
                method, f"{self.daemon.url}{path}", headers=headers, timeout=30, allow_redirects=False, **options
            )
        except requests.RequestException as error:
            self.complaints.append(f"{method} {path}: {type(error).__name__}")
            return None
        self.note(response)
        if response.status_code >= 500:
            self.complaints.append(f"{method} {path}: {response.status_code}")
        return response

    def send_sound(self, event: Any) -> None:
        """Send an event that must be taken."""
        response = self.send("POST", "/v1/predictions", "node", json={**event, "id": f"sound-{next(self.numbers)}", "source": "sound"})
        self.sound += 1
        if response is None or response.status_code != 202:
            self.complaints.append("a sound event was not taken")

    def attack(self, requests_made: int, tell: Tell = lambda _: None) -> None:
        """Make at least so many requests of all kinds."""
        share = max(requests_made // 20, 1)
        for size, work in ((14 * share, self.attack_api), (4 * share, self.attack_events), (2 * share, self.attack_pages)):
            work(size, tell)
            tell(self.statuses.total())
        for body in (
            b"\r\n\r\n",
            b"GET\x00/ HTTP/9\r\n\r\n",
            b"POST /v1/labels HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"\x16\x03\x01" * 99,
        ):
            self.send_bytes(body)
        while self.statuses.total() < requests_made:
            self.send_sound(make_prediction(next(self.numbers), datetime.now(UTC), prediction_id=f"more{next(self.numbers)}"))

    def attack_api(self, size: int, tell: Tell) -> None:
        """Requests from the OpenAPI, to every route with every role and with none."""
        schema = schemathesis.openapi.from_dict(self.session.get(f"{self.daemon.url}/openapi.json").json())
        operations: list[Any] = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
        for operation in operations:
            modes = [operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode]
            names, ids = st.sampled_from([*self.secrets, None]), st.sampled_from([None, *self.reviews])
            self.explore(st.tuples(st.one_of(modes), names, ids), self.call, -(-size // len(operations)))
            tell(self.statuses.total())

    def call(self, drawn: tuple[Any, str | None, str | None]) -> None:
        case, name, review = drawn
        if review is not None and "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = review
        headers = {"Authorization": f"Bearer {self.secrets[name]}"} if name else {}
        try:
            response = case.call(base_url=self.daemon.url, session=self.session, headers=headers, timeout=30)
            self.note(response)
            case.validate_response(response, checks=CHECKS)
        except (FailureGroup, AssertionError) as failure:
            self.complaints.append(f"{case.method} {case.path}: {failure!r}"[:500])
        except requests.RequestException as error:
            self.complaints.append(f"{case.method} {case.path}: {type(error).__name__}")

    def attack_events(self, size: int, _: Tell) -> None:
        """Damaged events in every form, each request with a sound one in it where the form takes several."""
        names = st.sampled_from([*self.secrets, *["node"] * len(self.secrets)])
        self.explore(
            st.tuples(st.sampled_from(["predictions", "labels"]), st.sampled_from(FORMS), names, st.data()), self.send_damaged, size
        )

    def send_damaged(self, drawn: tuple[str, str, str, Any]) -> None:
        path, form, name, data = drawn
        number, now = next(self.numbers), datetime.now(UTC)
        event = (make_prediction if path == "predictions" else make_label)(number, now)
        body = data.draw(junk) if data.draw(st.integers(0, 4)) == 0 else write(damage(event, data))
        if form not in FORMS[:2] and path == "predictions" and name == "node":
            sound = {**make_prediction(number, now, prediction_id=f"between{number}"), "id": f"between-{number}"}
            parts = [write(sound), body.replace(b"\n", b" ")]
            body = b"\n".join(parts) if form.endswith("ndjson") else b"[" + b",".join(parts) + b"]"
        self.send("POST", f"/v1/{path}", name, data=body, headers={"Content-Type": form})

    def attack_pages(self, size: int, _: Tell) -> None:
        """Forms as a browser sends them and as none would, by somebody who is logged in."""
        page = self.session.get(f"{self.daemon.url}/login").text
        form = {"token": self.secrets["ann"], "csrf": find_csrf(page)}
        self.session.post(f"{self.daemon.url}/login", data=form)
        csrf = find_csrf(self.session.get(f"{self.daemon.url}/status").text)
        paths = st.sampled_from(
            [
                "/review",
                "/status",
                "/login",
                "/static/",
                "/static/../app.py",
                "/review/%00",
                *(f"/review/{one}{what}" for one in self.reviews[:3] for what in ("", "/answer", "/skip", "/reveal")),
            ]
        )
        fields = st.dictionaries(
            st.sampled_from(["answer", "rationale", "reason", "seconds_spent", "token", "next"]), st.text(max_size=30) | st.just("APPROVED")
        )
        self.explore(st.tuples(st.sampled_from(["GET", "POST"]), paths, fields, st.sampled_from([csrf, csrf, ""])), self.send_form, size)

    def send_form(self, drawn: tuple[str, str, dict[str, str], str]) -> None:
        method, path, fields, csrf = drawn
        encoded = {name: value.encode("utf-8", "surrogatepass") for name, value in fields.items()}
        self.send(method, path, data=encoded | {"csrf": csrf}, headers={"Accept": "text/html"})

    def send_bytes(self, body: bytes) -> None:
        """Bytes that are no HTTP: whatever is answered, the daemon must outlive it."""
        host, port = str(self.daemon.url).removeprefix("http://").split(":")
        with contextlib.suppress(OSError, http.client.HTTPException), socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(body)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)

    def explore(self, strategy: st.SearchStrategy[Any], work: Callable[[Any], None], size: int) -> None:
        """Draw so many examples, the same ones for the same seed."""

        @hypothesis.seed(self.seed)
        @hypothesis.settings(
            max_examples=size,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(strategy)
        def explore(drawn: Any) -> None:
            work(drawn)

        explore()


def find_csrf(page: str) -> str:
    """The token of a page's forms."""
    found = re.search(r'name="csrf" value="([0-9a-f]+)"', page)
    assert found is not None, page
    return found[1]


def damage(event: dict[str, Any], data: Any) -> dict[str, Any]:
    """The event with up to three fields put right out of order: another value, none, or one too many."""
    event = json.loads(json.dumps(event))
    for _ in range(data.draw(st.integers(1, 3))):
        place = event["data"] if data.draw(st.booleans()) and isinstance(event.get("data"), dict) else event
        name = data.draw(st.sampled_from([*place, "extra", "\x00"]))
        if data.draw(st.integers(0, 3)) == 0:
            place.pop(name, None)
        else:
            place[name] = data.draw(surprising)
    return event


def write(event: Any) -> bytes:
    """JSON as careless senders write it: with NaN, and half surrogate pairs as escapes."""
    return json.dumps(event).encode()


@dataclass(frozen=True)
class Tally:
    """What is left: all but the first two should be 0."""

    requests: int
    acknowledged: int
    complaints: int
    lost: int
    ledger_breaks: int
    faults: int


def count(target: Target) -> Tally:
    """Wait until everything is handled, and see what became of what was acknowledged."""
    database, daemon = target.daemon.home / "ratchet.db", target.daemon
    target.send_sound(make_prediction(0, datetime.now(UTC), prediction_id="the-last"))
    with contextlib.closing(sqlite3.connect(database, timeout=30)) as connection:
        daemon.wait_for(lambda: connection.execute("SELECT count(*) FROM events WHERE state = 'received'").fetchone() == (0,))
        kept = {row[0] for row in connection.execute("SELECT ulid FROM events WHERE state IN ('handled', 'waiting', 'dead')")}
        applied = connection.execute(
            "SELECT count(*) FROM events JOIN predictions ON predictions.id = events.ulid WHERE events.source = 'sound'"
        ).fetchone()[0]
    engine = db.open_engine(f"sqlite:///{database}")
    with db.reading(engine) as connected:
        breaks = len(ledger.verify(connected))
    engine.dispose()
    faults = [line for line in daemon.lines() if line["event"] in FAULTS]
    lost = len(target.acknowledged - kept) + target.sound - applied
    return Tally(target.statuses.total(), len(target.acknowledged), len(target.complaints), lost, breaks, len(faults))
