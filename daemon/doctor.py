"""The doctor: looks at everything the daemon needs before it is needed, and names the remedy."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from sqlalchemy import RowMapping

from consumers import broker, topics
from daemon import devices, makeup, nvml
from daemon.agents import Agent
from daemon.kafka import Kafka, SecretMissingError
from daemon.settings import Settings
from storage import db, ledger, registry, schema, tokens

MIN_FREE_BYTES = 5 * 1024**3
CHECKPOINT_FILES = ("config.json", "tokenizer_config.json")
PATIENCE_SECONDS = 60
FIND_TRAINER = "import importlib.util as u, sys; sys.exit(any(u.find_spec(n) is None for n in ('torch', 'transformers', 'peft')))"
FIND_CUDA = "import torch; print(torch.cuda.device_count())"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at; `remedy` says what to do when it is not well."""

    name: str
    is_well: bool
    detail: str
    remedy: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at the database, the disk, the trainer's environment, the devices and every agent, one finding at a time."""
    yield from _examine_database(settings)
    if settings.kafka.bootstrap is not None:
        yield _examine_kafka(settings.kafka)
    yield _examine_disk(settings.home)
    yield _examine_trainer(settings)
    yield _examine_devices(settings)
    if not settings.agents:
        yield Finding("agents", is_well=False, detail="none is configured", remedy="add a table [agents.NAME] to ratchet.toml")
    for agent in settings.agents.values():
        yield _examine_base(agent)
        yield _examine_publisher(agent)


def _examine_database(settings: Settings) -> Iterator[Finding]:
    try:
        engine = db.open_engine(settings.database.url)
        schema.check(engine)
        with db.writing(engine) as connection:
            valid = tokens.count_valid(connection)
        with db.reading(engine) as connection:
            broken = ledger.verify(connection)
            champions = [(name, version) for name in settings.agents if (version := registry.champion(connection, name))]
            served = [registry.read(connection, *champion) for champion in champions]
    except Exception as error:  # noqa: BLE001  whatever the driver says is the finding
        remedy = "check [database] url; restore a lost or damaged one from a backup, run `ratchet db upgrade` for an older or a new one"
        yield Finding("database", is_well=False, detail=str(error).partition("\n")[0], remedy=remedy)
        return
    engine.dispose()
    yield Finding("database", is_well=True, detail="opens, can be written, has the current schema")
    yield Finding(
        "ledger",
        is_well=not broken,
        detail=broken[0] if broken else "the chain is whole",
        remedy="`ratchet ledger verify` lists every break; restore the database from a backup taken before it",
    )
    yield Finding(
        "tokens", is_well=valid > 0, detail=f"{valid} valid", remedy="run `ratchet tokens add NAME --role producer|reviewer|operator`"
    )
    yield from map(_examine_champion, served)


def _examine_champion(row: RowMapping) -> Finding:
    """Whether the version in service lies where the database says: that may have been restored elsewhere, or without its files."""
    folder = Path(row["adapter_path"] or row["base_path"])
    return Finding(
        f"{row['agent']}: champion",
        is_well=folder.is_dir(),
        detail=f"{row['name']} {'lies in' if folder.is_dir() else 'is not in'} {folder}",
        remedy="put the folder back there from a backup: versions and datasets are known by their full paths",
    )


def _examine_kafka(kafka: Kafka) -> Finding:
    try:
        findings = topics.check(kafka.to_access(), kafka.topics.describe())
    except (broker.BrokerError, SecretMissingError) as error:
        detail, _, remedy = str(error).rpartition(": ")
        return Finding("kafka", is_well=False, detail=detail, remedy=remedy)
    missing = [finding.name for finding in findings if finding.partitions is None]
    if missing:
        return Finding("kafka", is_well=False, detail=f"{', '.join(missing)} is missing", remedy="run `ratchet topics create`")
    differ = [f"{finding.name}: {', '.join(finding.differs)}" for finding in findings if finding.differs]
    told = "; ".join(differ) or "lets us in and has the topics as configured"
    return Finding("kafka", is_well=not differ, detail=told, remedy="change the topic on the broker, or [kafka.topics]")


def _examine_disk(home: Path) -> Finding:
    free = shutil.disk_usage(home).free
    return Finding(
        "disk",
        is_well=free >= MIN_FREE_BYTES,
        detail=f"{free / 1024**3:.1f} GB free under {home}",
        remedy=f"make room: below {MIN_FREE_BYTES // 1024**3} GB a training run may fill the disk",
    )


def _examine_trainer(settings: Settings) -> Finding:
    python = settings.training.python
    is_found = _call([python, "-c", FIND_TRAINER]) is not None
    detail = f"{python} {'finds' if is_found else 'does not find'} torch, transformers and peft"
    return Finding("trainer", is_well=is_found, detail=detail, remedy="install `ratchet-daemon[train]` there, or set [training] python")


def _examine_devices(settings: Settings) -> Finding:
    """Whether torch sees the cards that runs go to; on a cluster that is the cluster's affair."""
    names = [device.name for device in devices.find(settings.devices, nvml.make_reader(settings.storage.runs))]
    cards = [part for name in names for part in name.split("+") if part.startswith("cuda")]
    if settings.training.launcher == "ray" or not cards:
        return Finding("devices", is_well=True, detail=f"runs go to {', '.join(names)}")
    answer = _call([settings.training.python, "-c", FIND_CUDA])
    present = int(answer) if answer and answer.isdigit() else 0
    missing = [card for card in cards if int(card.partition(":")[2]) >= present]
    return Finding(
        "devices",
        is_well=not missing,
        detail=f"runs go to {', '.join(names)}, torch sees {present} CUDA cards" + (f" and not {', '.join(missing)}" if missing else ""),
        remedy="check nvidia-smi and the driver, or name other devices in [devices] slots",
    )


def _examine_base(agent: Agent) -> Finding:
    folder = agent.base_model
    missing = [name for name in CHECKPOINT_FILES if not (folder / name).is_file()]
    if not list(folder.glob("*.safetensors")):
        missing.append("*.safetensors")
    return Finding(
        f"{agent.name}: base model",
        is_well=not missing,
        detail=f"{folder} lacks {', '.join(missing)}" if missing else f"{folder} is a checkpoint",
        remedy=makeup.advise(folder),
    )


def _examine_publisher(agent: Agent) -> Finding:
    publisher = agent.publisher
    name = f"{agent.name}: publisher"
    if publisher.url is not None:
        try:
            httpx.get(publisher.url, timeout=5)
        except httpx.HTTPError as error:
            detail = f"{publisher.url} does not answer ({type(error).__name__})"
            return Finding(name, is_well=False, detail=detail, remedy="start the inference server, or correct `publisher.url`")
    for command in filter(None, (publisher.command, publisher.confirm_command)):
        program = shlex.split(command)[0]
        if shutil.which(program) is None:
            detail = f"{program} is not a program here"
            return Finding(name, is_well=False, detail=detail, remedy="install it, or correct the publisher's command")
    is_asked = publisher.kind == "reference" or publisher.confirm != "none"
    how = "confirmed by the server" if is_asked else "nobody confirms: its deployments stay *unverified*"
    return Finding(name, is_well=True, detail=f"{publisher.kind}, {how}")


def _call(command: list[str]) -> str | None:
    """What a command prints; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)  # noqa: S603  our own interpreter
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
