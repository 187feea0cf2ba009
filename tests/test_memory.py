"""A run that finds no memory goes on in smaller passes, with the same losses, and says what it took beside what was planned."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon import cards, plan
from tests import training_fixtures as fixtures
from tests.model_fixtures import tiny_base
from trainers import attempts, bases, loop, memory, optimizers, packing, spec, stopping, texts, train

CARD = {"card": {"name": "card", "kind": "cpu", "memory": 1, "taken": 0}, "total": 5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fixtures.dataset(tmp_path_factory.mktemp("data") / "set")


def limit_passes(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Let passes of more tokens find no memory, in the middle of the backward pass; returns those that were tried."""
    tried: list[int] = []
    whole = packing.token_losses

    def run(model: Any, packed: packing.Pack) -> torch.Tensor:
        tried.append(packed.tokens)
        losses = whole(model, packed)
        if packed.tokens > tokens and losses.requires_grad:
            losses.register_hook(fail)
        elif packed.tokens > tokens:
            fail()
        return losses

    monkeypatch.setattr(packing, "token_losses", run)
    return tried


def fail(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")


def read_losses(run_dir: Path) -> list[float]:
    lines = (json.loads(line) for line in (run_dir / "attempts/1/progress.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["phase"] == "training"]


@pytest.fixture
def every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress that leaves no step out."""
    whole = attempts.Progress.__init__
    monkeypatch.setattr(attempts.Progress, "__init__", lambda self, attempt: whole(self, attempt, 0))


@pytest.mark.usefixtures("every_line")
def test_passes_are_halved_until_they_fit_with_the_same_losses(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fixtures.make_spec(base, data, {"epochs": 2, "max_tokens": 512}, plan=CARD)
    assert fixtures.perform(tmp_path / "whole", asked) == 0
    tried = limit_passes(monkeypatch, 150)
    assert fixtures.perform(tmp_path / "halved", asked) == 0
    assert max(tried) > 150
    found = fixtures.result(tmp_path / "halved")
    assert found["memory"]["plan"] == CARD
    assert (found["memory"]["max_tokens"], found["memory"]["halved"]) == (128, 2)
    assert fixtures.result(tmp_path / "whole")["memory"]["halved"] == 0
    assert found["memory"]["peak_bytes"] > 10**8
    whole, halved = (read_losses(tmp_path / name) for name in ("whole", "halved"))
    assert len(whole) == len(halved) == 12
    assert halved == pytest.approx(whole, rel=1e-5)


def test_passes_that_are_updates_of_their_own_are_made_again_without_what_has_learned_from_them(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"method": "full", "learning_rate": 2e-3, "optimizer_in_backward": True, "optimizer": "adamw", "epochs": 3}
    moves: Counter[str] = Counter()
    hooked: list[Any] = []
    lengths: list[int] = []
    whole, step = packing.token_losses, optimizers.Adam.step

    def run(model: Any, packed: packing.Pack) -> torch.Tensor:
        if not hooked:
            hooked.extend([model.get_output_embeddings().weight, model.get_input_embeddings().weight])
            hooked[1].register_hook(lambda _: fail() if lengths[-1] > 100 else None)
        lengths.append(packed.tokens)
        return whole(model, packed)

    def count(adam: optimizers.Adam) -> None:
        moves.update(name for name, weight in zip(("first", "last"), hooked, strict=True) if adam.parameters[0] is weight)
        step(adam)

    monkeypatch.setattr(packing, "token_losses", run)
    monkeypatch.setattr(optimizers.Adam, "step", count)
    assert fixtures.perform(tmp_path / "run", fixtures.make_spec(base, data, options)) == 0
    found = fixtures.result(tmp_path / "run")
    assert found["memory"]["halved"] >= 2
    assert found["training"]["final_loss"] < 5
    assert 0 < moves["first"] < moves["last"], "what is moved first had learned from the pass that failed"


def test_a_run_whose_smallest_pass_finds_no_memory_fails_with_the_remedies(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_passes(monkeypatch, 1)
    assert fixtures.perform(tmp_path / "run", fixtures.make_spec(base, data)) == 1
    assert "options.recompute_layers = 1" in fixtures.result(tmp_path / "run")["reason"]


def count_before_steps(monkeypatch: pytest.MonkeyPatch, tried: list[int]) -> list[int]:
    """How many passes there were before each step."""
    before: list[int] = []
    step = loop.Loop.take_step

    def count(self: loop.Loop) -> None:
        before.append(len(tried))
        step(self)

    monkeypatch.setattr(loop.Loop, "take_step", count)
    return before


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which memory runs out, as on a card."""
    monkeypatch.setattr(memory, "can_run_out", lambda device: device == "cpu")


@pytest.mark.usefixtures("scarce")
def test_what_finds_no_memory_is_found_out_before_the_first_step(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = limit_passes(monkeypatch, 150)
    first = count_before_steps(monkeypatch, tried)
    assert fixtures.perform(tmp_path / "run", fixtures.make_spec(base, data, {"max_tokens": 512})) == 0
    assert max(tried[: first[0]]) > 150
    assert max(tried[first[0] :]) <= 128
    found = fixtures.result(tmp_path / "run")["memory"]
    assert (found["max_tokens"], found["halved"]) == (128, 2)
    assert 10**8 < found["calibrated_bytes"] < 1.01 * found["peak_bytes"]  # the kernel counts pages loosely


@pytest.mark.usefixtures("scarce")
@pytest.mark.parametrize("max_tokens", [16, 128, 512])
def test_no_pass_of_a_run_is_larger_than_those_that_were_tried(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, max_tokens: int
) -> None:
    tried = limit_passes(monkeypatch, 10**6)
    first = count_before_steps(monkeypatch, tried)
    asked = fixtures.make_spec(base, fixtures.dataset(tmp_path / "set", dev=0), {"max_tokens": max_tokens, "epochs": 2})
    assert fixtures.perform(tmp_path / "run", asked) == 0
    assert first[0] == 2
    assert max(tried[:2]) >= max(tried[2:])


@pytest.mark.parametrize(
    "options",
    [{"epochs": 1}, {"epochs": 1, "optimizer": "adamw_8bit"}, {"epochs": 1, "method": "full", "optimizer_in_backward": True}],
    ids=["after the step", "8 bits", "in the backward pass"],
)
def test_trying_passes_changes_nothing(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    asked = fixtures.make_spec(base, data, options)
    assert fixtures.perform(tmp_path / "plain", asked) == 0
    monkeypatch.setattr(memory, "can_run_out", lambda device: device == "cpu")
    assert fixtures.perform(tmp_path / "tried", asked) == 0
    plain, tried = (fixtures.result(tmp_path / name) for name in ("plain", "tried"))
    made = "model" if "method" in options else "adapter"
    assert tried[made] == plain[made]
    assert tried["training"]["final_loss"] == plain["training"]["final_loss"]
    assert plain["memory"]["calibrated_bytes"] is None
    assert tried["memory"]["calibrated_bytes"] > 10**8


@pytest.mark.usefixtures("scarce")
def test_a_run_that_can_not_fit_fails_before_its_first_step(
    tmp_path: Path, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_passes(monkeypatch, 1)
    assert fixtures.perform(tmp_path / "run", fixtures.make_spec(base, data)) == 1
    assert "find no memory" in fixtures.result(tmp_path / "run")["reason"]
    assert read_losses(tmp_path / "run") == []


@pytest.mark.usefixtures("scarce")
def test_nothing_is_tried_where_a_checkpoint_is_gone_on_from(tmp_path: Path, base: Path, data: Path) -> None:
    stop = stopping.Stop()
    stop.is_requested = True
    spec.write_spec(tmp_path / "run", fixtures.make_spec(base, data))
    assert train.run(tmp_path / "run", 1, bases.Bases(), stop)[0] == spec.EXIT_RESUMABLE
    assert train.run(tmp_path / "run", 2, bases.Bases(), stopping.Stop())[0] == spec.EXIT_DONE
    assert fixtures.result(tmp_path / "run", 2)["memory"]["calibrated_bytes"] is None


@pytest.mark.parametrize(("name", "size"), [("adamw", 8), ("adamw_8bit", 2), ("paged_adamw_8bit", 2)])
def test_as_much_is_reserved_as_moments_take(name: str, size: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(100, 1000, dtype=torch.bfloat16)), torch.nn.Parameter(torch.zeros(10_000))]
    options = spec.Options(optimizer=name)
    reserved = sum(one.nbytes for one in optimizers.reserve_moments(parameters, options))
    updates = optimizers.choose(parameters, options)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    updates.begin(0, 1e-4)
    updates.update()
    taken = sum(
        state[key].nbytes for state in updates.state.values() for key in state.keys() & {"exp_avg", "exp_avg_sq", "state1", "state2"}
    )
    assert reserved == taken == size * 110_000


def test_a_checkpoint_is_gone_on_from_with_smaller_passes(base: Path, data: Path) -> None:
    asked = fixtures.make_spec(base, data)
    smaller = asked.model_copy(update={"options": asked.options.model_copy(update={"max_tokens": 64, "recompute_layers": 1}), "plan": CARD})
    assert train.sign(asked) == train.sign(smaller)
    changed = asked.model_copy(update={"options": asked.options.model_copy(update={"epochs": 9})})
    assert train.sign(asked) != train.sign(changed)


def test_a_checkpoint_of_texts_that_were_drawn_by_another_rule_is_none_of_this_run(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels, pretrain = fixtures.make_spec(base, data), fixtures.make_spec(base, data, {"method": "pretrain"})
    before = [train.sign(asked) for asked in (labels, pretrain)]
    monkeypatch.setattr(texts, "VERSION", texts.VERSION + 1)
    assert [train.sign(asked) == old for asked, old in zip((labels, pretrain), before, strict=True)] == [True, False]


def test_a_checkpoint_is_gone_on_from_where_the_files_lie_in_other_places(base: Path, data: Path, tmp_path: Path) -> None:
    asked = fixtures.make_spec(base, data, learned=data)
    moved = {"dataset": tmp_path / "set", "learned": tmp_path / "known", "base": asked.base.model_copy(update={"path": tmp_path / "base"})}
    for name in ("set", "known"):
        shutil.copytree(data, tmp_path / name)
    assert train.sign(asked) == train.sign(asked.model_copy(update=moved))
    other = fixtures.dataset(tmp_path / "other", train=20)
    for name in ("dataset", "learned"):
        assert train.sign(asked) != train.sign(asked.model_copy(update={name: other}))


def test_what_was_done_before_counts_for_no_peak() -> None:
    torch.ones(60_000_000).sum()
    before = memory.read_peak("cpu")
    memory.reset_peak("cpu")
    after = memory.read_peak("cpu")
    assert before is not None
    assert after is not None
    assert after < before


def test_what_the_plan_tells_is_taken_by_the_spec(base: Path, data: Path, tmp_path: Path) -> None:
    shape = json.loads((base / "config.json").read_bytes())
    method = plan.Method("lora", "adapter", 16, 256, 512)
    planned = plan.plan_memory(shape, method, cards.Card("cpu", "cpu", 8 * cards.GB))
    spec.write_spec(tmp_path, fixtures.make_spec(base, data, plan=planned.to_json()))
    read = spec.read_spec(tmp_path).plan
    assert read is not None
    assert read["parts"] == dataclasses.asdict(planned.parts)
