"""`ratchet topics`: the Kafka topics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from daemon.cli import context

if TYPE_CHECKING:
    from consumers.topics import Finding
    from daemon.kafka import Kafka

app = typer.Typer(help="Make and check the Kafka topics.", no_args_is_help=True)


class NoKafkaError(ValueError):
    """The command is about Kafka, and none is configured."""


@app.command()
def create(config: context.ConfigFile = context.CONFIG_FILE) -> None:
    """Make the topics that are missing, as the configuration says; those that are there stay as they are."""
    from consumers import topics  # noqa: PLC0415 — `ratchet --help` needs none of it

    kafka = _load(config)
    made = topics.create(kafka.to_access(), kafka.topics.describe())
    typer.echo(f"Made {', '.join(made)}." if made else "All topics were there.")


@app.command()
def check(config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Print how each topic is and how it differs from the configuration; exit 1 when one is missing or differs."""
    from consumers import topics  # noqa: PLC0415 — `ratchet --help` needs none of it

    kafka = _load(config)
    findings = topics.check(kafka.to_access(), kafka.topics.describe())
    context.print_rows([_describe(finding) for finding in findings], as_json=as_json)
    if not all(finding.is_well for finding in findings):
        raise typer.Exit(1)


def _load(config: Any) -> Kafka:
    kafka = context.load_settings(config).kafka
    if kafka.bootstrap is None:
        raise NoKafkaError("no Kafka is configured: set [kafka] bootstrap")
    return kafka


def _describe(finding: Finding) -> dict[str, Any]:
    said = "missing" if finding.partitions is None else "; ".join(finding.differs) or "as configured"
    shown = {name: getattr(finding, name) for name in ("partitions", "replicas", "retention_hours", "min_in_sync")}
    return {"topic": finding.name, **shown, "state": said}
