"""`ratchet plan`: what a training takes of a card, before it is asked for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from daemon import cards, estimates
    from daemon import plan as planning
    from daemon.settings import Settings

MOMENTS = {"adamw": "in 32 bits", "adamw_8bit": "in 8 bits", "paged_adamw_8bit": "in 8 bits, on the host"}
GIB = 1 << 30
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)", re.IGNORECASE)


def plan(
    agent: context.AgentName = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="A checkpoint folder; its config.json is enough. Default: the agent's.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="SIZE", help="A card's memory, such as 12GB; by default this machine's and the usual sizes."),
    ] = None,
    method: Annotated[str | None, typer.Option("--method", help="As for `ratchet train`; the agent's own by default.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A training option, as for `ratchet train`; may be repeated.")
    ] = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Print what a training takes of a card, the settings that make it fit, and what would help where none do; exit 1 if it fits none."""
    from daemon import estimates, training  # noqa: PLC0415 — `ratchet --help` needs none of it

    overrides = context.read_overrides(settings, method)
    with context.opened(config) as opened:
        chosen = opened.pick_agent(agent)
        asked = [parse_card(gpu)] if gpu else list_cards(opened.settings)
        read = training.apply_overrides if training.SERVED in overrides else training.read_options
        options, _ = read(chosen, overrides)
        with opened.reading() as connection:
            graded = estimates.read_supervised(connection, chosen.name)
            plans = estimates.plan_run(options, "train", base or chosen.base_model, asked, graded)
            told = [
                (one, estimates.find_measured(connection, one), estimates.expect_time(connection, chosen.name, options.method, one))
                for one in plans
            ]
    if as_json:
        context.print_json([{**one.to_json(), "measured": measured, "expected": time._asdict()} for one, measured, time in told])
    elif gpu:
        context.print_item(describe(*told[0]), as_json=False)
    else:
        context.print_rows([describe(*one) for one in told], as_json=False)
    if not any(one.fits for one in plans):
        raise typer.Exit(1)


def list_cards(settings: Settings) -> list[cards.Card]:
    """The cards of this machine, and the usual sizes."""
    from daemon import cards, devices, nvml  # noqa: PLC0415 — `ratchet --help` needs none of it

    found = devices.find(settings.devices, nvml.make_reader(settings.storage.runs))
    there = {one.card.name: one.card for one in found if one.card}
    return [*there.values(), *(make_card(size * cards.GB) for size in cards.SIZES)]


def make_card(memory: int) -> cards.Card:
    """A card of which only the size is known."""
    from daemon import cards  # noqa: PLC0415 — `ratchet --help` needs none of it

    return cards.Card(cards.name_size(memory), "cuda", memory)


def parse_card(size: str) -> cards.Card:
    """A card of so much memory; a GB is 10^9 bytes here, so that a card never has less than its name says."""
    from daemon import cards  # noqa: PLC0415 — `ratchet --help` needs none of it

    found = SIZE.fullmatch(size.strip())
    if found is None or not float(found[1]):
        raise typer.BadParameter(f"{size!r} is no size of a card: write it as 12GB, or as 12GiB", param_hint="--gpu")
    return make_card(round(float(found[1]) * (GIB if found[2].lower() == "gib" else cards.GB)))


def describe(planned: planning.MemoryPlan, measured: int | None, expected: estimates.Duration) -> dict[str, Any]:
    """A plan as a person reads it, sizes in GB, beside what the last run by such a plan took."""
    settings = planned.settings
    return {
        "card": planned.card.name,
        "fits": "yes" if planned.fits else "no",
        **{name: name_size(size) for name, size in dataclasses.asdict(planned.parts).items()},
        "total": name_size(planned.parts.total),
        "measured": "no such run yet" if measured is None else name_size(measured),
        "4 bits": "yes" if settings.is_4bit else "no",
        "checkpointing": name_checkpointing(settings.checkpoint_every),
        "tokens": settings.max_tokens,
        "adapter": settings.adapter_dtype,
        "moments": MOMENTS[settings.optimizer]
        + (", in the backward pass (accumulation 1, clip 0)" if settings.optimizer_in_backward else ""),
        "rounding": settings.rounding,
        "time": name_time(expected),
        "would fit": "; ".join(planned.remedies) or None,
    }


def name_size(size: int) -> str:
    """Bytes as GB."""
    return f"{size / 10**9:.2f} GB"


def name_checkpointing(every: int) -> str:
    """Which layers' activations are computed twice."""
    return {0: "none", 1: "all layers"}.get(every, f"1 layer in {every}")


def name_time(expected: estimates.Duration) -> str:
    """What is known of the time."""
    if expected.tokens_per_second is None:
        return "no such run on such a card yet"
    pace = f"{expected.tokens_per_second:,.0f} tokens/s by {expected.runs} runs on {', '.join(expected.cards)}"
    return pace if expected.seconds is None else f"{expected.seconds / 60:,.1f} min as large as the last ({pace})"
