"""`ratchet doctor`: looks whether everything is there that the daemon needs."""

from __future__ import annotations

from dataclasses import asdict

import typer

from daemon.cli import context


def doctor(config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Check the configuration, database, disk, trainer, devices, base models and publishers; exit 1 when something is missing."""
    from daemon import doctor as examiner  # noqa: PLC0415 — `ratchet --help` needs none of it

    findings = []
    for finding in examiner.examine(context.load_settings(config)):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{'ok  ' if finding.is_well else 'FAIL'}  {finding.name}: {finding.detail}")
            if not finding.is_well:
                typer.echo(f"      → {finding.remedy}")
    if as_json:
        context.print_json([asdict(finding) for finding in findings])
    if not all(finding.is_well for finding in findings):
        raise typer.Exit(1)
