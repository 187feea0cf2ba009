"""The herald: says in the log which champions it found, and every change of them, whoever made it."""

from __future__ import annotations

from collections.abc import Collection

import structlog
from sqlalchemy import Connection, Engine

from storage import db, registry

log = structlog.get_logger()


class Herald:
    """Tells of each change once. What was changed while nobody led is among what the next leader finds."""

    def __init__(self, engine: Engine, agents: Collection[str]) -> None:
        self._engine = engine
        self._agents = agents
        self._fence: int | None = None
        self._seen: dict[str, int] = {}
        """The number of the last change of each agent's champion."""

    def tell(self, fence: int | None) -> None:
        """Log what has changed since the last call; at the first one under a fence, which grows with every leader, what there is."""
        with db.reading(self._engine) as connection:
            if fence != self._fence:
                self._begin(connection)
                self._fence = fence
                return
            changes = [one for name in self._agents for one in registry.list_changes(connection, name, self._seen.get(name, 0))]
        for one in changes:
            told = {name: one[name] for name in ("agent", "kind", "version", "previous", "actor", "is_forced")}
            log.info("champion_changed", deployment=one["id"], **told)
            self._seen[one["agent"]] = one["number"]

    def _begin(self, connection: Connection) -> None:
        found = {name: change for name in self._agents if (change := registry.in_force(connection, name)) is not None}
        self._seen = {name: change["number"] for name, change in found.items()}
        log.info("champions_found", champions={name: change["version"] for name, change in found.items()})
