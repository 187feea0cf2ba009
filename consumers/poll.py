"""Reads Kafka with kafka-python's plain poll loop: several times as fast as Faust.

The loop is a process of its own (`consumers.fetcher`), for Python computes on one core: one polls and parses, one routes and stores.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import IO

import structlog

from consumers import broker, fetcher, records

BATCH = 1000
WAIT_SECONDS, END_SECONDS = 0.2, 17.0
"""How long is waited for records, and for the other process: to commit and to leave the group takes it 15 s where no broker answers."""
GONE = (EOFError, OSError)
"""What reading from it and writing to it raise when it has ended, between two messages or in the midst of one."""
PASSED_ON = ("PATH", "HOME", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH")
PASSED_ON_PREFIXES = ("PYTHON", "LC_", "SSL_CERT_", "COVERAGE_")
_ERRORS = {error.__name__: error for error in (broker.BrokerError, broker.BrokerAbsentError, broker.AccessRefusedError)}

log = structlog.get_logger()


class Batch:
    """Records on their way into the database, in a thread of its own, and the offsets behind them."""

    def __init__(self, polled: fetcher.Polled, inlet: records.Inlet) -> None:
        self.places = polled.places
        self._parts, self._inlet = polled.parts, inlet
        self._committing = threading.Event()
        self._error: BaseException | None = None

    def begin(self, before: Batch | None, stopping: threading.Event) -> None:
        """Store the records when the batch `before` is stored."""
        self._thread = threading.Thread(target=self._take, args=[before, stopping], name="take", daemon=True)
        self._thread.start()

    def _take(self, before: Batch | None, stopping: threading.Event) -> None:
        try:
            batch = self._inlet.receive(self._parts)
            if before is not None:
                before.finish()
            self._inlet.store_patiently(batch, stopping, self._committing.set)
        except BaseException as error:  # noqa: BLE001  it is raised where the batch is waited for
            self._error = error
        finally:
            self._committing.set()

    def wait_for_commit(self) -> None:
        """Wait until only the disk is waited for, or all is over."""
        self._committing.wait()

    def finish(self) -> None:
        """Wait for the transaction. Raises what `Inlet.store_patiently` raised, for this batch or one before it."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Fetcher:
    """The process that polls, as seen from here."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Connection, inlet: records.Inlet) -> None:
        self._process, self._channel, self._inlet = process, channel, inlet

    def begin(self, job: fetcher.Job) -> None:
        """Say what is to be read. Raises `BrokerError`."""
        with self._expecting():
            self._channel.send_bytes(fetcher.encode(job))

    def receive(self, seconds: float) -> fetcher.Polled | None:
        """The next batch, when one comes within so many seconds. Raises `BrokerError`."""
        deadline = time.monotonic() + seconds
        with self._expecting():
            while self._channel.poll(max(0.0, deadline - time.monotonic())):
                match fetcher.decode_told(self._channel.recv_bytes()):
                    case fetcher.Polled() as polled:
                        return polled
                    case fetcher.Failed(name, why):
                        raise _ERRORS[name](why)
                    case fetcher.Committed(None):
                        self._inlet.progress.acknowledged_at = time.monotonic()
                    case fetcher.Committed(error):
                        log.warning("offsets_not_committed", error=error)
        return None

    def commit(self, places: Sequence[fetcher.Place]) -> None:
        """Have offsets committed; `receive` hears what became of it. Raises `BrokerError`."""
        with self._expecting():
            self._channel.send_bytes(fetcher.encode(places))

    def end(self) -> None:
        """Let it commit what it was told to, leave the group and end."""
        deadline = time.monotonic() + END_SECONDS
        with self._channel, contextlib.suppress(*GONE):
            self._channel.send_bytes(b"")
            while self._channel.poll(max(0.0, deadline - time.monotonic())):
                self._channel.recv_bytes()
        self._reap(max(1.0, deadline - time.monotonic()))

    @contextlib.contextmanager
    def _expecting(self) -> Iterator[None]:
        try:
            yield
        except GONE as error:
            status = self._reap(END_SECONDS)
            raise broker.BrokerError(f"the process that polls ended with status {status}: another one is begun") from error

    def _reap(self, seconds: float) -> int:
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def run(access: broker.Access, group: str, inlet: records.Inlet, stopping: threading.Event) -> None:
    """Take batch after batch until `stopping`; an offset is committed after the transaction that stored or parked its record.

    Raises `BrokerError` when the broker refuses, and what `Inlet.store_patiently` raises: nothing of that batch was acknowledged.
    """
    with _fetching(fetcher.Job(access, group, dict(inlet.kinds), records.list_labels(inlet.agents), BATCH), inlet) as source:
        _read(source, inlet, stopping)


@contextlib.contextmanager
def _fetching(job: fetcher.Job, inlet: records.Inlet) -> Iterator[Fetcher]:
    """A process that polls, until the end of the context."""
    ours, theirs = multiprocessing.Pipe()
    with theirs:
        process = subprocess.Popen(  # noqa: S603  our own interpreter and module
            [sys.executable, "-P", "-m", "consumers.fetcher", str(theirs.fileno())],
            env={name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)},
            process_group=0,  # what a terminal sends is for the daemon
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
    telling = threading.Thread(target=_tell, args=[process.stderr], name="poll-log", daemon=True)
    telling.start()
    source = Fetcher(process, ours, inlet)
    try:
        source.begin(job)
        yield source
    finally:
        source.end()
        telling.join()


def _tell(lines: IO[bytes]) -> None:
    """Log here what is logged there; a line of another form is of a traceback."""
    levels = logging.getLevelNamesMapping()
    with lines:
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            level, *said = text.split("\t", 2)
            if level in levels and len(said) == 2:  # noqa: PLR2004  the name and the message
                logging.getLogger(said[0]).log(levels[level], "%s", said[1])
            else:
                logging.getLogger(fetcher.__name__).error("%s", text)


def _read(source: Fetcher, inlet: records.Inlet, stopping: threading.Event) -> None:
    """Receive the next batch while one is committed: then nothing but the disk is waited for, and nobody computes beside.

    When the partitions are divided anew what is underway comes again, to whoever has its partition then: it is stored once.
    """
    underway: Batch | None = None
    try:
        while underway is not None or not stopping.is_set():
            if underway is not None:
                underway.wait_for_commit()
            polled = None if stopping.is_set() else source.receive(WAIT_SECONDS if underway is None else 0)
            before, underway = underway, None if polled is None else Batch(polled, inlet)
            if underway is not None:
                underway.begin(before, stopping)
            if before is not None:
                before.finish()
                source.commit(before.places)
    finally:
        if underway is not None:
            underway.finish()
