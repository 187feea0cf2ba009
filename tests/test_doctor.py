"""daemon.doctor: what is missing is named with a remedy that works as it stands."""

import re
import shlex

from daemon import cli, doctor

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
