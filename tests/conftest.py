"""What all tests share: a fresh database, a fixed clock, and the way to data outside the project."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from sqlalchemy import Engine

from storage import db, schema
from tests import broker_fixtures
from tests.postgres_fixtures import Server, running_server

NOW = datetime(2026, 3, 2, 9, 30, tzinfo=UTC)


@pytest.fixture
def now() -> datetime:
    """A Monday morning in March, for tests that need a clock."""
    return NOW


@pytest.fixture(autouse=True)
def _logs_as_they_were() -> Iterator[None]:
    """What a command has set for its process is not left to the next test: its standard error is closed by then."""
    root = logging.getLogger()
    level = root.level
    yield
    structlog.reset_defaults()
    root.setLevel(level)
    for handler in [one for one in root.handlers if type(one) is logging.StreamHandler]:
        root.removeHandler(handler)


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over what was imported: 800,000 objects, half a second each time that a test lets go of a model."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Give back what was passed over: some libraries call it leaked when it is still there at the end."""
    gc.unfreeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test of a module or a function marked `databases` on each of those that it names."""
    marker = metafunc.definition.get_closest_marker("databases")
    if marker is not None and "database" in metafunc.fixturenames:
        metafunc.parametrize("database", marker.args, indirect=True)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> str:
    """Which database the test runs on: sqlite, or what its mark `databases` says."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A real PostgreSQL server."""
    with running_server() as server:
        yield server


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with the current schema, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "ratchet.db"
    engine = db.open_engine(f"sqlite:///{path}")
    schema.upgrade(engine)
    engine.dispose()
    return path


@pytest.fixture
def new_engine(database: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[], Engine]]:
    """Opens a fresh database with the current schema at each call, of the kind that the test runs on."""
    with contextlib.ExitStack() as stack:
        numbers = itertools.count()

        def open_new() -> Engine:
            if database == "postgresql":
                server = request.getfixturevalue("postgres")
                name = server.make_database()
                stack.callback(server.take_back, name)
                url = server.url(name)
            else:
                number = next(numbers)
                path = tmp_path / (f"ratchet-{number}.db" if number else "ratchet.db")
                shutil.copy(request.getfixturevalue("migrated"), path)
                url = f"sqlite:///{path}"
            engine = db.open_engine(url)
            stack.callback(engine.dispose)
            return engine

        yield open_new


@pytest.fixture
def engine(new_engine: Callable[[], Engine]) -> Engine:
    """A fresh database with the current schema."""
    return new_engine()


@pytest.fixture
def outside_data() -> Path:
    """The folder of public data that is not shipped with the project."""
    folder = os.environ.get("RATCHET_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("RATCHET_TEST_DATA names no folder: data outside the project is absent")
    return Path(folder)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[broker_fixtures.Broker]:
    """A real Kafka broker, the same for all tests of this process: each test takes topics and groups of its own."""
    broker = broker_fixtures.make_broker(tmp_path_factory.mktemp("kafka"))
    yield broker
    broker.kill()
