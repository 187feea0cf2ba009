"""daemon.doctor: what is missing is named with a remedy that works as it stands."""

import re
import shlex
from datetime import UTC, datetime

import pytest

from daemon import cli, config, doctor
from storage import registry
from tests.version_fixtures import make_made

pytest_plugins = ["tests.cli_fixtures"]


def test_the_remedy_for_a_missing_base_is_a_command_that_works(opened, home, monkeypatch):
    agent = opened.pick_agent(None)
    finding = doctor._examine_base(agent)
    assert not finding.is_well
    command = re.search(r"`ratchet (.+?)`", finding.remedy)[1]
    texts = home / "texts.jsonl"
    texts.write_text('{"text": "a claim"}\n')
    started = []
    monkeypatch.setattr("subprocess.run", lambda arguments, **_: started.append(arguments) or type("Done", (), {"returncode": 0}))
    assert cli.main(shlex.split(command.replace("FILE", str(texts)))) == 0
    assert started[0][3:7] == ["--texts", str(texts), "--out", str(agent.base_model)]


def test_a_damaged_database_is_one_line_with_a_way_out(home):
    (home / "ratchet.db").write_bytes(b"no database" * 1000)
    found = next(doctor.examine(config.load(home / "ratchet.toml", {})))
    assert (found.name, found.is_well) == ("database", False)
    assert found.detail.endswith("file is not a database")
    assert "restore a lost or damaged one from a backup" in found.remedy


@pytest.mark.parametrize(
    ("variables", "is_well", "told"),
    [
        ({"RATCHET_DEVICES__SLOTS": '["cpu", "cpu:1"]'}, True, "runs go to cpu, cpu:1"),
        ({"RATCHET_DEVICES__SLOTS": '["cuda:97"]'}, False, "and not cuda:97"),
        (
            {"RATCHET_DEVICES__SLOTS": '["cuda:97"]', "RATCHET_TRAINING__LAUNCHER": "ray", "RATCHET_TRAINING__STORE": "file:///mnt"},
            True,
            "runs go to cuda:97",
        ),
    ],
)
def test_the_devices_that_runs_go_to_are_told_and_looked_for_unless_a_cluster_has_them(home, variables, is_well, told):
    finding = doctor._examine_devices(config.load(home / "ratchet.toml", variables))
    assert finding.is_well == is_well
    assert finding.detail.endswith(told)


def test_a_champion_whose_files_are_not_where_the_database_says_is_found(opened, tmp_path):
    with opened.writing() as connection:
        registry.register_bare(connection, "adjudication", make_made(tmp_path, None), datetime.now(UTC))
    found = {finding.name: finding for finding in doctor.examine(opened.settings)}["adjudication: champion"]
    assert not found.is_well
    assert "v0 is not in" in found.detail
    assert "from a backup" in found.remedy
