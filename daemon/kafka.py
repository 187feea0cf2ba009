"""What `[kafka]` in `ratchet.toml` says: the brokers, who we are to them, and the topics."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, model_validator

from consumers import broker, schemas, topics
from daemon.sections import HomePath, Section

SERVER = r"[\w.-]+:\d{1,5}|\[[0-9A-Fa-f:]+\]:\d{1,5}"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class SecretMissingError(ValueError):
    """The file that should hold the password can't be read."""


class Topics(Section):
    """The topics' names, and what `ratchet topics create` makes them like."""

    predictions: Name = Field(default="predictions", description="Predictions come in.")
    labels: Name = Field(default="expert-labels", description="Labels come in.")
    queue: Name = Field(default="expert-queue", description="Reviews that were opened, closed or expired go out.")
    events: Name = Field(default="model-events", description="Verdicts, promotions, rollbacks, runs and alarms go out.")
    dead_letters: Name = Field(default="dead-letters", description="The id and the reason of each dead letter go out.")
    partitions: int = Field(default=4, ge=1, description="Of each topic; so many consumers can share the work.")
    replicas: int = Field(default=1, ge=1, description="Copies of each record; 3 on a cluster.")
    min_in_sync: int = Field(default=1, ge=1, description="Copies that must be written before a record counts; 2 of 3 on a cluster.")
    retention_hours: int = Field(default=168, ge=1, description="How long a record is kept: longer than the longest outage of ours.")

    @model_validator(mode="after")
    def _are_told_apart(self) -> Self:
        names = self.names()
        if len(set(names)) < len(names):
            raise ValueError("two topics have one name: give each its own")
        if self.min_in_sync > self.replicas:
            raise ValueError(f"min_in_sync {self.min_in_sync} is more than replicas {self.replicas}: no record could be written")
        return self

    def names(self) -> tuple[str, ...]:
        """All of them."""
        return self.predictions, self.labels, self.queue, self.events, self.dead_letters

    def kinds(self) -> dict[str, str]:
        """Which type of event comes in by which topic."""
        return {self.predictions: schemas.PREDICTION, self.labels: schemas.LABEL}

    def outlets(self) -> topics.Outlets:
        """The topics that go out."""
        return topics.Outlets(self.queue, self.events, self.dead_letters)

    def describe(self) -> list[topics.Topic]:
        """Every topic as it should be."""
        return [topics.Topic(name, self.partitions, self.replicas, self.retention_hours, self.min_in_sync) for name in self.names()]


class Kafka(Section):
    """A stream of events beside HTTP. Without `bootstrap` there is none."""

    bootstrap: Annotated[str, Field(pattern=rf"^({SERVER})(\s*,\s*({SERVER}))*$")] | None = Field(
        default=None, description="`HOST:PORT` of a broker, or several with commas. Needs `ratchet-daemon[kafka]`."
    )
    group: Name = Field(default="ratchet", description="The consumer group: all daemons of one installation share it.")
    consumer: Literal["faust", "poll"] = Field(
        default="faust", description="`poll` handles 2.5 times as many events a second; see streaming.md."
    )
    tls: bool = Field(default=False, description="Whether the brokers speak TLS.")
    ca_file: HomePath | None = Field(default=None, description="The authority that signed their certificates, unless the system knows it.")
    certificate_file: HomePath | None = Field(default=None, description="Our own certificate, where the brokers ask for one.")
    key_file: HomePath | None = Field(default=None, description="The key of our certificate.")
    mechanism: broker.Mechanism | None = Field(
        default=None, description="`SCRAM-SHA-512`, `SCRAM-SHA-256` or `PLAIN`, where the brokers ask for a user."
    )
    user: str | None = Field(default=None, min_length=1, description="The user's name.")
    password: SecretStr | None = Field(
        default=None, description="Better not in the file: set `RATCHET_KAFKA__PASSWORD`, or `password_file`."
    )
    password_file: HomePath | None = Field(default=None, description="A file that holds the password and nothing else.")
    topics: Topics = Topics()

    @model_validator(mode="after")
    def _knows_who_we_are(self) -> Self:
        if self.mechanism is not None and (self.user is None or (self.password is None) == (self.password_file is None)):
            raise ValueError("`mechanism` needs `user`, and either `password` or `password_file`")
        if self.mechanism is None and self.user is not None:
            raise ValueError("`user` needs `mechanism`: SCRAM-SHA-512, SCRAM-SHA-256 or PLAIN")
        if self.mechanism == "PLAIN" and not self.tls:
            raise ValueError("PLAIN sends the password as it is: set `tls = true`, or use SCRAM-SHA-512")
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("`certificate_file` and `key_file` belong together")
        if self.certificate_file is not None and not self.tls:
            raise ValueError("`certificate_file` needs `tls = true`")
        return self

    def to_access(self) -> broker.Access:
        """What a client needs. Raises `SecretMissingError`; `bootstrap` must be set."""
        return broker.Access(
            bootstrap=(self.bootstrap or "").replace(" ", ""),
            tls=self.tls,
            ca_file=self.ca_file,
            certificate_file=self.certificate_file,
            key_file=self.key_file,
            mechanism=self.mechanism,
            user=self.user,
            password=self._read_password(),
        )

    def _read_password(self) -> str | None:
        if self.password_file is None:
            return self.password.get_secret_value() if self.password is not None else None
        try:
            return self.password_file.read_text(encoding="utf-8").strip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            problem = f"kafka.password_file {self.password_file} can't be read ({error})"
            raise SecretMissingError(f"{problem}: write the password there") from error
