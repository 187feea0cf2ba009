"""`ratchet up`: the daemon."""

from __future__ import annotations

from typing import Annotated

import typer

from daemon.cli import context

ROLES = ("consume", "web", "schedule")


def up(
    config: context.ConfigFile = context.CONFIG_FILE,
    role: Annotated[list[str] | None, typer.Option(help="consume, web or schedule; may be repeated. All of them by default.")] = None,
) -> None:
    """Run the daemon until SIGTERM or SIGINT; it finishes what it began, lets a trainer write its checkpoint, and exits 0 within 30 s."""
    unknown = [name for name in role or () if name not in ROLES]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is no role: use {', '.join(ROLES)}", param_hint="--role")
    from daemon import logs, service  # noqa: PLC0415 — `ratchet --help` needs none of it

    settings = context.load_settings(config)
    logs.configure(settings.log.level, settings.log.format)
    raise typer.Exit(service.start(settings, role or ROLES))
