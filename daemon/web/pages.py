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
from daemon.web import desk, fields, problems, sessions
from daemon.web import reviews as review_routes
from daemon.web.reviews import ReviewId
from daemon.web.site import Site, SiteHere

FOLDER = Path(__file__).parent
REFRESH_SECONDS = 10
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

router = APIRouter(include_in_schema=False)
Csrf = Depends(sessions.check_form)
Text = Annotated[str, Form(max_length=schemas.MAX_TEXT)]


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
    way_on = "/review" if request.url.path.startswith("/review/") and problem.field != "role" else "/"
    typed = getattr(request.state, "typed", "")
    return render("problem.html", code, code=code, problem=problem, way_on=way_on, typed=typed)


@router.get("/")
def show_home() -> Response:
    """There is one page that is for everybody."""
    return go_to("/status")


@router.get("/login")
def show_login(request: Request, site: SiteHere) -> Response:
    """The form that asks for a token."""
    return _ask_for_token(request, site, None)


@router.post("/login")
def log_in(
    request: Request, site: SiteHere, token: Annotated[str, Form(max_length=500)] = "", csrf: Annotated[str, Form()] = ""
) -> Response:
    """Begin a session for the owner of the token."""
    site.sessions.check_csrf(site.sessions.read(request), csrf)
    principal = site.doorkeeper.look_up(token.strip())
    if principal is None:
        return _ask_for_token(request, site, "This token is not known, or was revoked.")
    answer = go_to("/review" if principal.role == "reviewer" else "/status")
    site.sessions.begin(answer, principal.name, is_secure=request.url.scheme == "https")
    return answer


def _ask_for_token(request: Request, site: Site, complaint: str | None) -> Response:
    # The form's own token needs a session: that of a stranger, made here.
    blank = Response()
    session = site.sessions.begin(blank, "", is_secure=request.url.scheme == "https")
    page = render("login.html", 401 if complaint else 200, csrf=site.sessions.make_csrf(session), complaint=complaint)
    page.headers["set-cookie"] = blank.headers["set-cookie"]
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
    progress = site.desk.count(visitor.principal)
    if case is None:
        return render("nothing.html", visitor=visitor, progress=progress)
    return _show_case(site, visitor, case, progress)


def _show_case(site: Site, visitor: sessions.Visitor, case: desk.Case, progress: desk.Progress) -> Response:
    return render(
        "case.html",
        visitor=visitor,
        case=case,
        progress=progress,
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
    progress = site.desk.count(visitor.principal)
    return render(
        "answered.html", visitor=visitor, case=case, progress=progress, keys=choose_keys(case.answers), shown_at=site.clock().isoformat()
    )


@router.post("/review/{id}/answer", dependencies=[Csrf])
def give_answer(
    id: ReviewId,  # noqa: A002  the name in the address
    request: Request,
    site: SiteHere,
    visitor: sessions.ExpertHere,
    answer: Text = "",
    rationale: Text = "",
    shown_at: Annotated[str, Form()] = "",
) -> Response:
    """Send the answer through the same door as everybody's."""
    request.state.typed = rationale  # a refusal repeats it, so that it is not lost
    with review_routes.translated(id):
        done = site.desk.answer(
            id, visitor.principal, answer, rationale.strip() or None, measure_time(shown_at, site.clock()), "review-page"
        )
    site.metrics.events.labels(schemas.LABEL, done.outcome).inc()
    return go_to(f"/review/{id}")


def measure_time(shown_at: str, now: datetime) -> float | None:
    """How long the page was before the expert, in seconds; None when that can't be told."""
    try:
        spent = now - datetime.fromisoformat(shown_at)
    except (ValueError, TypeError, OverflowError):
        return None
    return round(spent.total_seconds(), 1) if timedelta() <= spent <= timedelta(days=1) else None


@router.post("/review/{id}/skip", dependencies=[Csrf])
def skip_case(id: ReviewId, site: SiteHere, visitor: sessions.ExpertHere, reason: Text = "") -> Response:  # noqa: A002  as above
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
