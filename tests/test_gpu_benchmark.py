"""benchmarks.gpu: a row without a figure says why, and one run's breakdown is not that of the next."""

import subprocess
import sys
import time

import pytest

from benchmarks import gpu, training

ANSWER = 'import sys; sys.stdin.readline(); print(\'{"exit": 0, "reason": "done"}\', flush=True); sys.stdin.read()'
BREAK = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.{})"
HANG = "import time; time.sleep(60)"


@pytest.fixture
def programs(monkeypatch):
    """What stands in for the trainer, one after another."""
    waiting = []

    def start():
        command = [sys.executable, "-c", waiting.pop(0)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(training, "start_worker", start)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    return waiting


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL"])
def test_a_trainer_that_breaks_down_is_told_and_another_one_does_the_next_run(programs, tmp_path, name):
    programs += [BREAK.format(name), ANSWER]
    with gpu.Resident(time.monotonic() + 60) as trainer:
        assert trainer.perform(tmp_path) == f"not measured: the trainer ended by {name}"
        assert trainer.perform(tmp_path) is None


def test_only_a_trainer_that_was_stopped_by_the_clock_had_no_time(programs, tmp_path):
    programs.append(HANG)
    with gpu.Resident(time.monotonic() + 0.5) as trainer:
        assert trainer.perform(tmp_path) == gpu.NO_TIME
        assert trainer.perform(tmp_path) == gpu.NO_TIME


def test_a_goal_that_nobody_ran_is_told_without_a_value():
    rows = {
        ("ours-unshared", "lora"): {"claims_per_second": 30.0},
        ("guide", "lora"): {"claims_per_second": 10.0},
        ("planned", "qlora"): {"peak_gb": 9.5, "planned_gb": 9.0},
        ("trl-packing", "lora"): {"result": "not measured: no time left"},
    }
    told = {figure["name"]: (figure["value"], figure["goal"], figure["holds"]) for figure in gpu.judge(rows)}
    assert told["claims/s against the guide's script"] == (30, "≥ 3 ×", True)  # noqa: RUF001
    assert told["claims/s against TRL tuned"] == (None, "≥ 1 ×", None)  # noqa: RUF001
    assert told["qlora, passes of 4,096 tokens: peak GB"] == (9.5, "≤ 10", True)
    assert told["qlora: planned GB against the peak"] == (9, "≥ 0.9 × and ≤ 1.1 ×", True)  # noqa: RUF001
    assert told["lora, passes of 4,096 tokens: peak GB"] == (None, "≤ 20", None)
