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

from daemon import launch
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


@pytest.fixture
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


def submit(jobs: ray_jobs.RayJobs, run_dir: Path) -> None:
    """Submit as soon as the cluster takes jobs."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with contextlib.suppress(ConnectionError, RuntimeError):
            return jobs.submit(run_dir, 1)
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.2)


def prepare(run_dir: Path, asked: spec.Spec) -> Path:
    (run_dir / "attempts" / "1").mkdir(parents=True)
    (run_dir / "attempts" / "1" / "attempt.json").write_text('{"fence": 7}')
    spec.write_spec(run_dir, asked)
    return run_dir


@needs_ray
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")
def test_a_job_on_a_cluster_brings_back_what_a_process_here_makes(tmp_path: Path, cluster: str) -> None:
    base = tiny_base(tmp_path / "base")
    scored = fixtures.score_set(tmp_path / "recent.parquet", range(5))
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set"), {"epochs": 1}, score_sets=(scored,))
    run_dir = prepare(tmp_path / "runs" / "r1", asked)
    jobs = ray_jobs.RayJobs(cluster, f"file://{tmp_path}/store", sys.executable)
    submit(jobs, run_dir)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (status := jobs.status(run_dir, 1)) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert status == 0, jobs.logs(run_dir, 1)
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
