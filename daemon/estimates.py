"""What a training of an agent is expected to take: `daemon.plan` asked with its base and options, and the pace of earlier runs."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection

from daemon import cards, plan, shapes
from storage import runs
from trainers import spec


class ConfigUnreadableError(ValueError):
    """There is no `config.json` that could be read."""


class Duration(NamedTuple):
    """How fast a run is expected to be, and how long one as large as the agent's last takes; None where nothing was recorded yet.

    `cards` are those that the runs were on.
    """

    runs: int
    tokens_per_second: float | None
    seconds: float | None
    cards: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a run on a card was: tokens a second through a base of so many weights."""

    tokens_per_second: float
    parameters: int


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


def make_method(options: spec.Options, kind: str, model_config: Mapping[str, Any], supervised: float = plan.SUPERVISED) -> plan.Method:
    """A run's options as the plan sees them, and the share of its tokens that are graded. Raises `shapes.ShapeUnknownError`.

    A base that is stored in 4 bits is held so wherever it answers.
    """
    serves_4bit = options.serve_in_4bit or spec.is_stored_in_4bit(model_config)
    shared: dict[str, Any] = {
        "rank": options.lora.rank,
        "row_tokens": min(options.max_row_tokens, shapes.read_shape(model_config).context),
        "max_tokens": options.max_tokens,
        "serves_4bit": serves_4bit,
    }
    if kind == "score":
        return plan.Method(name="score", trains="nothing", is_4bit=serves_4bit, **shared)
    return plan.Method(
        name=options.method,
        trains="all" if options.trains_all_weights else "adapter",
        supervised=1.0 if options.method == "pretrain" else supervised,
        is_4bit=options.load_in_4bit,
        is_bf16=options.lora.dtype == "bfloat16",
        checkpoint_every=options.recompute_layers,
        optimizer=options.optimizer,
        in_backward=options.optimizer_in_backward,
        **shared,
    )


def choose_options(options: spec.Options, settings: plan.Settings) -> dict[str, Any]:
    """What the plan chose, as options of the run."""
    chosen: dict[str, Any] = {
        "max_tokens": settings.max_tokens,
        "recompute_layers": settings.checkpoint_every,
        "optimizer": settings.optimizer,
        "optimizer_in_backward": settings.optimizer_in_backward,
    }
    if settings.adapter_dtype is not None:
        chosen["lora"] = options.lora.model_copy(update={"dtype": settings.adapter_dtype})
    if settings.optimizer_in_backward:
        chosen |= {"accumulation": 1, "clip": 0.0}
    return chosen


def plan_run(
    options: spec.Options, kind: str, base: Path, cards: Sequence[cards.Card], supervised: float = plan.SUPERVISED
) -> list[plan.MemoryPlan]:
    """The plan for each card. Raises `shapes.ShapeUnknownError` and `ConfigUnreadableError`."""
    model_config = read_model_config(base)
    return [plan.plan_memory(model_config, make_method(options, kind, model_config, supervised), card) for card in cards]


def read_supervised(connection: Connection, agent: str) -> float:
    """The share of tokens that were graded in the agent's last training on labels; `plan.SUPERVISED` before there was one."""
    for told in reversed(_read_trainings(connection, agent)):
        if told.get("method") != "pretrain" and told.get("tokens") and told.get("supervised_tokens"):
            return min(1.0, float(told["supervised_tokens"] / told["tokens"]))
    return plan.SUPERVISED


def _read_trainings(connection: Connection, agent: str) -> list[Mapping[str, Any]]:
    """What the agent's finished trainings told, oldest first."""
    done = [run for run in runs.read_in_state(connection, "done") if run["agent"] == agent and run["kind"] == "train"]
    return [(run["result"] or {}).get("training") or {} for run in done]


def expect_time(connection: Connection, agent: str, method: str, planned: plan.MemoryPlan) -> Duration:
    """How long a training takes on a card, told by its method's runs there; one of another base counts by its weights."""
    paces: list[Pace] = []
    names: dict[str, bool] = {}
    for result in _read_results_on(connection, planned.card):
        told = result["memory"]["plan"]
        if result["training"].get("method") != method:
            continue
        paces.append(Pace(result["training"]["tokens_per_second"], told["parameters"]))
        names[told["card"]["name"]] = True
    rate = expect_rate(planned.parameters, paces)
    tokens = next((told["tokens"] for told in reversed(_read_trainings(connection, agent)) if told.get("tokens")), None)
    return Duration(len(paces), rate, tokens / rate if rate and tokens else None, tuple(names))


def expect_rate(parameters: int, paces: Sequence[Pace]) -> float | None:
    """Tokens a second, from runs on the same card; of a base of another size by its number of weights. None without a run."""
    return statistics.median(pace.tokens_per_second * pace.parameters for pace in paces) / parameters if paces else None


def find_measured(connection: Connection, planned: plan.MemoryPlan) -> int | None:
    """Bytes at the peak of the last training on such a card with these settings and as large a base; None before there was one."""
    peak = None
    for result in _read_results_on(connection, planned.card):
        told = result["memory"]["plan"]
        if (told["parameters"], told.get("settings")) == (planned.parameters, dataclasses.asdict(planned.settings)):
            peak = result["memory"].get("peak_bytes")
    return peak


def _read_results_on(connection: Connection, card: cards.Card) -> Iterator[Mapping[str, Any]]:
    """What the trainings that were planned for such a card told when they were done, oldest first."""
    for run in runs.read_in_state(connection, "done"):
        told = (((run["result"] or {}).get("memory") or {}).get("plan") or {}).get("card")
        if run["kind"] == "train" and told and cards.matches(card, cards.Card(**told)):
            yield run["result"]
