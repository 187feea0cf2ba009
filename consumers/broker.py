"""The Kafka broker: where it is, how it lets us in, and what is wrong when it does not."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from kafka.admin import KafkaAdminClient

Mechanism = Literal["SCRAM-SHA-512", "SCRAM-SHA-256", "PLAIN"]
PACKAGES = ("kafka-python", "faust-streaming", "aiokafka")
PROBE_SECONDS = 5.0
SESSION_SECONDS, HEARTBEAT_SECONDS = 10.0, 2.0
"""After so long a silence the group gives a consumer's partitions to others; meanwhile it is heard so often."""
RECONNECT_MS = 1000
"""With kafka-python's own 30 s events would wait that long after the broker is back."""


class BrokerError(RuntimeError):
    """Kafka can't be used as it is now; the sentence says why and what to do."""


class BrokerAbsentError(BrokerError):
    """No broker answers: waiting may help."""


class AccessRefusedError(BrokerError):
    """A broker is there and does not let us in, or is not trusted: somebody has to correct the configuration."""


class ExtraMissingError(BrokerError):
    """The packages that speak to Kafka are not installed."""


@dataclass(frozen=True, slots=True)
class Access:
    """Where the brokers are (`HOST:PORT`, several with commas), and who we are to them; without a mechanism we are nobody."""

    bootstrap: str
    tls: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    mechanism: Mechanism | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    def servers(self) -> list[tuple[str, int]]:
        """Every host with its port."""
        parts = (one.strip().rpartition(":") for one in self.bootstrap.split(","))
        return [(host.strip("[]"), int(port)) for host, _, port in parts]

    def make_context(self) -> ssl.SSLContext | None:
        """What TLS needs to trust the broker and to say who we are; None without TLS. Raises `AccessRefusedError`."""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
            if self.certificate_file is not None:
                context.load_cert_chain(self.certificate_file, self.key_file)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(file) for file in (self.ca_file, self.certificate_file, self.key_file) if file)
            raise AccessRefusedError(f"the files for TLS can't be used ({error}): check {files}") from error
        return context

    def to_options(self) -> dict[str, Any]:
        """The same for every client of kafka-python. Raises `AccessRefusedError`."""
        options = {"bootstrap_servers": self.bootstrap.split(","), "reconnect_backoff_max_ms": RECONNECT_MS}
        protocol = f"{'SASL_' if self.mechanism else ''}{'SSL' if self.tls else 'PLAINTEXT'}"
        options |= {"security_protocol": protocol, "ssl_context": self.make_context()}
        if self.mechanism is None:
            return options
        return options | {
            "sasl_mechanism": self.mechanism,
            "sasl_plain_username": self.user,
            "sasl_plain_password": self.password,
        }


def check_extra() -> None:
    """Raise `ExtraMissingError` with the remedy unless what speaks to Kafka is installed."""
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise ExtraMissingError(f"[kafka] bootstrap is set and {', '.join(missing)} is not installed: install ratchet-daemon[kafka]")


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def connect(access: Access) -> KafkaAdminClient:
    """Ask a broker for its metadata; returns the client that asked, for its caller to close.

    kafka-python tells a wrong password, an untrusted certificate and an absent broker alike. So what comes before is looked at first: a
    connection, then TLS. Raises `BrokerAbsentError`, `AccessRefusedError`, `ExtraMissingError`.
    """
    check_extra()
    from kafka import errors  # noqa: PLC0415  the extra may be absent
    from kafka.admin import KafkaAdminClient  # noqa: PLC0415

    probe(access)
    client = KafkaAdminClient.__new__(KafkaAdminClient)
    options = {"bootstrap_timeout_ms": int(PROBE_SECONDS * 1000), "request_timeout_ms": int(PROBE_SECONDS * 2000), **access.to_options()}
    with _overhear() as said:
        try:
            client.__init__(**options)
        except errors.KafkaError as error:
            client._client.close()  # noqa: SLF001  a constructor that fails leaves its thread behind
            raise _explain(access, said) from error
    return client


def probe(access: Access) -> None:
    """Raise unless one of the brokers takes a connection, and with TLS shows a certificate that is trusted."""
    context = access.make_context()
    failures = [failure for host, port in access.servers() if (failure := _try(host, port, context)) is not None]
    if len(failures) == len(access.servers()):
        raise failures[-1]


def _try(host: str, port: int, context: ssl.SSLContext | None) -> BrokerError | None:
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as plain:
            if context is not None:
                with context.wrap_socket(plain, server_hostname=host):
                    pass
    except ssl.SSLCertVerificationError as error:
        why = f"the certificate of {host}:{port} is not trusted ({error.verify_message})"
        return AccessRefusedError(f"{why}: set [kafka] ca_file to the authority that signed it")
    except ssl.SSLError as error:
        why = f"{host}:{port} takes connections and does not speak TLS ({error.reason})"
        return AccessRefusedError(f"{why}: name the port of its TLS listener, or set tls = false")
    except OSError as error:
        return BrokerAbsentError(f"no broker answers at {host}:{port} ({error.strerror or error}): start it, or correct [kafka] bootstrap")
    return None


def _explain(access: Access, said: list[str]) -> BrokerError:
    """Why nothing came of a connection that could be made: a broker that hangs up does not know us, one that is silent is ill."""
    if not any("socket disconnected" in line or "Sasl" in line or "EOF" in line for line in said):
        return BrokerAbsentError(f"{access.bootstrap} takes connections and does not answer: look at the broker")
    if any("UnsupportedSaslMechanism" in line for line in said):
        return AccessRefusedError(f"{access.bootstrap} does not offer {access.mechanism}: correct [kafka] mechanism")
    if access.mechanism is None:
        return AccessRefusedError(f"{access.bootstrap} hangs up on us: it may want TLS or a user, see [kafka] tls and mechanism")
    why = f"{access.bootstrap} does not let {access.user} in by {access.mechanism}"
    return AccessRefusedError(f"{why}: check [kafka] user, the password and the mechanism")


@contextlib.contextmanager
def _overhear() -> Iterator[list[str]]:
    """What kafka-python says of its connections; each attempt is several lines, so they go nowhere else."""
    said: list[str] = []
    logger, ear = logging.getLogger("kafka.net"), _Ear(said)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())  # with no handler at all its lines would go to standard error
    logger.addHandler(ear)
    try:
        yield said
    finally:
        logger.removeHandler(ear)


class _Ear(logging.Handler):
    """Keeps messages instead of writing them."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._said = said

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self._said.append(record.getMessage())
