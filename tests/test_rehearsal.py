"""A replay is set up from the command line: in its own folder, with the agent that was asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon import cases, cli, rehearsal, simulate
from daemon.launchers import workers
from tests.model_fixtures import tiny_base
from tests.replay_fixtures import InProcess, make_cases, write_cases

CONFIG = """
[agents.claims]
labels = ["APPROVED", "DENIED"]
prompt = "prompt.j2"

[agents.claims.triggers]
new_labels_min = 7
drift = false
"""
PROMPT = "{{ input.diagnosis }} {{ input.treatment }}: "


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> rehearsal.Asked:
    """A replay of two small files, all paths relative to the folder that we are in."""
    monkeypatch.chdir(tmp_path)
    write_cases(Path("history.jsonl"), make_cases(60, 0))
    write_cases(Path("stream.jsonl"), make_cases(40, 60))
    return rehearsal.Asked(
        history=Path("history.jsonl"),
        stream=Path("stream.jsonl"),
        out=Path("out"),
        base="tiny",
        budget=0.3,
        retrain_every=1000,
        rule="posterior",
        seed=1,
        with_baselines=False,
        config=None,
        agent=None,
        overrides={"epochs": 1},
    )


@pytest.fixture
def configured(asked: rehearsal.Asked) -> rehearsal.Asked:
    """The same with an agent out of a configuration whose home holds a base already."""
    home = Path("home")
    (home / "models" / "base").mkdir(parents=True)
    (home / "ratchet.toml").write_text(CONFIG)
    (home / "prompt.j2").write_text(PROMPT)
    return replace(asked, config=home / "ratchet.toml")


def run(asked: rehearsal.Asked) -> dict[str, Any]:
    return rehearsal.run(asked, lambda _stage: None, lambda _n, _of: None)


def make_agent(asked: rehearsal.Asked) -> Any:
    return rehearsal.make_agent(asked, cases.read(asked.history))


def test_a_replay_may_be_asked_for_with_relative_paths(configured: rehearsal.Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Workers", lambda *_, **_options: InProcess())
    tiny_base(Path("base"))
    found = run(replace(configured, base="base"))
    assert found["claims"] == 40
    assert Path("out/report.html").is_file()


def test_a_case_that_cannot_be_rendered_costs_a_replay_only_that_case(configured: rehearsal.Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "Workers", lambda *_, **_options: InProcess())
    tiny_base(Path("base"))
    Path("home/prompt.j2").write_text("{{ input.diagnosis.upper() }}: ")
    wordless = [replace(case, input={"treatment": "drug"}) for case in make_cases(61, 0)[::60]]
    cases = [*wordless[:1], *make_cases(60, 0)[1:]], [*wordless[1:], *make_cases(40, 60)[1:]]
    for path, some in zip((configured.history, configured.stream), cases, strict=True):
        write_cases(path, some)
    assert run(replace(configured, base="base"))["claims"] == 40
    windows = json.loads(Path("out/windows/0000/window.json").read_text())
    assert windows["right"]["champion"][0] is False
    agent = make_agent(configured)
    rehearsal.write_texts(Path("texts.jsonl"), agent, cases[0][:3])
    assert len(Path("texts.jsonl").read_text().splitlines()) == 2 + len(agent.labels)


def test_the_small_base_lies_in_the_folder_of_the_replay_whatever_the_configuration_says(configured: rehearsal.Asked) -> None:
    assert make_agent(configured).base_model == configured.out / "base"
    assert make_agent(replace(configured, base="elsewhere")).base_model == Path("elsewhere")


def test_of_the_configured_triggers_only_the_number_of_new_labels_is_replaced(configured: rehearsal.Asked) -> None:
    triggers = make_agent(configured).triggers
    assert (triggers.new_labels, triggers.new_labels_min, triggers.drift) == (1000, 7, False)


def test_a_folder_goes_on_with_the_agent_that_it_began_with_and_refuses_another(configured: rehearsal.Asked) -> None:
    configured.out.mkdir()
    for _ in range(2):
        rehearsal.check_same(configured, make_agent(configured))
    Path("home/prompt.j2").write_text(PROMPT + " ")
    with pytest.raises(simulate.SimulationError, match=r"another agent\.prompt: ask for the same"):
        rehearsal.check_same(configured, make_agent(configured))
    Path("home/prompt.j2").write_text(PROMPT)
    Path("home/ratchet.toml").write_text(CONFIG.replace("false", "true"))
    with pytest.raises(simulate.SimulationError, match=r"another agent\.triggers: ask for the same"):
        rehearsal.check_same(configured, make_agent(configured))
    with pytest.raises(simulate.SimulationError, match=r"another agent\.triggers, seed: ask for the same"):
        rehearsal.check_same(replace(configured, seed=2), make_agent(configured))


def test_an_option_is_set_as_for_a_training_by_hand(configured: rehearsal.Asked) -> None:
    for asked in (configured, replace(configured, config=None)):
        agent = make_agent(replace(asked, overrides={"lora.rank": 8, "warm_start": "never"}))
        assert (agent.training.lora.rank, agent.training.lora.alpha, agent.warm_start) == (8, 32, "never")


def test_a_history_from_which_no_agent_can_be_made_is_refused_with_the_reason(asked: rehearsal.Asked) -> None:
    history = [replace(case, answer="DENIED") for case in make_cases(5, 0)]
    with pytest.raises(simulate.SimulationError, match=r'labels = \["DENIED"\]: should have at least 2 items'):
        rehearsal.make_agent(asked, history)


MISTAKES = {
    "--set epochs": "'epochs' has no value: write KEY=VALUE",
    "--set epochs=x": 'epochs = "x": should be a valid number',
    "--set epochs=0": "epochs = 0: should be greater than 0",
    "--set epochs.x=1": "there is no training option 'epochs.x': use one of method, policy, learning_rate, epochs,",
    "--set lora=8": "lora is 8: name one of lora.rank, lora.alpha",
    "--set rank=8": "there is no training option 'rank': use one of method, policy, learning_rate,",
    "--set seed=8": "seed is 8: a replay's is --seed",
    "--rule foo": "'foo' is no rule: use posterior or anytime",
    "--base nowhere": "nowhere holds no config.json: name the folder of a Hugging Face checkpoint, or tiny",
    "--history nowhere.jsonl": "'nowhere.jsonl' does not exist",
    "--stream nowhere.jsonl": "'nowhere.jsonl' does not exist",
}


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_on_the_command_line_is_named_with_what_would_be_right(mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "--history", "history.jsonl", "--stream", "stream.jsonl", "--out", "out", *mistake.split()]
    assert cli.main(command) == 2
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert MISTAKES[mistake] in said
    assert mistake.split(maxsplit=1)[0] in said
    assert not Path("out/ratchet.db").exists()
