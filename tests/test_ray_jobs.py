"""Runs as jobs on a real Ray cluster of this machine, their folders in a store."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from daemon import launch, run_folders
from daemon.launchers import choice, ray_jobs
from daemon.settings import Settings, Training
from storage import mirror
from tests import training_fixtures as fixtures
from tests.model_fixtures import tiny_base
from trainers import spec

PATIENCE_SECONDS = 200
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is absent: install the extra `ray`")


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of one CPU."""
    dashboard = find_port()
    # The paths of its sockets may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    place = ["--node-ip-address", "127.0.0.1", "--port", str(find_port()), "--dashboard-port", str(dashboard), "--temp-dir", folder]
    size = ["--num-cpus", "1", "--num-gpus", "0", "--object-store-memory", "80000000"]
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats", *place, *size]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    head = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.terminate()
        head.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def begin(jobs: ray_jobs.RayJobs, run_dir: Path, attempt: int) -> None:
    """Submit an attempt as soon as the cluster takes jobs."""
    run_folders.begin_attempt(run_dir, attempt, fence=7)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(ConnectionError, RuntimeError):
            return jobs.submit(run_dir, attempt)
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.2)


def wait_for_end(jobs: ray_jobs.RayJobs, run_dir: Path, attempt: int) -> int:
    """The exit status of an attempt."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (status := jobs.status(run_dir, attempt)) is None:
        assert time.monotonic() < deadline, jobs.logs(run_dir, attempt)
        time.sleep(0.2)
    return status


def wait_for_training(jobs: ray_jobs.RayJobs, run_dir: Path, attempt: int) -> int:
    """The first step that a running attempt tells of."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (steps := [line["step"] for line in fixtures.progress(run_dir, attempt) if line["phase"] == "training"]):
        assert jobs.status(run_dir, attempt) is None, jobs.logs(run_dir, attempt)
        assert time.monotonic() < deadline, jobs.logs(run_dir, attempt)
        time.sleep(0.2)
    return int(steps[0])


@needs_ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_job_on_a_cluster_brings_back_what_a_process_here_makes(tmp_path: Path, cluster: str, base: Path) -> None:
    run_dir = tmp_path / "runs" / "r1"
    scored = fixtures.score_set(tmp_path / "recent.parquet", range(5))
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set"), {"epochs": 1}, score_sets=(scored,))
    spec.write_spec(run_dir, asked)
    jobs = ray_jobs.RayJobs(cluster, f"file://{tmp_path}/store", sys.executable)
    begin(jobs, run_dir, 1)
    assert wait_for_end(jobs, run_dir, 1) == 0, jobs.logs(run_dir, 1)
    assert "done:" in jobs.logs(run_dir, 1)
    found = fixtures.result(run_dir)
    assert (found["status"], found["fence"]) == ("done", 7)
    assert fixtures.perform(tmp_path / "here", asked) == 0
    assert found["adapter"]["digest"] == fixtures.result(tmp_path / "here")["adapter"]["digest"]
    assert (run_dir / "attempts/1" / found["adapter"]["path"] / "adapter_model.safetensors").exists()
    assert (run_dir / "attempts/1/scores.parquet").exists()
    assert list((run_dir / "attempts/1/checkpoints").glob("step-*/*")) == [], "of checkpoints only the names come back"
    assert jobs.status(run_dir, 2) == launch.UNSEEN
    jobs.cancel(run_dir, 2)
    assert jobs.logs(run_dir, 2) == ""
    assert (tmp_path / "store/r1/spec.json").exists()
    for _ in range(2):
        jobs.clean_up(run_dir)
        assert not (tmp_path / "store/r1").exists()


@needs_ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_job_that_is_asked_to_end_leaves_a_checkpoint_and_the_next_attempt_goes_on(tmp_path: Path, cluster: str, base: Path) -> None:
    run_dir = tmp_path / "runs" / "r2"
    options = {"epochs": 1000, "batch_rows": 1, "checkpoint_steps": 1_000_000}
    spec.write_spec(run_dir, fixtures.make_spec(base, fixtures.dataset(tmp_path / "set"), options))
    jobs = ray_jobs.RayJobs(cluster, f"file://{tmp_path}/store", sys.executable)
    begin(jobs, run_dir, 1)
    assert wait_for_training(jobs, run_dir, 1) == 1
    jobs.cancel(run_dir, 1)
    assert wait_for_end(jobs, run_dir, 1) == spec.EXIT_RESUMABLE
    stopped_at = run_folders.newest_checkpoint(run_dir)
    assert stopped_at > 0, "there was none before it was asked to end"
    begin(jobs, run_dir, 2)
    assert wait_for_training(jobs, run_dir, 2) > stopped_at
    jobs.cancel(run_dir, 2)
    assert wait_for_end(jobs, run_dir, 2) == spec.EXIT_RESUMABLE
    assert run_folders.newest_checkpoint(run_dir) > stopped_at


def test_what_a_run_reads_travels_and_its_cards_are_numbered_anew(tmp_path: Path) -> None:
    data, adapter = tmp_path / "set", tmp_path / "adapter"
    for folder in (data, adapter):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    asked = spec.Spec(
        run_id="r",
        kind="train",
        agent="a",
        base=spec.Base(path=tmp_path / "base", digest="x"),
        dataset=data,
        init_adapter=adapter,
        learned=data,
        others=(fixtures.model("champion", adapter=adapter),),
        device="cuda:3+cuda:1",
    )
    spec.write_spec(tmp_path / "r", asked)
    sent = ray_jobs.push_inputs(mirror.Mirror(f"file://{tmp_path}/store/r"), tmp_path / "r")
    assert (sent.device, sent.base.path) == ("cuda:0+cuda:1", tmp_path / "base")
    assert sent.dataset is not None
    assert sent.learned == sent.dataset
    assert sent.init_adapter == sent.others[0].adapter
    assert (tmp_path / "store/r" / sent.dataset / "file").read_text() == "set"
    assert spec.read_spec(tmp_path / "store/r") == sent
    assert spec.read_spec(tmp_path / "r") == asked


def test_an_input_that_was_sent_in_part_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text(name)
    asked = spec.Spec(run_id="r", kind="train", agent="a", base=spec.Base(path=tmp_path / "base", digest="x"), dataset=tmp_path / "set")
    spec.write_spec(tmp_path / "r", asked)
    store, put = mirror.Mirror(f"file://{tmp_path}/store/r"), mirror.Mirror._put

    def fail(store: mirror.Mirror, path: Path, name: str) -> None:
        if path.name == "second":
            raise ConnectionError
        put(store, path, name)

    with monkeypatch.context() as patched:
        patched.setattr(mirror.Mirror, "_put", fail)
        with pytest.raises(ConnectionError):
            ray_jobs.push_inputs(store, tmp_path / "r")
    sent = ray_jobs.push_inputs(store, tmp_path / "r").dataset
    assert sent is not None
    assert {path.name for path in (tmp_path / "store/r" / sent).iterdir()} == {"first", "second"}


def test_a_job_that_the_cluster_has_forgotten_is_known_by_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_jobs.RayJobs, "_find", lambda *_: None)
    jobs, run_dir = ray_jobs.RayJobs("nowhere", f"file://{tmp_path}/store", sys.executable), tmp_path / "runs/r"
    left = tmp_path / "store/r/attempts/1"
    (left / "checkpoints/step-5").mkdir(parents=True)
    (left / "checkpoints/step-5/state.json").write_text("{}")
    assert jobs.status(run_dir, 1) == launch.UNSEEN
    assert run_folders.newest_checkpoint(run_dir) == 5
    (left / "result.json").write_text('{"status": "done"}')
    assert jobs.status(run_dir, 1) == 0


def test_while_the_store_does_not_answer_nothing_is_known_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pull(*_arguments: object, **_options: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(ray_jobs.RayJobs, "_find", lambda *_: None)
    monkeypatch.setattr(mirror.Mirror, "pull", pull)
    with capture_logs() as said:
        assert ray_jobs.RayJobs("nowhere", f"file://{tmp_path}/store", sys.executable).status(tmp_path / "r", 1) is None
    assert [line["event"] for line in said] == ["store_does_not_answer"]


def test_a_store_that_does_not_answer_is_told_of_and_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def remove(_store: mirror.Mirror, _name: str) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(mirror.Mirror, "remove", remove)
    with capture_logs() as said:
        ray_jobs.RayJobs("http://127.0.0.1:1", f"file://{tmp_path}/store", sys.executable).clean_up(tmp_path / "r1")
    assert [(line["event"], line["run"], line["error"]) for line in said] == [("store_not_cleaned", "r1", "ConnectionError")]


@needs_ray
def test_a_cluster_that_does_not_answer_is_asked_again(tmp_path: Path) -> None:
    jobs = ray_jobs.RayJobs(f"http://127.0.0.1:{find_port()}", f"file://{tmp_path}", sys.executable)
    assert jobs.status(tmp_path / "r", 1) is None


def test_settings_that_name_a_cluster_need_a_store(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="say where run folders travel"):
        Training(launcher="ray")
    settings = Settings(training=Training(launcher="ray", store=f"file://{tmp_path}"))
    assert isinstance(choice.make_launcher(settings), ray_jobs.RayJobs)


def test_a_checkpoint_that_is_half_in_the_store_is_no_step_forward(tmp_path: Path) -> None:
    for name in ("step-2/weights.safetensors", "step-2/state.json", "step-4/weights.safetensors"):
        path = tmp_path / "store" / "attempts/1/checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    run_dir = tmp_path / "run"
    ray_jobs.fetch_attempt(mirror.Mirror((tmp_path / "store").as_uri()), run_dir / "attempts" / "1", 1)
    assert run_folders.newest_checkpoint(run_dir) == 2
