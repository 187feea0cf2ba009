"""Trainer processes are found again, stopped, and told nothing that is secret."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon import launch
from daemon.launchers import choice, processes, workers
from daemon.settings import Devices, Settings
from tests import training_fixtures
from tests.model_fixtures import tiny_base
from trainers import spec


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


def wait_for(holds: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"it did not happen in {seconds} seconds"
        time.sleep(0.01)


def test_a_process_is_followed_to_its_exit_status_and_its_output_is_kept(run_dir: Path) -> None:
    trainers = processes.Processes(make_python(run_dir, "print(sys.argv[1:]); sys.exit(3)"))
    trainers.submit(run_dir, 1)
    wait_for(lambda: trainers.status(run_dir, 1) is not None)
    assert trainers.status(run_dir, 1) == 3
    assert "['-m', 'trainers.train'" in (run_dir / "attempts/1/log.txt").read_text()


def test_what_a_power_cut_leaves_in_a_log_is_no_part_of_an_error(run_dir: Path) -> None:
    (run_dir / "attempts/1/log.txt").write_bytes(b"CUDA out of memory\n\0\0\0")
    assert launch.read_log(run_dir, 1) == "CUDA out of memory\n"


def test_another_daemon_finds_a_process_and_can_stop_it(run_dir: Path) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); open(sys.argv[3] + '/ready', 'w').close(); time.sleep(60)"
    first = processes.Processes(make_python(run_dir, body))
    first.submit(run_dir, 1)
    second = processes.Processes(sys.executable)
    wait_for((run_dir / "ready").exists)
    assert second.status(run_dir, 1) is None
    second.cancel(run_dir, 1)
    wait_for(lambda: first.status(run_dir, 1) is not None)
    assert first.status(run_dir, 1) == 75
    assert second.status(run_dir, 1) == launch.UNSEEN


def test_a_process_that_was_stopped_in_its_tracks_can_be_killed(run_dir: Path) -> None:
    trainers = processes.Processes(make_python(run_dir, "time.sleep(60)"))
    trainers.submit(run_dir, 1)
    wait_for((run_dir / "began").exists)
    assert trainers.status(run_dir, 1) is None
    os.kill(int((run_dir / "attempts/1" / spec.LOCK).read_text()), signal.SIGSTOP)
    assert trainers.status(run_dir, 1) is None
    trainers.cancel(run_dir, 1, at_once=True)
    assert trainers.status(run_dir, 1) == -signal.SIGKILL


def test_a_process_lives_in_a_group_of_its_own(run_dir: Path) -> None:
    trainers = processes.Processes(make_python(run_dir, "time.sleep(60)"))
    trainers.submit(run_dir, 1)
    wait_for((run_dir / "began").exists)
    number = int((run_dir / "attempts/1" / spec.LOCK).read_text())
    assert os.getpgid(number) == number != os.getpgrp()
    trainers.cancel(run_dir, 1, at_once=True)


def test_an_attempt_that_nobody_began_is_not_working(run_dir: Path) -> None:
    trainers = processes.Processes(sys.executable)
    assert trainers.status(run_dir, 1) == launch.UNSEEN
    trainers.cancel(run_dir, 1, at_once=True)


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
    assert kept.keys() == {
        "PATH",
        "OMP_NUM_THREADS",
        "HF_HUB_OFFLINE",
        "TOKENIZERS_PARALLELISM",
        "PYTHONUNBUFFERED",
        "OMP_WAIT_POLICY",
        "PYTORCH_ALLOC_CONF",
        "CUDA_DEVICE_ORDER",
    }
    own = {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}
    assert own.items() <= (kept := launch.clean_environment(own)).items()
    assert "PYTORCH_ALLOC_CONF" not in kept


BODY = """
import json
idle = float(sys.argv[-1])
for line in sys.stdin:
    asked = json.loads(line)
    if 'dies' in line: os._exit(9)
    while 'hangs' in line: time.sleep(0.01)
    print(json.dumps({'run_dir': asked['run_dir'], 'exit': 2, 'pid': os.getpid()}), flush=True)
"""


def make_run(folder: Path, device: str = "cpu") -> Path:
    (folder / "attempts" / "1").mkdir(parents=True, exist_ok=True)
    (folder / "spec.json").write_text(json.dumps({"device": device}))
    return folder


def test_a_resident_worker_does_one_run_after_the_other_and_is_replaced_when_it_dies(tmp_path: Path) -> None:
    with contextlib.closing(workers.Workers(make_python(tmp_path, BODY), waits=True)) as trainers:
        seen = []
        for name, expected in (("first", 2), ("second", 2), ("dies", 9), ("next", 2)):
            run_dir = make_run(tmp_path / name)
            assert trainers.status(run_dir, 1) == launch.UNSEEN
            trainers.submit(run_dir, 1)
            seen.append(trainers._workers[0].process.pid)
            assert trainers.status(run_dir, 1) == expected
            assert trainers.status(run_dir, 1) == expected
    assert seen[0] == seen[1] == seen[2] != seen[3]


def test_a_new_worker_holds_its_first_attempt_while_it_starts(tmp_path: Path) -> None:
    with contextlib.closing(workers.Workers(make_python(tmp_path, "time.sleep(60)"))) as trainers:
        run_dir = make_run(tmp_path / "first")
        trainers.submit(run_dir, 1)
        [worker] = trainers._workers
        lock = run_dir / "attempts/1/process.lock"
        wait_for(lambda: lock.read_text().strip() == str(worker.process.pid))
        next_daemon = workers.Workers(sys.executable)
        assert next_daemon.status(run_dir, 1) is None
        next_daemon.cancel(run_dir, 1, at_once=True)
        wait_for(lambda: next_daemon.status(run_dir, 1) == launch.UNSEEN)
        assert trainers.status(run_dir, 1) == -signal.SIGKILL


def test_two_devices_have_two_workers_and_a_busy_one_is_not_waited_for(tmp_path: Path) -> None:
    with contextlib.closing(workers.Workers(make_python(tmp_path, BODY))) as trainers:
        busy, other, card = make_run(tmp_path / "hangs"), make_run(tmp_path / "other"), make_run(tmp_path / "card", "cuda:0")
        for run_dir in (busy, other, card):
            trainers.submit(run_dir, 1)
        for run_dir in (other, card):
            wait_for(lambda run_dir=run_dir: trainers.status(run_dir, 1) is not None)
        assert [worker.device for worker in trainers._workers] == ["cpu", "cpu", "cuda:0"]
        assert trainers.status(busy, 1) is None
        trainers.cancel(busy, 1, at_once=True)
        assert trainers.status(busy, 1) == -signal.SIGKILL
        again = make_run(tmp_path / "again")
        trainers.submit(again, 1)
        wait_for(lambda: trainers.status(again, 1) == 2)
        assert len(trainers._workers) == 2


def test_a_worker_that_ended_while_it_waited_is_replaced(tmp_path: Path) -> None:
    with contextlib.closing(workers.Workers(make_python(tmp_path, BODY), waits=True)) as trainers:
        for name in ("first", "second"):
            run_dir = make_run(tmp_path / name)
            trainers.submit(run_dir, 1)
            assert trainers.status(run_dir, 1) == 2
            trainers._workers[0].process.kill()
            trainers._workers[0].process.wait()


def test_workers_that_wait_may_be_ended_and_one_that_works_goes_on(tmp_path: Path) -> None:
    with contextlib.closing(workers.Workers(make_python(tmp_path, BODY))) as trainers:
        busy, done = make_run(tmp_path / "hangs"), make_run(tmp_path / "done")
        for run_dir in (busy, done):
            trainers.submit(run_dir, 1)
        wait_for(lambda: trainers.status(done, 1) is not None)
        [waiting] = [one.process for one in trainers._workers if one.busy is None]
        trainers.end_idle("cuda:0")
        assert waiting.poll() is None, "it waits on another device"
        trainers.end_idle("cpu")
        assert waiting.returncode == 0
        assert [one.busy for one in trainers._workers] == [launch.find_attempt(busy, 1)]
        assert (trainers.status(busy, 1), trainers.status(done, 1)) == (None, 2)
        trainers.cancel(busy, 1, at_once=True)


def test_only_settings_that_keep_trainers_warm_make_workers() -> None:
    assert isinstance(choice.make_launcher(Settings()), processes.Processes)
    assert isinstance(choice.make_launcher(Settings(devices=Devices(keep_warm_minutes=5))), workers.Workers)


def test_several_parts_of_a_device_are_processes_of_torchrun(tmp_path: Path) -> None:
    commands = [launch.make_command("python", make_run(tmp_path / name, name), 3) for name in ("cpu", "cuda:0+cuda:1")]
    assert [command[2] for command in commands] == ["trainers.train", "trainers.torchrun"]
    assert commands[0][3:] == [str(tmp_path / "cpu"), "--attempt", "3"]


def test_an_attempt_of_a_killed_daemons_worker_is_found_and_stopped_by_the_next_daemon(tmp_path: Path) -> None:
    data = training_fixtures.dataset(tmp_path / "set")
    asked = training_fixtures.make_spec(tiny_base(tmp_path / "base"), data, {"epochs": 1000, "checkpoint_steps": 5})
    run_dir = make_run(tmp_path / "run")
    spec.write_spec(run_dir, asked)
    first, second = workers.Workers(sys.executable, 60), workers.Workers(sys.executable, 60)
    first.submit(run_dir, 1)
    worker = first._workers[0].process
    wait_for(lambda: list(run_dir.glob("attempts/1/checkpoints/step-*")) or worker.poll() is not None, 250)
    assert worker.stdin is not None
    worker.stdin.close()  # as the kernel does when its daemon is killed
    assert second.status(run_dir, 1) is None
    second.cancel(run_dir, 1)
    wait_for(lambda: second.status(run_dir, 1) is not None, 100)
    assert second.status(run_dir, 1) == launch.UNSEEN
    assert json.loads(worker.stdout.readline())["exit"] == spec.EXIT_RESUMABLE  # type: ignore[union-attr]  # a pipe
    assert worker.wait(60) == 0, "nobody is there to give it another run"
    assert not (run_dir / "attempts/1/result.json").exists()
    worker.stdout.close()  # type: ignore[union-attr]  # a pipe
