"""`ratchet train`: a training run by hand."""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.cli import context


def train(
    reason: Annotated[str, typer.Option("--reason", "-r", callback=context.require_reason, help="Why; it is kept with the run.")],
    agent: context.AgentName = None,
    method: Annotated[
        str | None, typer.Option("--method", help="`lora`, `qlora`, `full` or `pretrain`; the agent's training.method by default.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A training option, `seed` or `warm_start`; may be repeated.")
    ] = None,
    config: context.ConfigFile = context.CONFIG_FILE,
    as_json: context.AsJson = False,
) -> None:
    """Queue a training run, which the daemon starts as soon as a device is free; `ratchet runs follow` watches it."""
    from daemon import training  # noqa: PLC0415 — `ratchet --help` needs none of it

    overrides = context.read_overrides(settings, method)
    with context.opened(config) as opened:
        chosen = opened.pick_agent(agent)
        with opened.writing() as connection:
            run = training.queue(connection, chosen, "manual", reason, context.read_actor(), overrides, context.read_clock())
    context.print_item({"run": run, "agent": chosen.name, "state": "queued"}, as_json=as_json)
