"""What an expert had typed into a form that was not taken: it outlives the refusal, and a log-in in between."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Form, Request

from consumers import schemas

Text = Annotated[schemas.Text, Form()]


@dataclass(frozen=True, slots=True)
class Draft:
    """The case that it is about, by its review, and what was typed: a rationale, or the reason to skip."""

    review: str = ""
    rationale: str = ""
    reason: str = ""

    @property
    def text(self) -> str:
        """What was typed."""
        return self.rationale or self.reason


def keep(request: Request, review: Annotated[str, Form(max_length=26)] = "", rationale: Text = "", reason: Text = "") -> None:
    """Remember what a form brings, before anything else is asked of the request."""
    request.state.draft = Draft(request.path_params.get("id", review), rationale, reason)


def find(request: Request) -> Draft:
    """What the request's form brought; an empty draft for any other request."""
    found = getattr(request.state, "draft", None)
    return found if isinstance(found, Draft) else Draft()
