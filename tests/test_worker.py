import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import training_fixtures as runs
from tests.model_fixtures import tiny_base
from trainers import spec, worker


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def start_worker():
    return subprocess.Popen(
        [sys.executable, "-m", "trainers.worker"],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ask(process, run_dir, interrupt=None):
    """Hand a run to the worker and read its answer; with `interrupt`, send that signal once the run has begun."""
    process.stdin.write(json.dumps({"run_dir": str(run_dir)}) + "\n")
    process.stdin.flush()
    while interrupt and not list(run_dir.glob("attempts/1/checkpoints/step-*")):
        time.sleep(0.02)
    if interrupt:
        process.send_signal(interrupt)
    return json.loads(process.stdout.readline())


def test_a_worker_does_run_after_run_with_the_results_of_single_runs_and_survives_bad_ones(tmp_path, base):
    data = runs.dataset(tmp_path / "set")
    asked = runs.make_spec(base, data, {"epochs": 2})
    for name in ("first", "second", "alone"):
        spec.write_spec(tmp_path / name, asked)
    spec.write_spec(tmp_path / "long", runs.make_spec(base, data, {"epochs": 1000, "checkpoint_steps": 5}))
    broken = tmp_path / "broken"
    (broken / "attempts" / "1").mkdir(parents=True)
    (broken / "attempts" / "1" / "attempt.json").write_text("no json")
    with start_worker() as process:
        answers = [ask(process, tmp_path / name) for name in ("first", "no-spec", "broken", "second")]
        stopped = ask(process, tmp_path / "long", signal.SIGTERM)
        assert process.wait(30) == 0
    assert stopped["exit"] == spec.EXIT_RESUMABLE
    assert not (tmp_path / "long" / "attempts" / "1" / "result.json").exists()
    assert [answer["exit"] for answer in answers] == [0, 2, 1, 0]
    assert [answer["run_dir"] for answer in answers] == [str(tmp_path / name) for name in ("first", "no-spec", "broken", "second")]
    assert "spec.json is missing" in answers[1]["reason"]
    runs.perform(tmp_path / "alone", asked)
    digests = {runs.result(tmp_path / name)["adapter"]["digest"] for name in ("first", "second", "alone")}
    assert len(digests) == 1


def test_an_idle_worker_ends_at_a_signal_and_a_busy_one_finishes_its_step():
    stop = worker.IdleStop()
    with pytest.raises(SystemExit):
        stop(signal.SIGTERM)
    stop.is_idle = False
    stop(signal.SIGTERM)
    assert stop.is_requested


def test_a_worker_that_waits_too_long_ends():
    stop = worker.IdleStop()
    reading, writing = os.pipe()
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with os.fdopen(reading) as lines, pytest.raises(SystemExit):
            worker.work(lines, io.StringIO(), stop, 0.01)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(writing)
