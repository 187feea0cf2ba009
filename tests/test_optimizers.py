"""Updates that are smaller than a weight's last digit count all the same, in the mean, and the same ones after a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trainers import checkpoints, optimizers
from trainers.spec import Options

RATE, STEPS = 1e-5, 200
AFTER_STEP = {"method": "full", "clip": 0.0, "accumulation": 1}
WAYS = {
    "adamw": {**AFTER_STEP, "optimizer": "adamw"},
    "adamw_8bit": {**AFTER_STEP, "optimizer": "adamw_8bit"},
    "backward": {"method": "full", "optimizer_in_backward": True},
}


def make(way: str, dtype: torch.dtype = torch.bfloat16, rows: int = 64) -> tuple[torch.nn.ParameterList, Any]:
    """Weights of 1 and what updates them."""
    model = torch.nn.ParameterList([torch.ones(rows, 128, dtype=dtype)])
    return model, optimizers.choose(list(model.parameters()), Options.model_validate({"learning_rate": RATE, **WAYS[way]}), seed=3)


def learn(model: torch.nn.ParameterList, updates: Any, steps: range) -> None:
    """Steps along the same gradient, of which each is as long as the rate."""
    for step in steps:
        updates.begin(step, RATE)
        model[0].float().sum().backward()
        updates.update()


@pytest.mark.parametrize("way", WAYS)
def test_many_small_updates_of_a_weight_in_bf16_come_to_their_sum(way: str) -> None:
    narrow, updates = make(way)
    learn(narrow, updates, range(STEPS))
    assert narrow[0].dtype == torch.bfloat16
    wide, updates = make(way, torch.float32)
    learn(wide, updates, range(STEPS))
    assert float(wide[0].detach().mean()) == pytest.approx(1 - RATE * STEPS, abs=1e-5)
    # The next weight below 1 is 0.004 away; 200 updates of 1e-5 are half of that, so many of the 8,192 weights have gone there.
    assert float(narrow[0].detach().double().mean()) == pytest.approx(1 - RATE * STEPS, abs=1e-4)
    assert narrow[0].detach().unique().tolist()[-2:] == [0.99609375, 1.0]


def test_rounding_is_right_in_the_mean_and_leaves_alone_what_bf16_knows() -> None:
    chance = torch.Generator().manual_seed(1)
    for value in (1.001, -1.001, 3e-5, -7.77e8):
        rounded = optimizers.round_randomly(torch.full((200_000,), value), chance)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert len(rounded.unique()) == 2
        assert float(rounded.double().mean()) == pytest.approx(value, rel=5e-5)
    known = torch.randn(1000).bfloat16().float()
    assert torch.equal(optimizers.round_randomly(known, chance), known)


def test_weight_decay_and_large_weights_are_added_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "ROUNDED_AT_ONCE", 100)
    weight = torch.full((25, 128), 2.0, dtype=torch.bfloat16)
    optimizers.add_randomly(weight, torch.full_like(weight, 0.5), 0.5, torch.Generator())
    assert torch.equal(weight, torch.full_like(weight, 1.5))


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_rounded_the_same_after_a_restart(way: str, tmp_path: Any) -> None:
    model, updates = make(way)
    learn(model, updates, range(5))
    checkpoints.save_checkpoint(tmp_path / "attempts/1/checkpoints", 5, model, updates, {"signature": "s"}, None)
    learn(model, updates, range(5, 9))
    other, fresh = make(way)
    assert checkpoints.load_newest(tmp_path, "s", other, fresh) is not None
    torch.rand(7)
    learn(other, fresh, range(5, 9))
    assert torch.equal(model[0], other[0])


def test_the_moments_of_a_weight_in_bf16_are_kept_in_fp32() -> None:
    model, updates = make("adamw")
    learn(model, updates, range(1))
    state = updates.state[model[0]]
    # In bf16 a second moment would never fall: 0.999 of it is rounded to itself.
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}
