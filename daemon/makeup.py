"""What an agent's versions are made of today: its base, tokenizer, template and labels, by digest."""

from __future__ import annotations

import json
import shlex
from datetime import datetime
from pathlib import Path

import structlog
from sqlalchemy import RowMapping

from daemon.agents import Agent
from daemon.machinery import Machinery, Makeup
from storage import alarms, artifacts, db, registry
from trainers import spec

CHAT: spec.FormName = "chat"
CONFIG, WEIGHTS = "config.json", "*.safetensors"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
ALARM = "base"

log = structlog.get_logger()


def ensure_bare(machinery: Machinery, agent: Agent, now: datetime) -> None:
    """Keep the agent's makeup and register its bare base as v0; while there is no base, raise an alarm and start no run for the agent."""
    machinery.memory.makeups.pop(agent.name, None)
    made = read(machinery, agent)
    with db.writing(machinery.engine) as connection:
        if made is None:
            message = f"{agent.base_model} is no checkpoint: {advise(agent.base_model)}"
            if alarms.raise_alarm(connection, agent.name, ALARM, message, {}, now):
                log.warning("base_missing", agent=agent.name, path=str(agent.base_model))
            return
        alarms.clear(connection, agent.name, ALARM, now)
        registry.register_bare(connection, agent.name, describe(made), now)
    machinery.memory.makeups[agent.name] = made


def advise(folder: Path) -> str:
    """What to do while no base lies in the folder."""
    command = f"ratchet model tiny --texts FILE --out {shlex.quote(str(folder))}"
    return f'put a Hugging Face checkpoint with safetensors there, or make a small one: `{command}`, FILE of lines {{"text": PROMPT}}'


def read(machinery: Machinery, agent: Agent) -> Makeup | None:
    """The agent's makeup; the base's files are read again only when one of them changed."""
    digests = _read_digests(machinery, agent.base_model)
    return (
        Makeup(agent.base_model, *digests, spec.Prompt(text=agent.prompt.text, form=choose_form(agent)), agent.labels) if digests else None
    )


def _read_digests(machinery: Machinery, folder: Path) -> tuple[str, str] | None:
    """The digests of a base and of its tokenizer; None where there is no checkpoint."""
    if not is_checkpoint(folder):
        return None
    fingerprint = artifacts.take_fingerprint(artifacts.list_files(folder))
    known = machinery.memory.digests.get(folder)
    if known is None or known[0] != fingerprint:
        digests = artifacts.digest_folder(folder), digest_tokenizer(folder)
        known = machinery.memory.digests[folder] = (fingerprint, digests)
    return known[1]


def find_base(machinery: Machinery, agent: Agent, version: RowMapping) -> Path | None:
    """Where a version's base lies today: where it lay, or where the agent's base lies now; None when other files took its place."""
    for folder in (Path(version["base_path"]), agent.base_model):
        digests = _read_digests(machinery, folder)
        if digests is not None and digests[0] == version["base_digest"]:
            return folder
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint in safetensors lies in the folder."""
    return (folder / CONFIG).is_file() and any(folder.glob(WEIGHTS))


def choose_form(agent: Agent) -> spec.FormName:
    """The form of the agent's prompts: by default the base's own chat template where it has one."""
    return (CHAT if has_chat_template(agent.base_model) else "instruction") if agent.prompt_form == "auto" else agent.prompt_form


def has_chat_template(folder: Path) -> bool:
    """Whether a checkpoint's tokenizer brings a chat template, in a file of its own or in its configuration."""
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def describe(made: Makeup) -> registry.Made:
    """The bare base as the registry keeps it."""
    return registry.Made(
        base_path=str(made.base_path),
        base_digest=made.base_digest,
        adapter_path=None,
        adapter_digest=None,
        tokenizer_digest=made.tokenizer_digest,
        prompt=made.prompt.text,
        prompt_form=made.prompt.form,
        prompt_digest=made.prompt.digest,
        labels=list(made.labels),
        labels_digest=made.labels_digest,
    )


def digest_tokenizer(folder: Path) -> str:
    """The digest of a checkpoint's tokenizer files."""
    return artifacts.digest_files(folder, {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)})
