"""What a training of an agent is expected to take: `daemon.plan` asked with its base and options, and the pace of earlier runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from daemon import plan
from storage import runs
from trainers import spec


class ConfigUnreadableError(ValueError):
    """There is no `config.json` that could be read."""


class Duration(NamedTuple):
    """How fast a run is expected to be, and how long one as large as the agent's last takes; None where nothing was recorded yet."""

    runs: int
    tokens_per_second: float | None
    seconds: float | None


def read_model_config(base: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint folder. Raises `ConfigUnreadableError`."""
    try:
        found = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigUnreadableError(
            f"{base / 'config.json'} can't be read ({error}): name the folder of a Hugging Face checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise ConfigUnreadableError(f"{base / 'config.json'} holds no object: name the folder of a Hugging Face checkpoint")
    return found


def make_method(options: spec.Options, name: Any, model_config: Mapping[str, Any]) -> plan.Method:
    """A run's options as the plan sees them. Raises `plan.ShapeUnknownError`."""
    longest = min(options.max_row_tokens, plan.read_shape(model_config).context)
    return plan.Method(name, options.lora.rank, longest, options.max_tokens, 1.0 if name == "pretrain" else plan.SUPERVISED)


def plan_run(options: spec.Options, method: str, base: Path, cards: Sequence[plan.Card]) -> list[plan.MemoryPlan]:
    """The plan for each card. Raises `plan.ShapeUnknownError` and `ConfigUnreadableError`."""
    model_config = read_model_config(base)
    return [plan.plan_memory(model_config, make_method(options, method, model_config), card) for card in cards]


def expect_time(connection: Connection, agent: str, planned: plan.MemoryPlan) -> Duration:
    """How long a training takes on a card, told by the runs that were recorded on it; one of another base counts by its weights."""
    paces = []
    for run in runs.read_in_state(connection, "done"):
        told = (run["result"] or {}).get("memory")
        if run["kind"] == "train" and told and told["plan"]["card"]["name"] == planned.card.name:
            paces.append(plan.Pace(run["result"]["training"]["tokens_per_second"], told["plan"]["parameters"]))
    rate = plan.expect_rate(planned.parameters, paces)
    last = runs.read_last(connection, agent, "train")
    tokens = ((last["result"] or {}).get("training") or {}).get("tokens") if last else None
    return Duration(len(paces), rate, tokens / rate if rate and tokens else None)
