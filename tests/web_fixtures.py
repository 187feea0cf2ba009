"""The application with its tokens, for the tests of everything that people and programs see of it."""

from datetime import timedelta
from pathlib import Path

import httpx
import pytest
import structlog

from consumers import embedded
from daemon import agents
from daemon.prompts import PromptFile
from daemon.settings import Server, Settings
from daemon.web import app as web
from storage import db, tokens
from tests.event_fixtures import LABELS, make_agent

HOUR = timedelta(hours=1)


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self, now):
        self.now = now

    def __call__(self):
        return self.now


class Site:
    """The application in this process, the tokens of everybody, and the clock that it reads."""

    def __init__(self, engine, clock, home, counters=None, agent=None, **server):
        self.engine, self.clock, self.agent = engine, clock, agent or make_agent()
        self.stored = []
        configured = agents.Agent(name="adjudication", labels=LABELS, prompt=PromptFile(text="{{ input }}", path=home / "prompt.j2"))
        self.settings = Settings(agents={"adjudication": configured}, server=Server(**server))
        told = lambda: self.stored.append(1)  # noqa: E731
        self.app = web.create_app(engine, self.settings, {"adjudication": self.agent}, clock, told, counters=counters)
        self.secrets = {}
        with db.writing(engine) as connection:
            for name, role in (("node", "producer"), ("ann", "reviewer"), ("ben", "reviewer"), ("ops", "operator")):
                self.secrets[name] = tokens.add(connection, name, role, clock())

    def client(self, name=None, accept="*/*", **options):
        """An HTTP client that shows the token of `name`."""
        headers = {"Accept": accept} | ({"Authorization": f"Bearer {self.secrets[name]}"} if name else {})
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://ratchet", headers=headers, **options)

    def principal(self, name):
        """Who the token of `name` stands for."""
        with db.reading(self.engine) as connection:
            return tokens.find(connection, self.secrets[name])

    def handle(self):
        """Do what the consumer does with the events that came in."""
        return embedded.handle_next(self.engine, {"adjudication": self.agent}, self.clock())


@pytest.fixture
def site(engine, now, tmp_path: Path):
    """A fresh installation's application with one agent, `adjudication`."""
    site = Site(engine, Clock(now), tmp_path)
    structlog.configure(processors=[structlog.processors.format_exc_info, structlog.processors.JSONRenderer()])
    yield site
    structlog.reset_defaults()
    site.app.state.site.intake.close()
