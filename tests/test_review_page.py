"""daemon.web.pages and sessions: experts review in a real browser, with the keyboard alone, without JavaScript, and nobody else can."""

import asyncio
import re
from datetime import timedelta

import pytest
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from consumers import handlers
from daemon.web import fields, pages
from storage import db, predictions, reviews, tokens
from tests.browser_fixtures import address, chromium
from tests.event_fixtures import make_prediction, send
from tests.web_fixtures import Site, site

__all__ = ["address", "chromium", "site"]
CLOSED = "leased_by = NULL, lease_until = NULL, closed_at = opened_at"
EVIL = "<script>document.title='broken in'</script><img src=x onerror=\"document.title='broken in'\">"
CLAIM = {
    "diagnosis": "E11.9",
    "billed_amount": 8450.0,
    "urgent": True,
    "note": EVIL,
    EVIL: {"plan": {"name": EVIL}},
    "lines": [{"code": "E0784", "amount": 6900.0}, {"code": EVIL, "amount": None}],
    "criteria": ["HbA1c above 7 %", EVIL],
}


@pytest.fixture
def queued(site: Site) -> Site:
    """A site with three cases that all hold a script."""
    sent = [
        make_prediction(number, site.clock(), input=CLAIM, confidence=0.4321 + number / 10, model_version="v9.9", attributes={"line": EVIL})
        for number in range(3)
    ]
    send(site.engine, sent, site.clock())
    site.handle()
    return site


def count_labels(site):
    with db.reading(site.engine) as connection:
        return connection.execute(text("SELECT count(*) FROM labels")).scalar_one()


def read_steps(site, action):
    with db.reading(site.engine) as connection:
        return connection.execute(text("SELECT * FROM review_steps WHERE action = :action"), {"action": action}).mappings().all()


class Browser:
    """Chromium at the site's address; a page that was sent is waited for."""

    def __init__(self, driver, address, site):
        self.driver, self.address, self.site = driver, address, site

    def go(self, path):
        self.driver.get(self.address + path)

    def press(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def press_with_alt(self, key):
        ActionChains(self.driver).key_down(Keys.ALT).send_keys(key).key_up(Keys.ALT).perform()

    def tab_to(self, selector):
        """Press Tab until the element has the focus, as somebody without a mouse does."""
        for _ in range(40):
            self.press(Keys.TAB)
            if self.driver.switch_to.active_element in self.driver.find_elements(By.CSS_SELECTOR, selector):
                return
        raise AssertionError(f"Tab never reached {selector}")

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def wait_for(self, heading):
        waiting = WebDriverWait(self.driver, 10, ignored_exceptions=[StaleElementReferenceException, NoSuchElementException])
        waiting.until(lambda driver: heading in driver.find_element(By.TAG_NAME, "main").text)

    def log_in(self, name="ann"):
        self.go("/login")
        self.press(self.site.secrets[name], Keys.ENTER)
        WebDriverWait(self.driver, 5).until(lambda driver: not driver.current_url.endswith("/login"))


@pytest.fixture
def browser(chromium, address, queued):
    """A browser that nobody has used."""
    chromium.delete_all_cookies()
    yield Browser(chromium, address, queued)
    chromium.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_an_expert_reviews_with_the_keyboard_alone(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    browser.tab_to("#rationale")
    browser.press("Two documented events, nothing else")
    browser.tab_to("button[value=DENIED]")
    browser.press(Keys.ENTER)
    browser.wait_for("You and the model differ")
    assert "0 more waiting" not in browser.find("main").text
    assert browser.driver.switch_to.active_element.text.startswith("Next case")
    browser.press(Keys.ENTER)
    browser.wait_for("Claim c1")
    assert "1 answered today" in browser.find("main").text
    with db.reading(browser.site.engine) as connection:
        label = connection.execute(text("SELECT * FROM labels")).mappings().one()
        event = connection.execute(text("SELECT * FROM events WHERE ulid = :id"), {"id": label["id"]}).mappings().one()
    assert (label["answer"], label["expert"], label["rationale"]) == ("DENIED", "ann", "Two documented events, nothing else")
    assert (event["type"], event["source"]) == ("ratchet.label.submitted.v1", "review-page")


def test_one_key_answers_but_not_while_one_writes(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    browser.find("#rationale").click()
    browser.press("add a pump")
    assert count_labels(browser.site) == 0
    browser.find("h1").click()
    browser.press("a")
    browser.wait_for("You and the model agree")
    browser.press("n")
    browser.wait_for("Claim c1")
    browser.press_with_alt("p")
    browser.wait_for("You and the model differ")


def test_everything_works_without_javascript(browser):
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    browser.log_in()
    browser.wait_for("Claim c0")
    browser.find("details summary").click()
    browser.find("#reason").send_keys("I know the member", Keys.ENTER)
    browser.wait_for("Claim c1")
    browser.press_with_alt("d")
    browser.wait_for("You and the model differ")
    browser.site.clock.now += timedelta(seconds=20)
    browser.find("details summary").click()
    browser.find("button[value=APPROVED]").click()
    browser.wait_for("You and the model agree")
    browser.find("a.primary").click()
    browser.wait_for("Claim c2")
    browser.find("button[value=APPROVED]").click()
    browser.wait_for("agree")
    browser.find("a.primary").click()
    browser.wait_for("Nothing to review")
    assert "1 waits for somebody else" in browser.find("main").text
    assert count_labels(browser.site) == 3
    browser.find(".who button").click()
    browser.wait_for("Log in")


def test_what_an_expert_wrote_outlives_a_session_that_ended_meanwhile(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    browser.find("#rationale").send_keys("Two documented events,\n<b>nothing</b> else")
    browser.driver.delete_all_cookies()
    browser.find("button[value=DENIED]").click()
    browser.wait_for("What you wrote is kept")
    browser.press("wrong", Keys.ENTER)
    browser.wait_for("not known, or was revoked")
    browser.press(browser.site.secrets["ann"], Keys.ENTER)
    browser.wait_for("Claim c0")
    assert "did not arrive" in browser.find("main").text
    assert count_labels(browser.site) == 0
    browser.find("button[value=DENIED]").click()
    browser.wait_for("You and the model differ")
    with db.reading(browser.site.engine) as connection:
        label = connection.execute(text("SELECT answer, rationale FROM labels")).one()
    assert tuple(label) == ("DENIED", "Two documented events,\n<b>nothing</b> else")


def test_what_an_expert_wrote_outlives_a_log_in_in_another_tab(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    browser.find("details summary").click()
    browser.find("#reason").send_keys("I know the member")
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.log_in()
    browser.driver.close()
    browser.driver.switch_to.window(first)
    browser.find("#reason").send_keys(Keys.ENTER)
    browser.wait_for("did not arrive")
    assert browser.find("#reason").get_attribute("value") == "I know the member"
    browser.find("#reason").send_keys(Keys.ENTER)
    browser.wait_for("Claim c1")
    assert [step["note"] for step in read_steps(browser.site, "skipped")] == ["I know the member"]


def test_text_from_a_claim_is_never_markup(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    assert browser.driver.title == "Review · Ratchet"
    assert browser.find("main").text.count("<script>document.title='broken in'</script>") == 6
    assert not browser.driver.find_elements(By.CSS_SELECTOR, "main script, main img")
    assert [row.text for row in browser.driver.find_elements(By.CSS_SELECTOR, "td.number")] == ["6900"]


def test_the_model_s_answer_is_not_in_the_page_until_asked_for_and_that_is_recorded(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    for hint in ("43%", "0.4321", "v9.9", "below_threshold"):
        assert hint not in browser.driver.page_source
    browser.tab_to("form[action$=reveal] button")
    browser.press(Keys.SPACE)
    browser.wait_for("43% sure")
    assert [step["actor"] for step in read_steps(browser.site, "revealed")] == ["ann"]


def test_the_page_loads_nothing_from_elsewhere_and_has_what_readers_need(browser):
    browser.log_in()
    browser.wait_for("Claim c0")
    loaded = browser.driver.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
    assert loaded
    assert all(one.startswith(browser.address) for one in loaded)
    for control in browser.driver.find_elements(By.CSS_SELECTOR, "main input:not([type=hidden]), main textarea, main button"):
        assert control.accessible_name or not control.is_displayed()
    assert browser.find("html").get_attribute("lang") == "en"
    browser.driver.set_window_size(400, 800)
    overflow = browser.driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    browser.driver.set_window_size(1280, 900)
    assert overflow <= 0


# What follows needs no browser: what somebody with other intentions might send.


def visit(site, name, *steps, accept="*/*"):
    """Log in and take steps `(method, path, form)`; returns the answers, the first of them to the log-in."""

    async def walk():
        async with site.client(accept=accept) as client:
            page = await client.get("/login")
            answers = [await client.post("/login", data={"csrf": read_csrf(page), "token": site.secrets.get(name, name)})]
            for method, path, form in steps:
                page = await client.get("/status")
                known = {"csrf": read_csrf(page)} if page.status_code == 200 else {}
                answers.append(await client.request(method, path, data=known | form if method == "POST" else None))
            return answers

    return asyncio.run(walk())


def read_csrf(page):
    return re.search(r'name="csrf" value="([0-9a-f]+)"', page.text)[1]


def lease(site, name="ann"):
    with db.writing(site.engine) as connection:
        return reviews.lease_next(connection, ["adjudication"], name, site.clock(), timedelta(minutes=15))["id"]


@pytest.mark.parametrize("change", ["leased_by = 'ben'", f"state = 'answered', {CLOSED}", f"state = 'expired', {CLOSED}"])
def test_a_refused_answer_repeats_the_rationale_and_never_as_markup(queued, change):
    review = lease(queued)
    with db.writing(queued.engine) as connection:
        connection.execute(text(f"UPDATE reviews SET {change} WHERE state = 'leased'"))
        connection.execute(text("UPDATE review_steps SET actor = 'ben' WHERE action = 'leased'"))
    form = {"answer": "DENIED", "rationale": f"Thought about for long.\n{EVIL}"}
    answer = visit(queued, "ann", ("POST", f"/review/{review}/answer", form), accept="text/html")[1]
    assert answer.status_code == 409
    assert "Thought about for long.\n&lt;script&gt;" in answer.text
    assert "<script>" not in answer.text
    assert count_labels(queued) == 0


def test_an_answer_that_the_database_can_t_take_is_not_lost_to_the_expert(queued, monkeypatch):
    def fail(*_):
        raise OperationalError("INSERT", {}, Exception("database is locked"))

    review = lease(queued)
    monkeypatch.setattr(handlers, "handle_batch", fail)
    step = ("POST", f"/review/{review}/answer", {"answer": "DENIED", "rationale": "Thought about for long."})
    answer = visit(queued, "ann", step, accept="text/html")[1]
    assert (answer.status_code, "Thought about for long." in answer.text) == (503, True)


def log_in_with_draft(site, name, draft):
    """What a browser does whose session ended while its owner wrote: the form leads to the log-in, which brings the text along."""

    async def walk():
        async with site.client(accept="text/html") as client:
            page = await client.post(f"/review/{draft['review']}/answer", data={**draft, "answer": "DENIED", "csrf": "old"})
            assert page.status_code == 401
            return await client.post("/login", data={**draft, "csrf": read_csrf(page), "token": site.secrets[name]})

    return asyncio.run(walk())


def test_what_was_written_comes_back_with_its_case_also_when_the_lease_ran_out(queued):
    draft = {"review": lease(queued), "rationale": "Thought about for long."}
    queued.clock.now += timedelta(hours=13)
    page = log_in_with_draft(queued, "ann", draft)
    assert (page.status_code, "Thought about for long." in page.text, "Claim <span" in page.text) == (200, True, True)
    assert [step["actor"] for step in read_steps(queued, "leased")] == ["ann", "ann"]


def test_what_was_written_is_shown_to_copy_where_the_case_is_lost(queued):
    draft = {"review": lease(queued), "rationale": "Thought about for long."}
    for name, status in (("ben", 409), ("ops", 403)):
        page = log_in_with_draft(queued, name, draft)
        assert (page.status_code, "You had written" in page.text, "Thought about for long." in page.text) == (status, True, True)
        assert page.cookies["ratchet_session"]


def test_a_changed_answer_counts_as_one_case_of_the_day(queued):
    review = lease(queued)
    first, second = ({"answer": answer} for answer in ("DENIED", "APPROVED"))
    path = f"/review/{review}"
    page = visit(queued, "ann", ("POST", f"{path}/answer", first), ("POST", f"{path}/answer", second), ("GET", path, {}))[-1]
    assert count_labels(queued) == 2
    assert "<strong>1</strong> answered today" in page.text


def test_a_stranger_is_sent_to_the_log_in(queued):
    async def look():
        async with queued.client() as client:
            return [await client.get(path) for path in ("/review", "/status", f"/review/{lease(queued)}")]

    assert [(answer.status_code, answer.headers["location"]) for answer in asyncio.run(look())] == [(303, "/login")] * 3


def test_the_session_is_a_signed_cookie_that_scripts_and_other_sites_can_t_use(queued):
    answer = visit(queued, "ann")[0]
    cookie = answer.headers["set-cookie"]
    assert answer.headers["location"] == "/review"
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/", "Max-Age=43200"))
    assert queued.secrets["ann"] not in cookie

    async def forge():
        async with queued.client() as client:
            value = cookie.split("=", 1)[1].split(";")[0]
            given = ["", "x", "." * 5, value[:-1] + ("0" if value[-1] != "0" else "1"), "A" + value, "é.é"]
            return [await client.get("/review", headers={b"Cookie": f"ratchet_session={one}".encode()}) for one in given]

    assert {answer.headers["location"] for answer in asyncio.run(forge())} == {"/login"}


def test_a_session_ends_with_its_time_and_with_its_token(queued):
    async def stay():
        async with queued.client() as client:
            page = await client.get("/login")
            await client.post("/login", data={"csrf": read_csrf(page), "token": queued.secrets["ann"]})
            before = await client.get("/review")
            with db.writing(queued.engine) as connection:
                tokens.revoke(connection, "ann", queued.clock())
            return before.status_code, (await client.get("/review")).status_code

    assert asyncio.run(stay()) == (200, 303)
    late = visit(queued, "ben")[0]
    queued.clock.now += timedelta(hours=13)

    async def return_late():
        async with queued.client(cookies={"ratchet_session": late.cookies["ratchet_session"]}) as client:
            return (await client.get("/review")).status_code

    assert asyncio.run(return_late()) == 303


@pytest.mark.parametrize("path", ["answer", "skip", "reveal"])
def test_a_form_without_its_token_does_nothing(queued, path):
    review = lease(queued)
    form = {"answer": "DENIED", "reason": "because", "csrf": "0" * 64}
    answer = visit(queued, "ann", ("POST", f"/review/{review}/{path}", form))[1]
    assert answer.status_code == 403
    assert visit(queued, "ann", ("POST", "/logout", {"csrf": "é"}))[1].status_code == 403
    assert count_labels(queued) == 0
    assert not read_steps(queued, "revealed") + read_steps(queued, "skipped")


def test_a_log_in_needs_the_form_s_token_and_a_known_secret(queued):
    async def try_without():
        async with queued.client() as client:
            return (await client.post("/login", data={"token": queued.secrets["ann"]})).status_code

    assert asyncio.run(try_without()) == 403
    refused = visit(queued, "rat_unknown")[0]
    assert refused.status_code == 401
    assert "not known, or was revoked" in refused.text


def test_cases_are_for_reviewers(queued):
    for name in ("ops", "node"):
        logged_in, refused = visit(queued, name, ("GET", "/review", {}))
        assert logged_in.headers["location"] == "/status"
        assert refused.status_code == 403


def test_a_double_submit_is_one_label(queued):
    review = lease(queued)
    form = {"answer": "DENIED", "rationale": " because ", "shown_at": queued.clock().isoformat()}
    step = ("POST", f"/review/{review}/answer", form)
    answers = visit(queued, "ann", step, step)
    assert [answer.headers["location"] for answer in answers[1:]] == [f"/review/{review}"] * 2
    assert count_labels(queued) == 1


def test_what_a_form_gets_wrong_is_explained_on_a_page(queued):
    async def send_wrong():
        async with queued.client(accept="text/html") as client:
            page = await client.get("/login")
            await client.post("/login", data={"csrf": read_csrf(page), "token": queued.secrets["ann"]})
            csrf = read_csrf(await client.get("/status"))
            review, other = lease(queued, "ann"), lease(queued, "ben")
            sent = [
                await client.post(f"/review/{review}/answer", data={"csrf": csrf, "answer": EVIL}),
                await client.post(f"/review/{review}/skip", data={"csrf": csrf, "reason": " "}),
                await client.post(f"/review/{review}/skip", data={"csrf": csrf, "reason": "a\x00b"}),
                await client.post(f"/review/{other}/answer", data={"csrf": csrf, "answer": "DENIED"}),
                await client.get("/review/nothing"),
                await client.get("/nothing"),
            ]
            return [*sent, await client.get(f"/review/{review}")]

    answers = asyncio.run(send_wrong())
    assert [answer.status_code for answer in answers] == [422, 422, 422, 409, 422, 404, 303]
    assert all("<h1>" in answer.text and "<script>" not in answer.text for answer in answers[:-1])
    assert "ask for the next one" in answers[3].text.lower()


def test_a_browser_is_told_to_trust_and_keep_nothing(queued):
    answer = visit(queued, "ann", ("GET", "/review", {}))[1]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script(?! src)|style=|onclick", answer.text)


def test_the_time_that_an_answer_took_is_measured_from_the_page(now):
    assert pages.measure_time(now.isoformat(), now + timedelta(seconds=31)) == 31
    for given in ("", "yesterday", "2026-03-02T09:30:00", (now + timedelta(hours=1)).isoformat(), "0001-01-01T00:00:00Z"):
        assert pages.measure_time(given, now) is None


def test_every_answer_has_a_key_of_its_own():
    assert pages.choose_keys(("APPROVED", "DENIED", "PENDING")) == {"APPROVED": "a", "DENIED": "d", "PENDING": "p"}
    assert pages.choose_keys(("deny", "defer", "é")) == {"deny": "d", "defer": "e", "é": "a"}
    many = pages.choose_keys(tuple(f"answer {number}" for number in range(40)))
    assert len({key for key in many.values() if key}) == 36


def test_any_value_is_laid_out_even_one_that_is_nested_absurdly():
    deep = {}
    for _ in range(150):
        deep = {"inner": [deep, 1]}
    shown = fields.lay_out({"billed_amount": 10.5, "nothing": None, "deep": deep, "mixed": [1, {"a": 1}], "yes": True})
    assert [field.name for field in shown] == ["Billed amount", "Nothing", "Deep", "Mixed", "Yes"]
    assert [field.value.kind for field in shown] == ["number", "empty", "group", "list", "text"]
    assert fields.name_field("__") == "__"


def test_a_case_without_its_erased_input_is_shown_still(queued):
    with db.writing(queued.engine) as connection:
        known = connection.execute(text("SELECT id FROM predictions")).scalars().all()
        assert all(row["input"] for row in predictions.read_inputs(connection, known).values())
        connection.execute(text("UPDATE events SET data = NULL"))
        assert not any(row["input"] for row in predictions.read_inputs(connection, known).values())
    assert visit(queued, "ann", ("GET", "/review", {}))[1].status_code == 200
