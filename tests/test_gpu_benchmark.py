"""benchmarks.gpu: a row without a figure says why, and one run's breakdown is not that of the next."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, training

ANSWER = 'import sys; sys.stdin.readline(); print(\'{"exit": 0, "reason": "done"}\', flush=True); sys.stdin.read()'
BREAK = "import os, signal, sys; sys.stdin.readline(); os.kill(os.getpid(), signal.{})"
LOSSES = "loss of the first step, shared prefixes against none: difference"
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


@pytest.mark.parametrize(("machine", "is_kept"), [("NVIDIA H100 80GB HBM3", True), (gpu.describe_card("cpu", is_tiny=False), False)])
def test_only_a_run_on_a_card_is_kept_and_shown_on_the_page(tmp_path, machine, is_kept):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    line = json.dumps({"benchmark": "gpu", "machine": machine, "rows": [], "figures": []})
    script = Path(shutil.copy(Path(gpu.__file__).with_name("gpu.sh"), tmp_path / "benchmarks" / "gpu.sh"))
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nif [ $1 = -m ]; then echo '{line}'; else echo $1 > page; fi\n")
    python.chmod(0o755)
    subprocess.run([script], check=True, env=os.environ | {"PYTHON": str(python)})
    result, page = tmp_path / "benchmarks" / "results" / "gpu.json", tmp_path / "page"
    assert [path.read_text() for path in (result, page) if path.exists()] == [f"{line}\n", "scripts/write_benchmarks.py\n"] * is_kept


def test_a_goal_that_nobody_ran_is_told_without_a_value():
    rows = {
        ("ours-unshared", "lora"): {"claims_per_second": 30.0},
        ("ours-sparing-unshared", "lora"): {"first_loss": 11.5},
        ("ours-sparing", "lora"): {"first_loss": 11.75, "tokens_saved": 0},
        ("guide", "lora"): {"claims_per_second": 10.0},
        ("planned", "qlora"): {"peak_gb": 9.5, "planned_gb": 9.0},
        ("trl-packing", "lora"): {"result": "not measured: no time left"},
    }
    told = {figure["name"]: (figure["value"], figure["goal"], figure["holds"]) for figure in gpu.judge(rows)}
    assert told["claims/s against the guide's script"] == (30, "≥ 3 ×", True)  # noqa: RUF001
    assert told["claims/s against TRL tuned"] == (None, "≥ 1 ×", None)  # noqa: RUF001
    assert told["qlora of rank 64, passes of 4,096 tokens: peak GB"] == (9.5, "≤ 10", True)
    assert told["qlora of rank 64: planned GB against the peak"] == (9, "≥ 0.9 × and ≤ 1.1 ×", True)  # noqa: RUF001
    assert told["lora of rank 16, passes of 4,096 tokens: peak GB"] == (None, "≤ 20", None)
    assert told[LOSSES] == (None, "≤ 0.01", None), "nothing was shared, so nothing was compared"


def test_losses_with_shared_prefixes_and_without_are_held_together():
    rows = {
        ("ours-sparing-unshared", "lora"): {"first_loss": 11.5},
        ("ours-sparing", "lora"): {"first_loss": 11.25, "tokens_saved": 900},
    }
    (figure,) = (figure for figure in gpu.judge(rows) if figure["name"] == LOSSES)
    assert (figure["value"], figure["holds"]) == (0.25, False)
