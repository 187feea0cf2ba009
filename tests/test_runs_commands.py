"""`ratchet train` and `ratchet runs`: asked for, looked at, followed and cancelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from daemon.cli import runs as commands
from storage import runs
from tests.cli_fixtures import ask, home, opened, run

__all__ = ("ask", "home", "opened", "run")


def test_a_run_is_asked_for_with_its_reason_and_options(ask: Any) -> None:
    queued = ask("train", "--reason", "after the audit", "--set", "epochs=2", "--set", "warm_start=never")
    [listed] = ask("runs", "list")
    assert (listed["id"], listed["state"], listed["trigger"]) == (queued["run"], "queued", "manual")
    shown = ask("runs", "show")
    assert shown["reason"] == "after the audit"
    assert shown["options"]["overrides"] == {"epochs": 2, "warm_start": "never"}


def test_a_run_is_asked_for_by_a_method(run: Any, ask: Any) -> None:
    assert "method = \"more\": should be 'lora', 'qlora', 'full' or 'pretrain'" in run("train", "--reason", "x", "--method", "more")[2]
    assert "texts is missing: method pretrain reads text files" in run("train", "--reason", "x", "--method", "pretrain")[2]
    assert "full can't load_in_4bit: use method qlora" in run("train", "--reason", "x", "--method", "full", "--set", "load_in_4bit=true")[2]
    ask("train", "--reason", "x", "--method", "full", "--set", "epochs=1")
    assert ask("runs", "show")["options"]["overrides"] == {"epochs": 1, "method": "full"}


def test_a_second_run_and_a_wrong_option_are_refused(run: Any, ask: Any) -> None:
    assert "there is no training option 'epoch'" in run("train", "--reason", "x", "--set", "epoch=2")[2]
    assert "has no value" in run("train", "--reason", "x", "--set", "epochs")[2]
    told = "seed is 20261126120000: use a whole number from 0 to 2147483647"
    assert told in run("train", "--reason", "x", "--set", "seed=20261126120000")[2]
    told = "lora.rank means nothing to method full, which trains all weights here: leave it out"
    assert told in run("train", "--reason", "x", "--method", "full", "--set", "lora.rank=8")[2]
    told = "pretrain.weights means nothing to method lora: leave it out, or add --method pretrain"
    assert told in run("train", "--reason", "x", "--set", "pretrain.weights=all")[2]
    queued = ask("train", "--reason", "x")
    status, _, err = run("train", "--reason", "again")
    assert status == 1
    assert f"ratchet runs cancel {queued['run']}" in err


def test_a_run_is_cancelled_once(run: Any, ask: Any) -> None:
    assert "there is no run yet" in run("runs", "show")[2]
    ask("train", "--reason", "x")
    assert run("runs", "cancel", "--reason", "a mistake")[0] == 0
    assert "a mistake" in ask("runs", "show")["error"]
    status, _, err = run("runs", "cancel")
    assert status == 1
    assert "is cancelled: only a run that goes on" in err


def test_what_the_trainer_wrote_is_printed_attempt_by_attempt(run: Any, ask: Any, opened: Any, tmp_path: Path) -> None:
    queued = ask("train", "--reason", "x")
    with opened.writing() as connection:
        runs.lease(connection, runs.read(connection, queued["run"]), "cpu", 1, str(tmp_path / "run"))
    for attempt in (2, 10, 1):
        folder = tmp_path / "run" / "attempts" / str(attempt)
        folder.mkdir(parents=True)
        (folder / "log.txt").write_text(f"attempt {attempt} speaks\n")
    out = run("runs", "logs")[1]
    assert [line for line in out.splitlines() if "speaks" in line] == [f"attempt {number} speaks" for number in (1, 2, 10)]


def test_plan_trial_and_peak_of_a_run_are_told_side_by_side() -> None:
    planned = {"card": {"name": "RTX 3090", "kind": "cuda", "memory": 24 * 10**9}, "total": 21 * 10**9, "parts": {"overhead": 10**9}}
    told = {"plan": planned, "calibrated_bytes": 19 * 10**9, "peak_bytes": 195 * 10**8, "max_tokens": 4096, "halved": 0}
    assert commands.describe_memory({"result": {"memory": told}})["memory"] == (
        "planned 20.00 GB on RTX 3090 (24 GB), took 19.50 GB at the peak, passes of 4,096 tokens, "
        "19.00 GB with the heaviest of them before the first step"
    )
    assert "heaviest" not in commands.describe_memory({"result": {"memory": told | {"calibrated_bytes": None}}})["memory"]


def test_following_ends_with_the_run(run: Any, ask: Any, opened: Any) -> None:
    queued = ask("train", "--reason", "x")
    with opened.writing() as connection:
        runs.lease(connection, runs.read(connection, queued["run"]), "cpu", 1, "/nowhere")
        leased = runs.read(connection, queued["run"])
        runs.begin(connection, leased, leased["created_at"])
        runs.beat(connection, leased, {"phase": "training", "step": 1, "steps": 2, "loss": 0.5, "eta_seconds": 3.0}, leased["created_at"])
        runs.give_up(connection, runs.read(connection, queued["run"]), "failed", "refused: no rows", leased["created_at"])
    status, out, _ = run("runs", "follow")
    assert status == 1
    assert out.strip().endswith("is failed: refused: no rows")
