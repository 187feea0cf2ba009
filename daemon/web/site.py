"""What the routes of one application share, handed to each by `SiteHere`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from sqlalchemy import Engine

from daemon.agents import Agent

if TYPE_CHECKING:
    from daemon.web.access import Doorkeeper
    from daemon.web.desk import Desk
    from daemon.web.intake import Intake
    from daemon.web.metrics import Metrics
    from daemon.web.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Site:
    """Everything that one application was made from."""

    engine: Engine
    agents: Mapping[str, Agent]
    clock: Callable[[], datetime]
    on_stored: Callable[[], None]
    doorkeeper: Doorkeeper
    intake: Intake
    desk: Desk
    sessions: Sessions
    metrics: Metrics


async def find_site(request: Request) -> Site:
    """The site that the application was made from."""
    site: Site = request.app.state.site
    return site


SiteHere = Annotated[Site, Depends(find_site)]
