"""The pages for people: log in, review a case, see how things stand. They need no JavaScript, and nothing from elsewhere."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from consumers import schemas
from daemon import status
from daemon.web import desk, drafts, fields, problems, sessions
from daemon.web import reviews as review_routes
from daemon.web.reviews import ReviewId
from daemon.web.site import Site, SiteHere

FOLDER = Path(__file__).parent
REFRESH_SECONDS = 10
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

router = APIRouter(include_in_schema=False)
Keep, Csrf = Depends(drafts.keep), Depends(sessions.check_form)
OUTDATED = "You had been logged out. What you wrote is kept: log in, and choose your answer once more."


def show_age(moment: datetime, now: datetime) -> str:
    """How long ago it was, as people say it."""
    return show_seconds((now - moment).total_seconds()) + " ago"


def show_seconds(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{max(int(seconds), 0)} s"


def show_percent(share: float) -> str:
    """A share as a percentage."""
    return f"{share:.0%}"


templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.filters |= {"age": show_age, "seconds": show_seconds, "percent": show_percent}


def render(name: str, status_code: int = 200, *, visitor: sessions.Visitor | None = None, **values: Any) -> HTMLResponse:
    """A page."""
    return HTMLResponse(templates.get_template(name).render({"visitor": visitor, "refresh": None, **values}), status_code)


def go_to(address: str) -> RedirectResponse:
    """Send the browser on with a GET, so that reloading the page sends nothing twice."""
    return RedirectResponse(address, 303)


def render_problem(request: Request, code: int, problem: problems.Problem) -> HTMLResponse:
    """The page that says what went wrong, repeats what the person had typed, and leads back to where they came from."""
    draft = drafts.find(request)
    way_on = "/review" if (draft.review or request.url.path.startswith("/review/")) and problem.field != "role" else "/"
    return render("problem.html", code, code=code, problem=problem, way_on=way_on, typed=draft.text)


async def ask_to_log_in(request: Request, _: Exception) -> Response:
    """Send a stranger to the log-in; one who was logged out while they wrote finds it there, and in the case after it."""
    return _ask_for_token(request, request.app.state.site, OUTDATED) if drafts.find(request).text else go_to("/login")


def show_again(request: Request, site: Site) -> Response:
    """Show the case of a form that is out of date once more, with what had been typed into it."""
    visitor = sessions.find_visitor(request, site)
    return _ask_for_token(request, site, OUTDATED) if visitor is None else _show_draft(request, site, visitor, 403)


def _show_draft(request: Request, site: Site, visitor: sessions.Visitor, status_code: int) -> Response:
    draft = drafts.find(request)
    try:
        sessions.require_expert(visitor)
        with review_routes.translated(draft.review):
            case = site.desk.take_back(draft.review, visitor.principal)
    except problems.RequestRefusedError as error:
        return render_problem(request, error.status_code, error.problem)
    return _show_case(site, visitor, case, status_code, draft)


@router.get("/")
def show_home() -> Response:
    """There is one page that is for everybody."""
    return go_to("/status")


@router.get("/login")
def show_login(request: Request, site: SiteHere) -> Response:
    """The form that asks for a token."""
    return _ask_for_token(request, site, None)


@router.post("/login", dependencies=[Keep])
def log_in(
    request: Request, site: SiteHere, token: Annotated[str, Form(max_length=500)] = "", csrf: Annotated[str, Form()] = ""
) -> Response:
    """Begin a session for the owner of the token."""
    site.sessions.check_csrf(site.sessions.read(request), csrf)
    principal = site.doorkeeper.look_up(token.strip())
    if principal is None:
        return _ask_for_token(request, site, "This token is not known, or was revoked.")
    session, cookie = _begin(request, site, principal.name)
    if drafts.find(request).text:
        answer = _show_draft(request, site, sessions.Visitor(principal, session, site.sessions.make_csrf(session)), 200)
    else:
        answer = go_to("/review" if principal.role == "reviewer" else "/status")
    answer.headers["set-cookie"] = cookie
    return answer


def _begin(request: Request, site: Site, name: str) -> tuple[sessions.Session, str]:
    """A new session, and the cookie that makes it the browser's: the page that carries it needs the session first."""
    blank = Response()
    session = site.sessions.begin(blank, name, is_secure=request.url.scheme == "https")
    return session, blank.headers["set-cookie"]


def _ask_for_token(request: Request, site: Site, complaint: str | None) -> Response:
    # The form's own token needs a session: that of a stranger, made here.
    session, cookie = _begin(request, site, "")
    csrf, draft = site.sessions.make_csrf(session), drafts.find(request)
    page = render("login.html", 401 if complaint else 200, csrf=csrf, complaint=complaint, draft=draft)
    page.headers["set-cookie"] = cookie
    return page


@router.post("/logout", dependencies=[Csrf])
def log_out() -> Response:
    """End the session."""
    answer = go_to("/login")
    answer.delete_cookie(sessions.COOKIE, path="/", httponly=True, samesite="strict")
    return answer


@router.get("/review")
def show_next(site: SiteHere, visitor: sessions.ExpertHere) -> Response:
    """The next case, on lease to the expert; the model's answer is not on the page before it may be."""
    case = site.desk.take_next(visitor.principal)
    if case is None:
        return render("nothing.html", visitor=visitor, progress=site.desk.count(visitor.principal))
    return _show_case(site, visitor, case)


def _show_case(
    site: Site, visitor: sessions.Visitor, case: desk.Case, status_code: int = 200, draft: drafts.Draft | None = None
) -> Response:
    """A case to answer, or one that its expert has answered; with what they had typed, when that was not sent."""
    return render(
        "answered.html" if case.yours else "case.html",
        status_code,
        visitor=visitor,
        case=case,
        draft=draft or drafts.Draft(),
        progress=site.desk.count(visitor.principal),
        fields=fields.lay_out(case.input or {}),
        attributes=fields.lay_out(case.attributes or {}),
        keys=choose_keys(case.answers),
        shown_at=site.clock().isoformat(),
    )


def choose_keys(answers: tuple[str, ...]) -> dict[str, str]:
    """One key for each answer: a letter of its own where one is left, the first best else."""
    keys: dict[str, str] = {}
    for answer in answers:
        free = [letter for letter in (*answer.lower(), *LETTERS) if letter in LETTERS and letter not in keys.values()]
        keys[answer] = free[0] if free else ""
    return keys


@router.get("/review/{id}")
def show_answered(id: ReviewId, site: SiteHere, visitor: sessions.ExpertHere) -> Response:  # noqa: A002  the name in the address
    """A case after the expert's answer: what they said, what the model had said, and the way to the next one."""
    with review_routes.translated(id):
        case = site.desk.look_at(id, visitor.principal)
    if case.yours is None:
        return go_to("/review")
    return _show_case(site, visitor, case)


@router.post("/review/{id}/answer", dependencies=[Keep, Csrf])
def give_answer(
    id: ReviewId,  # noqa: A002  the name in the address
    site: SiteHere,
    visitor: sessions.ExpertHere,
    answer: drafts.Text = "",
    rationale: drafts.Text = "",
    shown_at: Annotated[str, Form()] = "",
) -> Response:
    """Send the answer through the same door as everybody's."""
    told = rationale.replace("\r\n", "\n").strip() or None  # a form ends its lines as no other producer does
    with review_routes.translated(id):
        done = site.desk.answer(id, visitor.principal, answer, told, measure_time(shown_at, site.clock()), "review-page")
    site.metrics.events.labels(schemas.LABEL, done.outcome).inc()
    return go_to(f"/review/{id}")


def measure_time(shown_at: str, now: datetime) -> float | None:
    """How long the page was before the expert, in seconds; None when that can't be told."""
    try:
        spent = now - datetime.fromisoformat(shown_at)
    except (ValueError, TypeError, OverflowError):
        return None
    return round(spent.total_seconds(), 1) if timedelta() <= spent <= timedelta(days=1) else None


@router.post("/review/{id}/skip", dependencies=[Keep, Csrf])
def skip_case(id: ReviewId, site: SiteHere, visitor: sessions.ExpertHere, reason: drafts.Text = "") -> Response:  # noqa: A002  as above
    """Give the case back."""
    if not reason.strip():
        raise problems.RequestRefusedError(422, "reason", "nothing", "say why in a few words: it helps whoever comes next")
    with review_routes.translated(id):
        site.desk.skip(id, visitor.principal, reason.strip()[:1000])
    return go_to("/review")


@router.post("/review/{id}/reveal", dependencies=[Csrf])
def reveal_answer(id: ReviewId, site: SiteHere, visitor: sessions.ExpertHere) -> Response:  # noqa: A002  as above
    """Show the model's answer from now on, and record that it was shown."""
    with review_routes.translated(id):
        site.desk.reveal(id, visitor.principal)
    return go_to("/review")


@router.get("/status")
def show_status(site: SiteHere, visitor: sessions.VisitorHere) -> Response:
    """How things stand; it renews itself."""
    told = status.collect(site.engine, site.agents, site.clock())
    return render("status.html", visitor=visitor, refresh=REFRESH_SECONDS, told=told)
