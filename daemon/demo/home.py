"""The demo's own folder: real decisions as history, stream and bad archive, and the configuration of a real daemon."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon import imr, rehearsal

AGENT = "adjudication"
LABELS = ("APPROVED", "DENIED")
HISTORY_YEARS, STREAM_YEARS, ARCHIVE_YEARS = (2001, 2002), (2011, 2013), (2003, 2010)
ARCHIVE_CASES = 1500
MARKER = ".ratchet-demo"
DATABASE_LINK, DATABASE_PREFIX = "postgres", "ratchet-demo-"
"""Where the data of a demo's own database server lies, if it has one: a link to a folder so named for temporary files."""
INVERTED = {"APPROVED": "DENIED", "DENIED": "APPROVED"}
CONFIG = """\
# The demo's configuration: a generous budget and a quick trigger, so that minutes show what otherwise takes months.
[server]
port = {port}
ops_port = {ops_port}

[devices]
slots = ["cpu"]
# The next training finds the base in memory and pays neither for imports nor for loading.
keep_warm_minutes = 10

[training]
seed = {seed}
backoff_seconds = 1

[agents.{agent}]
labels = ["APPROVED", "DENIED"]
approved = "APPROVED"
denied = "DENIED"
prompt = "prompts/imr.j2"
base_model = "models/base"
slices = ["diagnosis_category", "type"]
exam_share = 0.9
watch_share = 0.5

[agents.{agent}.budget]
share = 0.5

[agents.{agent}.training]
learning_rate = 2e-3
epochs = 4
batch_rows = 16
new_weight = 3

[agents.{agent}.watch]
max_asked = 120

[agents.{agent}.triggers]
new_labels = 300
# The inputs of 2011 are not those of 2001, so an alarm is certain; here the answers are to be what starts a training.
drift = false

[agents.{agent}.publisher]
kind = "reference"
url = "http://127.0.0.1:{node_port}"
"""


class FolderTakenError(FileExistsError):
    """The folder holds something that is not a demo's."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where everything of one demo lies, and where its two servers answer."""

    folder: Path
    port: int
    node_port: int

    @property
    def config(self) -> Path:
        """The daemon's configuration."""
        return self.folder / "ratchet.toml"

    @property
    def base(self) -> Path:
        """The small base model."""
        return self.folder / "models" / "base"

    @property
    def history(self) -> Path:
        """The first years' decisions."""
        return self.folder / "history.jsonl"

    @property
    def stream(self) -> Path:
        """The later years' decisions, that come in one by one."""
        return self.folder / "stream.jsonl"

    @property
    def archive(self) -> Path:
        """Decisions of the years between, every answer inverted."""
        return self.folder / "archive.jsonl"


def clear(folder: Path) -> None:
    """Make an empty folder for the demo; an earlier demo's is removed. Raises `FolderTakenError` for anything else."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).exists():
            raise FolderTakenError(f"{folder} is not empty and not a demo's: name another --out")
        database = (folder / DATABASE_LINK).resolve().parent
        if database.name.startswith(DATABASE_PREFIX):
            shutil.rmtree(database, ignore_errors=True)
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def furnish(folder: Path, seed: int, sections: str = "") -> Home:
    """Write the decisions, the prompt and the configuration, with further sections, into an initialised folder."""
    home = Home(folder, find_port(), find_port())
    (folder / "prompts" / "imr.j2").write_text(rehearsal.PROMPT)
    ports = {"port": home.port, "ops_port": find_port(), "node_port": home.node_port}
    home.config.write_text(CONFIG.format(agent=AGENT, seed=seed, **ports) + sections)
    imr.write_jsonl(home.history, *HISTORY_YEARS)
    imr.write_jsonl(home.stream, *STREAM_YEARS)
    lines = (json.dumps(case, ensure_ascii=False) + "\n" for case in spoil(imr.read_decisions(*ARCHIVE_YEARS), ARCHIVE_CASES))
    home.archive.write_text("".join(lines), encoding="utf-8")
    return home


def spoil(cases: Iterable[dict[str, Any]], last: int) -> list[dict[str, Any]]:
    """The bad archive: the last overturned denials among the cases, their answers inverted, so that each says that the denial was right."""
    overturned = [case for case in cases if case["answer"] == "APPROVED"][-last:]
    return [{**case, "answer": INVERTED[case["answer"]]} for case in overturned]


def find_port() -> int:
    """A free port on loopback."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
