"""Several processes make the same steps as one, and end together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import training_fixtures as fixtures
from tests.model_fixtures import tiny_base
from trainers import ranks, spec, torchrun

HOME = Path(spec.__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def start(run_dir: Path, asked: spec.Spec) -> subprocess.Popen[str]:
    """Begin a run on two places of the CPU."""
    spec.write_spec(run_dir, asked.model_copy(update={"device": "cpu+cpu"}))
    command = [sys.executable, "-m", "trainers.torchrun", str(run_dir), "--attempt", "1"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=HOME, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def read_weights(run_dir: Path) -> Any:
    adapter = fixtures.result(run_dir)["adapter"]["path"]
    return load_file(run_dir / "attempts/1" / adapter / "adapter_model.safetensors")


def test_two_processes_learn_what_one_learns(tmp_path: Path, base: Path) -> None:
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set", train=45), {"epochs": 2, "share_prefixes": False})
    with start(tmp_path / "two", asked) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert fixtures.perform(tmp_path / "one", asked) == 0
    one, two = (fixtures.result(tmp_path / name)["training"] for name in ("one", "two"))
    assert two["final_loss"] == pytest.approx(one["final_loss"], rel=1e-4)
    assert two["dev_loss"] == pytest.approx(one["dev_loss"], rel=1e-4)
    assert (two["steps"], two["tokens"]) == (one["steps"], one["tokens"])
    ours, theirs = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-4
    assert len((tmp_path / "two/attempts/1/progress.jsonl").read_text().splitlines()) > 1


def test_processes_that_are_asked_to_stop_end_together_and_go_on_later(tmp_path: Path, base: Path) -> None:
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set"), {"epochs": 1000, "checkpoint_steps": 5})
    with start(tmp_path / "run", asked) as process:
        while not list((tmp_path / "run").glob("attempts/1/checkpoints/step-*")) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == spec.EXIT_RESUMABLE, said
    assert not (tmp_path / "run/attempts/1/result.json").exists()
    state = json.loads(max((tmp_path / "run").glob("attempts/1/checkpoints/step-*/state.json")).read_text())
    assert state["step"] > 0


def test_the_status_is_the_one_that_all_ended_with() -> None:
    assert [torchrun.choose_status(set(statuses)) for statuses in ([2], [75], [1], [2, 75], [-9])] == [2, 75, 1, 1, 1]


def test_a_device_of_several_parts_needs_as_many_processes() -> None:
    assert ranks.Ranks(1, 2).pick_device("cuda:0+cuda:1") == "cuda:1"
    assert ranks.ALONE.pick_device("cpu") == "cpu"
    with pytest.raises(spec.SpecRefusedError, match=r"use python -m trainers\.torchrun"):
        ranks.ALONE.pick_device("cpu+cpu")


def test_rows_are_shared_evenly() -> None:
    assert [ranks.Ranks(rank, 3).share(list(range(8))) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
