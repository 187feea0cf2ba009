"""daemon.cli: what the commands that need no model do, and how failures look to a person."""

import json
import os
import re
import sqlite3
import subprocess
import sys

import pytest

from daemon import cli
from daemon.cli import context


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that `ratchet init` made, and we are in it."""
    for variable in [name for name in os.environ if name.startswith("RATCHET_") and name != "RATCHET_TEST_DATA"]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "claims"
    assert cli.main(["init", str(folder)]) == 0
    monkeypatch.chdir(folder)
    return folder


def test_init_writes_a_folder_that_works_as_it_is(home):
    assert cli.main(["config", "show"]) == 0
    assert cli.main(["db", "upgrade"]) == 0
    assert (home / "prompts" / "adjudication.j2").is_file()
    with sqlite3.connect(home / "ratchet.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()


def test_a_lost_database_is_made_anew_only_when_that_is_asked_for_and_then_it_is_said(home, capsys):
    assert cli.main(["db", "check"]) == 0
    place = home / "ratchet.db"
    place.unlink()
    for command in ["db", "check"], ["status"], ["up"]:
        assert cli.main(command) == 1
        assert f"there is no database at {place}: restore it from a backup" in capsys.readouterr().err
        assert not place.exists()
    assert cli.main(["db", "upgrade"]) == 0
    assert f"Made a new, empty database: {place}." in capsys.readouterr().out
    assert cli.main(["db", "check"]) == 0
    assert cli.main(["db", "upgrade"]) == 0
    assert "Made" not in capsys.readouterr().out


def test_a_server_that_is_away_is_told_with_the_remedy_and_without_the_password(home, monkeypatch, capsys):
    monkeypatch.setenv("RATCHET_DATABASE__URL", "postgresql://ratchet:right-horse@127.0.0.1:1/ratchet")
    for command in "check", "upgrade":
        assert cli.main(["db", command]) == 1
        told = capsys.readouterr().err
        assert told.startswith("ratchet: the database can't be opened: ")
        assert "Check database.url, and that the server runs and lets you in" in told
        assert "right-horse" not in told


def test_init_never_overwrites_a_configuration(home, capsys):
    (home / "ratchet.toml").write_text("mine")
    assert cli.main(["init", str(home)]) == 1
    assert (home / "ratchet.toml").read_text() == "mine"
    assert "is there already and stays as it is" in capsys.readouterr().err


def test_init_keeps_from_others_what_may_hold_claims_and_passwords_also_in_a_folder_that_was_there(tmp_path):
    tmp_path.chmod(0o755)
    assert cli.main(["init", str(tmp_path)]) == 0
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("ratchet.db", "ratchet.toml")}
    assert modes == {"ratchet.db": 0o600, "ratchet.toml": 0o600}


def test_a_folder_that_can_t_be_made_is_named_with_the_way_out(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["init", str(tmp_path / "file" / "home")]) == 1
    told = f"{tmp_path}/file/home can't be made (Not a directory): name a folder where you may write"
    assert capsys.readouterr().err == f"ratchet: {told}\n"


def test_a_current_folder_that_was_deleted_is_what_is_told(home, tmp_path, monkeypatch, capsys):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for command in ["init", "here"], ["status", "-c", "../claims/ratchet.toml"]:
        assert cli.main(command) == 1
        assert "the current folder was deleted: change into one that exists" in capsys.readouterr().err
    assert cli.main(["init", str(tmp_path / "new")]) == 0


def test_a_damaged_database_is_told_with_the_remedy(home, capsys):
    (home / "ratchet.db").write_bytes(b"no database" * 1000)
    assert cli.main(["status"]) == 1
    told = "the database is damaged (file is not a database): check database.url, or restore it from a backup (docs/operations.md)"
    assert capsys.readouterr().err == f"ratchet: {told}\n"


def test_an_init_that_failed_can_be_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RATCHET_SERVER__PORT", "none")
    assert cli.main(["init", str(tmp_path)]) == 1
    monkeypatch.delenv("RATCHET_SERVER__PORT")
    assert cli.main(["init", str(tmp_path)]) == 0
    assert not list(tmp_path.glob(".*.partial"))
    assert "RATCHET_SERVER__PORT" in capsys.readouterr().err


def test_config_show_prints_value_and_source_and_no_password(home, monkeypatch, capsys):
    monkeypatch.setenv("RATCHET_DATABASE__URL", "postgresql://u:hunter2@h/d")
    assert cli.main(["config", "show", "--json"]) == 0
    out = capsys.readouterr().out
    assert {"key": "database.url", "value": "postgresql+psycopg://u:***@h/d", "source": "RATCHET_DATABASE__URL"} in json.loads(
        out[out.index("[") :]
    )
    assert cli.main(["config", "show"]) == 0
    table = capsys.readouterr().out
    assert "agents.adjudication.threshold" in table
    assert re.search(r"kafka\.tls +false ", table), "a value is shown as it is written in the file"
    assert "hunter2" not in table + out


def test_the_configuration_is_found_by_option_and_by_variable(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["config", "show"]) == 1
    assert cli.main(["config", "show", "-c", str(home / "ratchet.toml")]) == 0
    monkeypatch.setenv("RATCHET_CONFIG", str(home / "ratchet.toml"))
    assert cli.main(["config", "show"]) == 0


def test_a_failure_is_one_line_on_stderr_and_exit_1(home, capsys):
    capsys.readouterr()
    assert cli.main(["config", "show", "--config", "absent.toml"]) == 1
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err == "ratchet: absent.toml is missing: `ratchet init DIR` writes one, `--config FILE` names another\n"


@pytest.mark.parametrize("arguments", [["confg"], ["config", "show", "--jsn"], ["init"]])
def test_wrong_usage_is_exit_2(arguments, capsys):
    assert cli.main(arguments) == 2
    assert "Error: " in capsys.readouterr().err


def test_an_unforeseen_error_is_named_by_its_type_without_a_traceback(home, monkeypatch, capsys):
    monkeypatch.setattr(context, "print_rows", lambda *_, **__: {}["absent"])
    assert cli.main(["config", "show"]) == 1
    assert capsys.readouterr().err == "ratchet: KeyError: 'absent' (RATCHET_LOG__LEVEL=debug shows where)\n"


def test_a_database_of_another_version_is_refused_with_the_remedy(home):
    with sqlite3.connect(home / "ratchet.db") as database:
        database.execute("DELETE FROM alembic_version")
    database.close()
    with pytest.raises(RuntimeError, match="run `ratchet db upgrade`"), context.opened(home / "ratchet.toml"):
        pass


def test_opened_gives_the_settings_and_their_database(home):
    with context.opened(home / "ratchet.toml") as opened:
        assert opened.engine.url.database == str(home / "ratchet.db")
        assert opened.settings.home == home


def test_listings_are_tables_for_people_and_json_for_programs(capsys):
    rows = [{"name": "[red]x", "when": None, "share": 0.123456, "tags": ["a"]}]
    context.print_rows(rows, as_json=False)
    table = capsys.readouterr().out
    assert "[red]x" in table
    assert "0.1235" in table
    context.print_rows(rows, as_json=True)
    assert json.loads(capsys.readouterr().out) == rows
    context.print_rows([], as_json=False, nothing="No agents yet.")
    assert capsys.readouterr().out == "No agents yet.\n"
    context.print_item({"name": "x", "labels": 3}, as_json=False)
    assert capsys.readouterr().out == "name    x\nlabels  3\n"
    context.print_item({"name": "x"}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"name": "x"}


def test_the_command_line_starts_without_its_heavy_parts():
    heavy = ["alembic", "fastapi", "pydantic", "pyarrow", "rich", "scipy", "sqlalchemy", "torch", "transformers"]
    code = f"import sys, daemon.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"


def test_the_daemon_starts_without_the_statistics_that_a_verdict_needs():
    code = "import sys, daemon.service; print({'scipy.special', 'scipy.stats', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("ratchet ")
