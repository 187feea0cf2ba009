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


def make_method(options: spec.Options, kind: str, model_config: Mapping[str, Any]) -> plan.Method:
    """A run's options as the plan sees them. Raises `plan.ShapeUnknownError`."""
    shared: dict[str, Any] = {
        "rank": options.lora.rank,
        "row_tokens": min(options.max_row_tokens, plan.read_shape(model_config).context),
        "max_tokens": options.max_tokens,
        "is_4bit": options.load_in_4bit,
    }
    if kind == "score":
        return plan.Method(name="score", trains="nothing", **shared)
    return plan.Method(
        name=options.method,
        trains="all" if options.trains_all_weights else "adapter",
        supervised=1.0 if options.method == "pretrain" else plan.SUPERVISED,
        is_bf16=options.lora.dtype == "bfloat16",
        checkpoint_every=options.recompute_layers,
        optimizer=options.optimizer,
        **shared,
    )


def choose_options(options: spec.Options, settings: plan.Settings) -> dict[str, Any]:
    """What the plan chose, as options of the run."""
    chosen: dict[str, Any] = {
        "max_tokens": settings.max_tokens,
        "recompute_layers": settings.checkpoint_every,
        "optimizer": settings.optimizer,
    }
    if settings.adapter_dtype is not None:
        chosen["lora"] = options.lora.model_copy(update={"dtype": settings.adapter_dtype})
    if settings.optimizer_in_backward:
        chosen |= {"optimizer_in_backward": True, "accumulation": 1, "clip": 0.0}
    return chosen


def plan_run(options: spec.Options, kind: str, base: Path, cards: Sequence[plan.Card]) -> list[plan.MemoryPlan]:
    """The plan for each card. Raises `plan.ShapeUnknownError` and `ConfigUnreadableError`."""
    model_config = read_model_config(base)
    return [plan.plan_memory(model_config, make_method(options, kind, model_config), card) for card in cards]


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
