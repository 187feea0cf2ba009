"""A folder that `ratchet init` made, and the command line called in this process."""

import json
import os

import pytest

from daemon import cli
from daemon.cli import context


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A fresh installation with the agent `adjudication`, and we are in its folder."""
    for variable in [name for name in os.environ if name.startswith("RATCHET_") and name != "RATCHET_TEST_DATA"]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "claims"
    assert cli.main(["init", str(folder)]) == 0
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def opened(home, capsys):
    """The installation's configuration and database."""
    capsys.readouterr()
    with context.opened(home / "ratchet.toml") as opened:
        yield opened


@pytest.fixture
def run(home, capsys):
    """Call `ratchet` with these arguments; returns exit status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        streams = capsys.readouterr()
        return status, streams.out, streams.err

    return call


@pytest.fixture
def ask(run):
    """Call `ratchet … --json`; returns what it printed, after it ended well."""

    def call(*arguments, status=0):
        found, out, err = run(*arguments, "--json")
        assert found == status, err
        return json.loads(out)

    return call
