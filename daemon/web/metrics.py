"""Prometheus: what came in, how requests went, and how things stand, without claim text or ids in a label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine

from daemon import status
from daemon.agents import Agent

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"

DAEMON_METRICS = (
    ("ratchet_kafka_batches", "batches", "Batches that a daemon has read."),
    ("ratchet_kafka_records", "records", "Records that a daemon has read."),
    ("ratchet_kafka_batch_seconds", "batch_seconds", "Time a daemon took to store and handle them."),
    ("ratchet_relay_messages", "sent", "Messages that a daemon has sent."),
)

log = structlog.get_logger()


class Metrics:
    """The metrics of one process; `handled` counts the events that its consumer has handled, by how they ended."""

    def __init__(
        self, engine: Engine, agents: Mapping[str, Agent], clock: Callable[[], datetime], handled: Mapping[str, int] | None = None
    ) -> None:
        self.registry, self.clock = CollectorRegistry(), clock
        self.events = Counter("ratchet_events", "Events that came in by HTTP.", ["type", "outcome"], registry=self.registry)
        self.requests = Counter("ratchet_http_requests", "Requests.", ["method", "route", "status"], registry=self.registry)
        self.request_seconds = Histogram("ratchet_http_request_seconds", "Time to answer.", ["route"], registry=self.registry)
        self.registry.register(_Standing(engine, agents, clock, handled if handled is not None else {}))
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)


class _Standing(Collector):
    """How things stand, read from the database when Prometheus asks."""

    def __init__(self, engine: Engine, agents: Mapping[str, Agent], clock: Callable[[], datetime], handled: Mapping[str, int]) -> None:
        self._engine, self._agents, self._clock, self._handled = engine, agents, clock, handled

    def describe(self) -> list[Metric]:
        """Nothing: registering must not ask the database."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics of this moment; of a database that does not answer, that it does not."""
        yield _family(CounterMetricFamily, "ratchet_events_handled", "Events by how handling ended.", "state", self._handled)
        try:
            told = status.collect(self._engine, self._agents, self._clock())
        except status.UNAVAILABLE:
            log.warning("database_unavailable", action="metrics")
            yield GaugeMetricFamily("ratchet_database_up", "Whether the database answers.", 0)
            return
        yield GaugeMetricFamily("ratchet_database_up", "Whether the database answers.", 1)
        yield from _describe_queues(told)
        yield from _describe_agents(told)
        if told["stream"]:
            yield from _describe_stream(told["stream"])


def _describe_queues(told: Mapping[str, Any]) -> Iterator[Metric]:
    events = told["events"]
    counts = {state: events[state] for state in ("received", "waiting", "unsent")}
    yield _family(GaugeMetricFamily, "ratchet_events_pending", "Events that need attention.", "state", counts)
    yield GaugeMetricFamily("ratchet_oldest_unhandled_seconds", "Age of the oldest unhandled event.", events["oldest_seconds"] or 0)
    yield GaugeMetricFamily("ratchet_dead_letters", "Dead letters that nobody has looked after.", told["dead_letters"])


def _describe_stream(stream: Mapping[str, Any]) -> Iterator[Metric]:
    lag = GaugeMetricFamily("ratchet_kafka_lag", "Records that wait.", labels=["topic", "partition"])
    for place, waiting in stream["lag"].items():
        lag.add_metric(place.rsplit("/", 1), waiting)
    yield lag
    yield GaugeMetricFamily("ratchet_kafka_up", "Whether all daemons can read and send.", not stream["problem"])
    yield GaugeMetricFamily("ratchet_kafka_oldest_seconds", "Age of the oldest record that waits.", stream["oldest_seconds"] or 0)
    yield GaugeMetricFamily("ratchet_relay_backlog", "Messages that wait to be sent.", stream["backlog"])
    told = {name: {daemon: one[key] for daemon, one in stream["daemons"].items()} for name, key, _ in DAEMON_METRICS}
    yield from (_family(CounterMetricFamily, name, text, "daemon", told[name]) for name, _, text in DAEMON_METRICS)


def _describe_agents(told: Mapping[str, Any]) -> Iterator[Metric]:
    reviews = GaugeMetricFamily("ratchet_reviews", "Cases that wait for an expert.", labels=["agent", "state"])
    champions = GaugeMetricFamily("ratchet_champion", "The version in service.", labels=["agent", "version"])
    labels = GaugeMetricFamily("ratchet_labels_fresh", "Labels that no dataset has.", labels=["agent"])
    alarms = GaugeMetricFamily("ratchet_alarm", "Open alarms.", labels=["agent", "kind"])
    training = GaugeMetricFamily("ratchet_training_progress", "How far the run has come, 0 to 1.", labels=["agent"])
    for alarm in told["alarms"]:
        alarms.add_metric(["", alarm["kind"]], 1)
    for name, agent in told["agents"].items():
        for state in ("open", "leased"):
            reviews.add_metric([name, state], agent["reviews"][state])
        if agent["champion"]:
            champions.add_metric([name, agent["champion"]["version"]], 1)
        labels.add_metric([name], agent["labels"]["fresh"])
        for alarm in agent["alarms"]:
            alarms.add_metric([name, alarm["kind"]], 1)
        if agent["run"] and agent["run"]["share"] is not None:
            training.add_metric([name], agent["run"]["share"])
    yield from (reviews, champions, labels, alarms, training)


def _family(kind: type[Any], name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    family: Any = kind(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family  # type: ignore[no-any-return]
