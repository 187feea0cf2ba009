"""`ratchet plan`: what a training takes of a card, told before it is asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from daemon import cards, estimates, plan
from storage import runs
from tests.cli_fixtures import ask, home, opened, run
from tests.test_plan import LLAMA_8B
from trainers import spec

__all__ = ("ask", "home", "opened", "run")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with nothing but the configuration of Llama 3 8B."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))
    return folder


def test_the_parts_the_settings_and_the_remedy_are_told(ask: Any, run: Any, base: Path) -> None:
    [told] = ask("plan", "--base", base, "--gpu", "12GB", "--method", "qlora", "--set", "lora.rank=64", "--set", "serve_in_4bit=true")
    assert sum(told["parts"].values()) == told["total"] <= 12 * cards.GB
    assert told["settings"] == {
        "is_4bit": True,
        "checkpoint_every": 1,
        "max_tokens": 4096,
        "adapter_dtype": "bfloat16",
        "optimizer": "adamw",
        "optimizer_in_backward": False,
        "rounding": "stochastic",
    }
    lines = dict(line.split(maxsplit=1) for line in run("plan", "--base", base, "--gpu", "24GB", "--method", "full")[1].splitlines())
    assert [lines[name][-2:] for name in told["parts"]] == ["GB"] * 6
    assert lines["moments"] == "in 8 bits, on the host, in the backward pass (accumulation 1, clip 0)"
    status, out, _ = run("plan", "--base", base, "--gpu", "12 gb")
    assert status == 1
    assert "set method = qlora in the agent's configuration; use a card of 24 GB" in out
    assert "no such run on such a card yet" in out


def test_a_method_of_one_run_does_not_change_how_the_base_is_served(run: Any, base: Path) -> None:
    status, out, _ = run("plan", "--base", base, "--gpu", "12GB", "--method", "qlora")
    assert status == 1
    assert "set serve_in_4bit = true in the agent's configuration" in out


def test_without_a_card_this_machine_and_the_usual_sizes_are_compared(ask: Any, run: Any, base: Path) -> None:
    usual = ask("plan", "--base", base)[-5:]
    assert [one["card"]["name"] for one in usual] == ["12 GB", "24 GB", "48 GB", "80 GB", "141 GB"]
    assert [one["fits"] for one in usual] == [False, True, True, True, True]
    assert "all layers" in run("plan", "--base", base)[1]


def test_a_size_or_a_base_that_is_none_is_refused(run: Any, base: Path, tmp_path: Path) -> None:
    assert [run("plan", "--base", base, "--gpu", size)[0] for size in ("large", "24", "0GB")] == [2, 2, 2]
    assert "25.7698 GB" in run("plan", "--base", base, "--gpu", "24GiB")[1].splitlines()[0]
    assert "name the folder of a Hugging Face checkpoint" in run("plan", "--base", tmp_path / "absent")[2]
    (base / "config.json").write_text("[]")
    assert "holds no object" in run("plan", "--base", base)[2]


def test_the_time_is_that_of_runs_on_the_same_card(opened: Any, base: Path, now: Any) -> None:
    rtx = cards.Card("RTX", "cuda", 24 * cards.GB)
    pair, other = dataclasses.replace(rtx, count=2), dataclasses.replace(rtx, name="other")
    [planned] = estimates.plan_run(spec.Options(), "lora", base, [rtx])
    with opened.writing() as connection:
        for card, method, speed in ((rtx, "lora", 500.0), (rtx, "full", 80.0), (pair, "lora", 900.0), (other, "lora", 9000.0)):
            asked = runs.queue(connection, "adjudication", "train", "manual", f"{card}, {method}", "ops", {}, now)
            runs.lease(connection, runs.read(connection, asked), "cuda:0", 1, "/nowhere")
            runs.begin(connection, runs.read(connection, asked), now)
            told = {"plan": {"card": dataclasses.asdict(card), "parameters": planned.parameters}}
            result = {"training": {"tokens": 60_000, "tokens_per_second": speed, "method": method}, "memory": told}
            runs.finish(connection, runs.read(connection, asked), result, now)
        assert estimates.expect_time(connection, "adjudication", "lora", planned) == (1, 500.0, 120.0, ("RTX",))
        assert estimates.expect_time(connection, "adjudication", "qlora", planned).runs == 0


def test_the_estimate_stands_beside_what_the_last_run_with_these_settings_took(
    run: Any, ask: Any, opened: Any, base: Path, now: Any
) -> None:
    card = cards.Card("RTX 3090", "cuda", 24 * cards.GB)
    planned = [estimates.plan_run(spec.Options(method=method), "train", base, [card])[0] for method in ("lora", "qlora")]
    with opened.writing() as connection:
        for one, peak in zip(planned, (19 * cards.GB, 9 * cards.GB), strict=True):
            asked = runs.queue(connection, "adjudication", "train", "manual", f"took {peak}", "ops", {}, now)
            runs.lease(connection, runs.read(connection, asked), "cuda:0", 1, "/nowhere")
            runs.begin(connection, runs.read(connection, asked), now)
            result = {"training": {"tokens_per_second": 500.0}, "memory": {"plan": one.to_json(), "peak_bytes": peak}}
            runs.finish(connection, runs.read(connection, asked), result, now)
    [told] = ask("plan", "--base", base, "--gpu", "24GB", "--method", "lora")
    assert told["measured"] == 19 * cards.GB
    lines = dict(line.split(maxsplit=1) for line in run("plan", "--base", base, "--gpu", "24GB", "--method", "qlora")[1].splitlines())
    assert lines["measured"] == "9.00 GB"
    assert ask("plan", "--base", base, "--gpu", "48GB")[0]["measured"] is None


def test_a_card_that_is_only_a_size_is_every_card_that_is_sold_as_such(opened: Any, base: Path, now: Any) -> None:
    there = [cards.Card(name, "cuda", memory) for name, memory in (("RTX 3090", 24 * 2**30), ("RTX 3060", 12 * 2**30))]
    there.append(cards.Card("a server's processor", "cpu", 24 * 2**30))
    planned = estimates.plan_run(spec.Options(), "lora", base, there)
    with opened.writing() as connection:
        for one in planned:
            asked = runs.queue(connection, "adjudication", "train", "manual", one.card.name, "ops", {}, now)
            runs.lease(connection, runs.read(connection, asked), "cuda:0", 1, "/nowhere")
            runs.begin(connection, runs.read(connection, asked), now)
            training = {"tokens": 60_000, "tokens_per_second": 500.0, "supervised_tokens": 6_000, "method": "lora"}
            runs.finish(connection, runs.read(connection, asked), {"training": training, "memory": {"plan": one.to_json()}}, now)
        told = [
            estimates.expect_time(connection, "adjudication", "lora", one)
            for one in estimates.plan_run(spec.Options(), "lora", base, SIZES)
        ]
        graded = [estimates.read_supervised(connection, agent) for agent in ("adjudication", "another")]
    assert [one.cards for one in told] == [("RTX 3060",), ("RTX 3090",), ()]
    assert told[1].seconds == 120.0
    assert graded == [0.1, plan.SUPERVISED]
    few, many = (estimates.plan_run(spec.Options(), "lora", base, SIZES[:1], share)[0].parts.logits for share in graded[::-1])
    assert many == pytest.approx(2 * few, rel=0.01)


def test_the_pace_of_another_base_counts_by_its_weights() -> None:
    assert estimates.expect_rate(10, []) is None
    assert estimates.expect_rate(2_000, [estimates.Pace(100, 1_000), estimates.Pace(50, 2_000), estimates.Pace(10, 1_000)]) == 50


SIZES = [cards.Card(cards.name_size(size * cards.GB), "cuda", size * cards.GB) for size in (12, 24, 48)]
