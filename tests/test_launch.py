"""Trainer processes are found again, stopped, and told nothing that is secret."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon import devices, launch
from daemon.config import Training


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    return tmp_path


def make_python(folder: Path, body: str) -> str:
    """A program in the place of the interpreter: it is called as `python -m trainers.train RUN_DIR --attempt 1`."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\nopen({str(folder / 'began')!r}, 'w').close()\n{body}\n")
    program.chmod(0o755)
    return str(program)


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in 20 seconds"
        time.sleep(0.01)


def test_a_process_is_followed_to_its_exit_status_and_its_output_is_kept(run_dir: Path) -> None:
    processes = launch.Processes(make_python(run_dir, "print(sys.argv[1:]); sys.exit(3)"))
    processes.start(run_dir, 1)
    wait_for(lambda: processes.poll(run_dir, 1) is not None)
    assert processes.poll(run_dir, 1) == 3
    assert "['-m', 'trainers.train'" in (run_dir / "attempts/1/log.txt").read_text()


def test_another_daemon_finds_a_process_and_can_stop_it(run_dir: Path) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open(sys.argv[3] + '/ready', 'w').close(); time.sleep(60)"
    first = launch.Processes(make_python(run_dir, body))
    first.start(run_dir, 1)
    second = launch.Processes(sys.executable)
    wait_for((run_dir / "ready").exists)
    assert second.poll(run_dir, 1) is None
    second.stop(run_dir, 1)
    wait_for(lambda: first.poll(run_dir, 1) is not None)
    assert first.poll(run_dir, 1) == 75
    assert second.poll(run_dir, 1) == launch.UNSEEN


def test_a_process_that_was_stopped_in_its_tracks_can_be_killed(run_dir: Path) -> None:
    processes = launch.Processes(make_python(run_dir, "time.sleep(60)"))
    processes.start(run_dir, 1)
    wait_for((run_dir / "began").exists)
    assert processes.poll(run_dir, 1) is None
    os.kill(int((run_dir / "attempts/1" / launch.LOCK).read_text()), signal.SIGSTOP)
    assert processes.poll(run_dir, 1) is None
    processes.stop(run_dir, 1, at_once=True)
    assert processes.poll(run_dir, 1) == -signal.SIGKILL


def test_a_process_lives_in_a_group_of_its_own(run_dir: Path) -> None:
    processes = launch.Processes(make_python(run_dir, "time.sleep(60)"))
    processes.start(run_dir, 1)
    wait_for((run_dir / "began").exists)
    number = int((run_dir / "attempts/1" / launch.LOCK).read_text())
    assert os.getpgid(number) == number != os.getpgrp()
    processes.stop(run_dir, 1, at_once=True)


def test_an_attempt_that_nobody_began_is_not_working(run_dir: Path) -> None:
    processes = launch.Processes(sys.executable)
    assert processes.poll(run_dir, 1) == launch.UNSEEN
    processes.stop(run_dir, 1, at_once=True)


def test_a_trainer_gets_no_secret_and_no_setting_of_ours() -> None:
    environ = {
        "PATH": "/bin",
        "RATCHET_DATABASE__URL": "x",
        "HF_TOKEN": "x",
        "OMP_NUM_THREADS": "2",
        "CUDA_API_KEY": "x",
        "MY_PASSWORD": "x",
    }
    kept = launch.clean_environment(environ)
    assert kept.keys() == {"PATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "PYTHONUNBUFFERED", "OMP_WAIT_POLICY"}


def test_a_resident_worker_does_one_run_after_the_other_and_is_replaced_when_it_dies(run_dir: Path) -> None:
    body = (
        "import json\n"
        "for line in sys.stdin:\n"
        "    if 'dies' in line: os._exit(9)\n"
        "    print(json.dumps({'run_dir': line.strip(), 'exit': 2}), flush=True)\n"
    )
    worker = launch.Resident(make_python(run_dir, body))
    assert worker.poll(run_dir, 1) == launch.UNSEEN
    for folder, expected in ((run_dir, 2), (run_dir / "dies", launch.FAILED), (run_dir / "next", 2)):
        worker.start(folder, 1)
        assert worker.poll(folder, 1) == expected
    worker.close()


def test_auto_is_the_cpu_where_there_is_no_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "absent")
    assert devices.find(Training(devices=("auto", "cuda:1", "cpu"))) == ("cpu", "cuda:1")


def test_auto_is_every_card_that_the_trainers_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "DRIVER", tmp_path)
    assert devices.find(Training(python=make_python(tmp_path, "print(2)"))) == ("cuda:0", "cuda:1")
    assert devices.find(Training(python=str(tmp_path / "absent"))) == ("cpu",)
