"""`ratchet status`: how things stand, on one screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from daemon.cli import context


def status(config: context.ConfigFile = context.CONFIG_FILE, as_json: context.AsJson = False) -> None:
    """Show agents, champions, queues, labels until the next run, running training and alarms."""
    from daemon import status as overview  # noqa: PLC0415 — `ratchet --help` needs none of it

    with context.opened(config) as opened:
        told = overview.collect(opened.engine, opened.settings.agents, context.read_clock())
        has_kafka = opened.settings.kafka.bootstrap is not None
    if as_json:
        context.print_json(told)
        return
    from rich import console, text  # noqa: PLC0415 — rich is slow to import

    screen = console.Console(highlight=False)
    for line, style in _compose(told, has_kafka=has_kafka):
        screen.print(text.Text(line, style))


def _compose(told: Mapping[str, Any], *, has_kafka: bool = False) -> Iterator[tuple[str, str]]:
    """The screen's lines, each with its style; `has_kafka` says whether somebody should read it."""
    events = told["events"]
    age = f", oldest {events['oldest_seconds']:.0f} s" if events["oldest_seconds"] is not None else ""
    yield f"{told['at']:%Y-%m-%d %H:%M:%S} UTC", "dim"
    yield f"Events       {events['received']} unhandled{age}; {events['waiting']} wait for their claim", ""
    if told["stream"]:
        yield from _compose_stream(told["stream"])
    elif has_kafka:
        told_by = "by this machine's clock: `ratchet up` with the role consume reads it"
        yield f"Kafka        no daemon has told of it for a minute, {told_by}", "red"
    if told["dead_letters"]:
        yield f"Dead letters {told['dead_letters']}: `ratchet dead-letters list` shows them", "red"
    yield from _compose_alarms(told["alarms"], "")
    for name, agent in told["agents"].items():
        yield "", ""
        yield name, "bold"
        yield from _compose_agent(agent)


def _compose_stream(stream: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    age = f", oldest {stream['oldest_seconds']:.0f} s" if stream["oldest_seconds"] is not None else ""
    yield f"Kafka        {sum(stream['lag'].values())} to read{age}; {stream['backlog']} to send", ""
    if stream["problem"]:
        yield f"             {stream['problem']}", "red"
    for place, lag in sorted(stream["lag"].items()):
        if lag:
            yield f"  {place}: {lag}", ""
    for name, daemon in sorted(stream["daemons"].items()):
        relays = ", relays" if daemon["is_relaying"] else ""
        last = f"last batch {daemon['last_records']} in {daemon['last_seconds']:.3f} s"
        yield f"  {name}: {daemon['consumer']}, {daemon['records']} read in {daemon['batches']} batches, {last}{relays}", ""


def _compose_alarms(alarms: Iterable[Mapping[str, Any]], indent: str) -> Iterator[tuple[str, str]]:
    for alarm in alarms:
        yield f"{indent}ALARM {alarm['kind']}: {alarm['message']} (since {alarm['raised_at']:%Y-%m-%d %H:%M})", "red"


def _compose_agent(agent: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    champion, reviews, labels = agent["champion"], agent["reviews"], agent["labels"]
    yield from _compose_alarms(agent["alarms"], "  ")
    if agent["confidences"] != "ok":
        yield f"  The model's confidences are {agent['confidences']}: they can't tell which cases are unsure. Audits carry on.", "yellow"
    if champion:
        forced = ", forced" if champion["is_forced"] else ""
        yield f"  Champion     {champion['version']}{forced}, {champion['deployment']} since {champion['since']:%Y-%m-%d %H:%M}", ""
    else:
        yield "  Champion     none yet", ""
    yield f"  Predictions  {agent['predictions_last_day']} in the last day", ""
    conflicts = f", {agent['conflicts']} in conflict" if agent["conflicts"] else ""
    yield f"  Reviews      {reviews['open']} open, {reviews['leased']} with an expert{conflicts}", ""
    yield f"  New labels   {labels['fresh']}, {labels['until_run']} until the next run", ""
    for exam in agent["exams"]:
        score = f": {exam['wins'] or 0} won, {exam['losses'] or 0} lost of {exam['asked']} asked" if exam["asked"] is not None else ""
        yield f"  {exam['kind'].capitalize():<12} {exam['candidate']} against {exam['champion']}{score}", ""
    if agent["run"]:
        yield _compose_run(agent["run"])


def _compose_run(run: Mapping[str, Any]) -> tuple[str, str]:
    share = f" {run['share']:.0%}" if run["share"] is not None else ""
    left = f", {run['eta_seconds']:.0f} s left" if run["eta_seconds"] is not None else ""
    name = "Training" if run["kind"] == "train" else "Scoring"
    error = f": {run['error'].splitlines()[-1]}" if run["error"] else ""
    return f"  {name:<12} {run['state']}{share}{left} ({run['reason']}){error}", "red" if run["state"] in {"failed", "parked"} else "cyan"
