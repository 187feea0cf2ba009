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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import training_fixtures as fixtures
from tests.model_fixtures import tiny_base
from trainers import attempts, attention, bases, data, encoding, loop, memory, packing, ranks, spec, stopping, torchrun, train

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


def read_losses(run_dir: Path) -> list[float]:
    """The loss of each step, as TensorBoard has it."""
    curves = EventAccumulator(str(run_dir / "attempts/1/tensorboard")).Reload()
    return [point.value for point in curves.Scalars("loss")]


METHODS: dict[str, dict[str, Any]] = {"lora": {}, "qlora": {"method": "qlora", "lora": {"rank": 8, "alpha": 16}}}
"""In 4 bits the adapter is in bf16: gradients that were summed in another order differ in the third digit."""


@pytest.mark.parametrize(("method", "near", "far"), [("lora", 1e-5, 1e-4), ("qlora", 5e-3, 2e-2)])
def test_two_processes_learn_what_one_learns(tmp_path: Path, base: Path, method: str, near: float, far: float) -> None:
    options = {"epochs": 2, "share_prefixes": False, **METHODS[method]}
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set", train=45), options)
    with start(tmp_path / "two", asked) as process:
        said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert fixtures.perform(tmp_path / "one", asked) == 0
    curve = read_losses(tmp_path / "one")
    assert read_losses(tmp_path / "two") == pytest.approx(curve, rel=near)
    one, two = (fixtures.result(tmp_path / name)["training"] for name in ("one", "two"))
    assert two["dev_loss"] == pytest.approx(one["dev_loss"], rel=near)
    assert (two["steps"], two["tokens"]) == (one["steps"], one["tokens"]) == (len(curve), two["tokens"])
    ours, theirs = read_weights(tmp_path / "one"), read_weights(tmp_path / "two")
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < far
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


def test_updates_in_the_backward_pass_are_refused_for_several_processes(tmp_path: Path, base: Path) -> None:
    options = {"method": "full", "optimizer_in_backward": True}
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set"), options)
    spec.write_spec(tmp_path / "run", asked.model_copy(update={"device": "cpu+cpu"}))
    status, said = train.run(tmp_path / "run", 1, bases.Bases(), stopping.Stop(), ranks.Ranks(0, 2))
    assert status == spec.EXIT_REFUSED
    assert "keeps no gradients to sum over several devices" in said
    assert fixtures.result(tmp_path / "run")["status"] == "refused"


def test_an_attempt_that_begins_after_a_newer_one_leaves_at_once(tmp_path: Path) -> None:
    for attempt in ("1", "2"):
        (tmp_path / "attempts" / attempt).mkdir(parents=True)
    status, said = train.run(tmp_path, 1, bases.Bases(), stopping.Stop())
    assert (status, "superseded by attempt 2" in said) == (spec.EXIT_RESUMABLE, True)


class Together(ranks.Ranks):
    """The first of two processes, of which the other measured 1 where this one measured its own."""

    def sum_numbers(self, *numbers: float, device: str) -> list[float]:
        assert device == "cpu"
        return [number + 1 / self.size for number in numbers]


def make_loop(base: Path, folder: Path, together: ranks.Ranks) -> loop.Loop:
    """A loop over one row, for all weights."""
    model, tokenizer = bases.load_base(base, "cpu")
    rows = [data.Example(encoding.encode_prompt(tokenizer, "a claim"), [5, 6])]
    attempt = attempts.open_attempt(folder)
    progress, stop, budget = attempts.Progress(attempt), stopping.Stop(), memory.Budget(64)
    return loop.Loop(model.requires_grad_(True), rows, rows, spec.Options(patience=1), 1, "s", attempt, progress, stop, budget, together)


def test_processes_end_an_epoch_with_the_same_dev_loss(base: Path, tmp_path: Path) -> None:
    ours = make_loop(base, tmp_path, Together(0, 2))
    ours.counters.epoch_weight = 1
    with attention.packed(ours.model):
        ours.end_epoch()
        alone = loop.mean_loss(ours.model, ours.dev, 64)
    ours.progress.close()
    assert ours.counters.best_dev_loss == pytest.approx((alone + 1) / 2)


@pytest.mark.parametrize(("rank", "passes"), [(0, 2), (1, 0)])
def test_each_process_tries_the_heaviest_passes_of_its_own_rows(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, passes: int
) -> None:
    tried = []
    losses = packing.token_losses
    monkeypatch.setattr(packing, "token_losses", lambda model, packed: (tried.append(packed.tokens), losses(model, packed))[1])
    ours = make_loop(base, tmp_path, ranks.Ranks(rank, 2))
    with attention.packed(ours.model):
        ours.calibrate()
    ours.progress.close()
    assert len(tried) == passes
    assert all(parameter.grad is None for parameter in ours.parameters)


def test_rows_are_shared_evenly() -> None:
    assert [ranks.Ranks(rank, 3).share(list(range(8))) for rank in range(3)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
