"""What the pipeline's stages work with, and what they keep in memory between ticks; all of that can be found out again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from daemon import devices, gate
from daemon.launch import Launcher
from daemon.settings import Settings
from storage import artifacts
from trainers import spec

Decide = Callable[[gate.ExamEvidence, gate.ExamPolicy], gate.Verdict]


@dataclass(frozen=True, slots=True)
class Makeup:
    """What an agent's next version is made of: its base, and how it is asked."""

    base_path: Path
    base_digest: str
    tokenizer_digest: str
    prompt: spec.Prompt
    labels: tuple[str, ...]

    @property
    def labels_digest(self) -> str:
        """The digest of the label set."""
        return spec.digest_labels(self.labels)


@dataclass(slots=True)
class Memory:
    """Costly answers, kept while what they were made from is the same."""

    digests: dict[Path, tuple[artifacts.Fingerprint, tuple[str, str]]] = field(default_factory=dict)
    rendered: dict[tuple[str, str, str], tuple[str, dict[str, bool]]] = field(default_factory=dict)
    references: dict[str, tuple[str, Any]] = field(default_factory=dict)
    windows: dict[str, str] = field(default_factory=dict)
    makeups: dict[str, Makeup] = field(default_factory=dict)
    is_well: dict[tuple[str, str], bool] = field(default_factory=dict)
    is_recorded: bool = False
    stuck: set[Path] = field(default_factory=set)
    """What could not be removed."""


@dataclass(frozen=True, slots=True)
class Machinery:
    """The database, the settings, what carries runs out, who decides and who knows the cards; the clock comes with each tick."""

    engine: Engine
    settings: Settings
    launcher: Launcher
    decide: Decide
    read_cards: devices.Read
    memory: Memory = field(default_factory=Memory)
