"""The process that runs for months: roles in one event loop, one stop event, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gc
import ipaddress
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI
from sqlalchemy import Engine

from consumers import broker, embedded, records, rules, stream
from daemon import clocks, holders, pipeline, policies, scheduler
from daemon.launchers import choice
from daemon.settings import Settings
from daemon.web import app
from daemon.web.metrics import Metrics
from storage import db, schema, tokens

STOP_SECONDS = 28
REMEDIES = {
    errno.EADDRINUSE: "stop what listens there, or set another port",
    errno.EACCES: "set a port above 1023",
}
COLLECT_AFTER = 20_000

log = structlog.get_logger()


class UnsafeBindError(ValueError):
    """The daemon would answer to a network without knowing anybody."""


class AddressRefusedError(ValueError):
    """The daemon can't listen where it is told to."""


@dataclass
class Service:
    """What the roles of one process share."""

    settings: Settings
    engine: Engine
    agents: Mapping[str, rules.Agent]
    listeners: Mapping[str, socket.socket]
    roles: Sequence[str]
    clock: Callable[[], datetime]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    counters: embedded.Counters = field(default_factory=embedded.Counters)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """What this process has counted."""
        return Metrics(self.engine, self.settings.agents, self.clock, self.counters.by_state)


Role = Callable[[Service], Coroutine[Any, Any, None]]


def check_bind(settings: Settings, engine: Engine) -> None:
    """Raise `UnsafeBindError` when another address than loopback is to be served and no token is defined."""
    host = settings.server.host
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    if host == "localhost":
        return
    with db.reading(engine) as connection:
        if not tokens.count_valid(connection):
            raise UnsafeBindError(f"server.host is {host}, and no token is defined: run `ratchet tokens add NAME --role operator` first")


def listen(host: str, key: str, port: int) -> socket.socket:
    """A socket that takes connections at the port that `key` names. Raises `AddressRefusedError`."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno in REMEDIES:
            problem = f"can't be listened on ({os.strerror(error.errno)})"
            raise AddressRefusedError(f"server.{key} = {port} {problem}: {REMEDIES[error.errno]}") from error
        raise AddressRefusedError(f"server.host = {host!r}: {error}: set it to an address of this machine, such as 127.0.0.1") from error
    # asyncio does this only for sockets it made; without it each answer waits 40 ms for the client's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def start(settings: Settings, roles: Sequence[str]) -> int:
    """Run the daemon until it is told to stop; returns the exit status."""
    if settings.kafka.bootstrap is not None:
        broker.check_extra()
        if "consume" in roles:
            settings.kafka.to_access()  # a password that can't be read is said at once
    engine = db.open_engine(settings.database.url, settings.database.connections)
    try:
        schema.check(engine)
        check_bind(settings, engine)
        server = settings.server
        listeners = {"operate": listen(server.host, "ops_port", server.ops_port)}
        if "web" in roles:
            listeners["web"] = listen(server.host, "port", server.port)
        clock = clocks.choose(engine)
        with db.writing(engine) as connection:
            agents = policies.record(connection, settings.agents, clock())
        log.info("starting", roles=list(roles), pid=os.getpid(), agents=list(agents))
        calm_collector()
        return asyncio.run(_run(Service(settings, engine, agents, listeners, roles, clock)))
    finally:
        engine.dispose()


def calm_collector() -> None:
    """Let the garbage collector pass over what was imported, and look less often: a batch of events is thousands of objects, no garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER)


async def _run(service: Service) -> int:
    """Run the roles until a signal or until one of them ends.

    A role that dies stops the process: the service manager starts it again with a clean memory.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _begin_stop, service, number.name)
    works = {**{name: ROLES[name] for name in service.roles}, "operate": operate, "keep_alive": keep_alive, "keep_time": keep_time}
    if "consume" in service.roles and service.settings.kafka.bootstrap is not None:
        works["stream"] = follow_stream
    tasks = {asyncio.create_task(work(service), name=name) for name, work in works.items()}
    stopper = asyncio.create_task(service.stop.wait())
    await asyncio.wait({*tasks, stopper}, return_when=asyncio.FIRST_COMPLETED)
    stopper.cancel()
    was_asked = service.stop.is_set()
    service.stop.set()
    notify("STOPPING=1")
    ended, late = await asyncio.wait(tasks, timeout=STOP_SECONDS)
    for task in late:
        log.error("role_did_not_stop", role=task.get_name())
    died = [task for task in ended if task.exception() is not None]
    for task in died:
        log.error("role_died", role=task.get_name(), exc_info=task.exception())
    status = int(bool(died or late or not was_asked))
    log.info("stopped", exit_status=status)
    if late or asyncio.all_tasks() - {asyncio.current_task()}:
        # asyncio would wait for them and their threads, however long those take, such as the client of a broker that does not answer.
        # Nothing is lost: it is as if we had been killed.
        os._exit(status)
    return status


def _begin_stop(service: Service, name: str) -> None:
    log.info("stopping", signal=name)
    service.stop.set()


async def consume(service: Service) -> None:
    """Handle the events in the table."""
    await embedded.run(service.engine, service.agents, service.clock, service.stop, service.wake, service.counters)


async def follow_stream(service: Service) -> None:
    """Handle what comes by Kafka, beside what lies in the table, and send there what is to be told."""
    told = service.settings.kafka
    inlet = records.Inlet(service.engine, service.agents, told.topics.kinds(), service.clock, service.counters)
    lease = stream.Lease(holders.make_name(), holders.acquire)
    await stream.run(stream.Stream(told.to_access(), told.group, told.consumer, inlet, told.topics.outlets(), lease), service.stop)


async def web(service: Service) -> None:
    """Serve the API and the pages; where this process consumes too, events are handled in the transaction that stores them."""
    counters = service.counters if "consume" in service.roles else None
    site = app.create_app(service.engine, service.settings, service.agents, service.clock, service.wake.set, service.metrics, counters)
    await serve(site, service.listeners["web"], "web", service.stop)


async def schedule(service: Service) -> None:
    """Advance the loop, when this process leads."""
    await scheduler.run(
        pipeline.Pipeline(service.engine, service.settings, choice.make_launcher(service.settings)), service.clock, service.stop
    )


async def operate(service: Service) -> None:
    """Serve health and metrics on the ops port, whatever else this process does."""
    site = app.create_ops_app(service.engine, service.metrics)
    await serve(site, service.listeners["operate"], "operate", service.stop)


ROLES: Mapping[str, Role] = {"consume": consume, "web": web, "schedule": schedule}


async def serve(site: FastAPI, listening: socket.socket, name: str, stop: asyncio.Event) -> None:
    """Serve a site until `stop`; requests that were begun are finished."""
    config = uvicorn.Config(site, log_config=None, access_log=False, timeout_graceful_shutdown=10, server_header=False)
    server = uvicorn.Server(config)
    # Signals are the service's: uvicorn would take them from everything else in this process.
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    host, port = listening.getsockname()[:2]
    log.info("listening", role=name, url=f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    await serving


async def keep_alive(service: Service) -> None:
    """Tell systemd that we are up, and go on telling it while the event loop turns."""
    notify("READY=1")
    period = int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
    while not service.stop.is_set():
        notify("WATCHDOG=1")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(service.stop.wait(), period or 3600)


async def keep_time(service: Service) -> None:
    """Go on knowing what time the database has."""
    await clocks.keep(service.clock, service.stop)


def notify(state: str) -> None:
    """Send one state to the service manager, where there is one (sdnotify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, contextlib.suppress(OSError):
            manager.sendto(state.encode(), address.replace("@", "\0", 1) if address.startswith("@") else address)
