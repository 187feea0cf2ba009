"""The real pm2 with the shipped file: it starts the daemon, restarts it after a crash and when asked, and stops it well."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from tests.daemon_fixtures import make_home

ROOT = Path(__file__).parents[1]
PM2 = shutil.which("pm2")
pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(PM2 is None, reason="pm2 is absent: npm install --global pm2")]


class Pm2:
    """A pm2 of our own, with nothing in it but Ratchet."""

    def __init__(self, folder):
        self.home, self.log = folder / "claims", folder / "pm2/logs/ratchet-error.log"
        ours = {"PM2_HOME": str(folder / "pm2"), "RATCHET_CONFIG": str(self.home / "ratchet.toml")}
        ports = {"RATCHET_SERVER__PORT": "0", "RATCHET_SERVER__OPS_PORT": "0"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RATCHET_", "PM2_"))}
        self.environment = {**kept, **ours, **ports}

    def call(self, *arguments):
        done = subprocess.run([PM2, *arguments], check=False, env=self.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def show(self):
        """What pm2 says of Ratchet."""
        [app] = json.loads(self.call("jlist").splitlines()[-1])
        return app["pm2_env"]["status"], app["pid"], app["pm2_env"]["restart_time"]

    def events(self):
        lines = (json.loads(line) for line in self.log.read_text().splitlines()) if self.log.exists() else ()
        return [(line["event"], line) for line in lines]

    def answer(self, starts):
        """Wait until the daemon was started so often and answers; returns its process id."""
        deadline = time.monotonic() + 60
        while len(told := [line for event, line in self.events() if event == "listening" and line["role"] == "operate"]) < starts:
            assert time.monotonic() < deadline, self.events()
            time.sleep(0.1)
        assert httpx.get(f"{told[-1]['url']}/readyz", trust_env=False).status_code == 200
        return next(line["pid"] for event, line in reversed(self.events()) if event == "starting")


@pytest.fixture
def pm2(tmp_path):
    make_home(tmp_path / "claims")
    pm2 = Pm2(tmp_path)
    yield pm2
    pm2.call("kill")


def test_pm2_starts_restarts_and_stops_the_daemon_and_answers_a_crash(pm2):
    pm2.call("start", str(ROOT / "deploy/ecosystem.config.cjs"))
    first = pm2.answer(starts=1)
    assert pm2.show() == ("online", first, 0)

    os.kill(first, signal.SIGKILL)
    second = pm2.answer(starts=2)
    assert second != first
    assert pm2.show() == ("online", second, 1), "it was restarted after the crash"

    pm2.call("restart", "ratchet")
    third = pm2.answer(starts=3)
    assert third != second
    assert [line["exit_status"] for event, line in pm2.events() if event == "stopped"] == [0], "it came to its end in time"

    began = time.monotonic()
    pm2.call("stop", "ratchet")
    assert time.monotonic() - began < 30
    assert pm2.show()[:2] == ("stopped", 0)
    assert [line["exit_status"] for event, line in pm2.events() if event == "stopped"] == [0, 0]
    assert {line["signal"] for event, line in pm2.events() if event == "stopping"} == {"SIGINT"}
