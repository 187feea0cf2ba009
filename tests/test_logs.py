"""daemon.logs: a line is a line, whoever writes at the same time."""

import json
import subprocess
import sys

WRITE = """
import logging, sys, threading, structlog
from daemon import logs
logs.configure("info", "json")
sys.setswitchinterval(1e-6)
ours, theirs = structlog.get_logger(), logging.getLogger("kafka")
def write(log):
    for number in range(300):
        log(f"line {number}")
threads = [threading.Thread(target=write, args=[log]) for log in (ours.warning, theirs.warning) * 3]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_lines_that_several_threads_write_at_once_stay_apart():
    told = subprocess.run([sys.executable, "-c", WRITE], check=True, capture_output=True, text=True).stderr
    lines = [json.loads(line) for line in told.splitlines()]
    assert sorted(line["event"] for line in lines) == sorted(f"line {number}" for number in range(300) for _ in range(6))
