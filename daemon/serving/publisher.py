"""What a publisher is: it tells an inference server which version to serve, and asks it which one it serves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from daemon import agents
from storage import artifacts, registry

State = Literal["confirmed", "unverified", "different", "unreachable", "untold"]
ASK_SECONDS = 10.0


class PublishFailedError(RuntimeError):
    """The server could not be told; the message is for the deployment's detail and holds nothing of a claim."""


@dataclass(frozen=True, slots=True)
class Target:
    """A version as a server needs to know it. Without an adapter it is the bare base; `in_4bit` is how the server is to hold that."""

    agent: str
    version: str
    serving_name: str
    adapter: Path | None
    adapter_digest: str | None
    base: Path
    base_digest: str
    in_4bit: bool
    prompt: str
    prompt_form: str
    prompt_digest: str
    labels: tuple[str, ...]
    temperature: float

    @property
    def digest(self) -> str:
        """The digest by which a server confirms: the adapter's, or the base's where there is none."""
        return self.adapter_digest or self.base_digest


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server says: `different` also when it serves nothing, `unverified` where there is no way to ask.

    `untold` is no answer of a server: it could not be told what to serve.
    """

    state: State
    detail: str


class Publisher(Protocol):
    """How one agent's versions reach its server. Both calls end within the agent's timeouts."""

    def publish(self, target: Target) -> None:
        """Tell the server to serve `target`; doing so twice is harmless. Raises `PublishFailedError`."""

    def ask(self, target: Target) -> Answer:
        """Whether the server serves `target` now."""


class Nobody:
    """The publisher of an agent whose versions are taken from the registry by other means."""

    def publish(self, target: Target) -> None:
        """There is nobody to tell."""

    def ask(self, target: Target) -> Answer:
        """There is nobody to ask."""
        return Answer("unverified", f"{target.agent} has no publisher")


def choose(agent: agents.Agent) -> Publisher:
    """The publisher that the agent's configuration names."""
    from daemon.serving import pointer, reference  # noqa: PLC0415 — they know this module's values

    kinds: Mapping[str, Any] = {"pointer": pointer.Pointer, "reference": reference.Reference}
    settings = agent.publisher
    return kinds[settings.kind](settings) if settings.kind in kinds else Nobody()


def to_target(row: Mapping[str, Any], *, in_4bit: bool) -> Target:
    """The target that a row of the registry describes, on a base that is held so."""
    return Target(
        agent=row["agent"],
        version=row["name"],
        serving_name=registry.serving_name(row),
        adapter=Path(row["adapter_path"]) if row["adapter_path"] else None,
        adapter_digest=row["adapter_digest"],
        base=Path(row["base_path"]),
        base_digest=row["base_digest"],
        in_4bit=in_4bit,
        prompt=row["prompt"],
        prompt_form=row["prompt_form"],
        prompt_digest=row["prompt_digest"],
        labels=tuple(row["labels"]),
        temperature=row["temperature"],
    )


def check_files(target: Target) -> None:
    """Raise `PublishFailedError` unless the adapter's files are the ones that were registered.

    The base is not read again: it may have gigabytes, and the server reports its digest.
    """
    if target.adapter is None or target.adapter_digest is None:
        return
    remedy = f'restore it from a backup, or go to another version: `ratchet rollback --agent {target.agent} --to V --reason "…"`'
    try:
        artifacts.check(target.adapter, target.adapter_digest)
    except artifacts.DigestMismatchError as error:
        raise PublishFailedError(f"{target.adapter} is not the registered adapter of {target.version}: {remedy}") from error
    except OSError as error:
        raise PublishFailedError(f"the adapter of {target.version} can't be read ({error}): {remedy}") from error


def compare(target: Target, report: Mapping[str, Any]) -> Answer:
    """Judge a server's report: the digest must be there, and whatever else it says of base and prompt must agree."""
    served = report.get("adapter_digest") or report.get("digest") or report.get("base_digest")
    if served is None:
        return Answer("different", "the server names no digest: its JSON needs `adapter_digest` or `digest`")
    expected = {"base_digest": target.base_digest, "prompt_digest": target.prompt_digest}
    differing = [name for name, digest in expected.items() if name in report and not _is_same(report[name], digest)]
    if not _is_same(served, target.digest):
        return Answer("different", f"the server reports {_shorten(served)}, expected is {target.digest}")
    if report.get("in_4bit", target.in_4bit) != target.in_4bit:
        differing.append("in_4bit")
    if differing:
        return Answer("different", f"the server has the digest of {target.version} but another {', '.join(differing)}")
    return Answer("confirmed", f"the server reports {target.digest}")


def _is_same(reported: Any, digest: str) -> bool:
    return isinstance(reported, str) and reported.strip().removeprefix("sha256:") == digest.removeprefix("sha256:")


def _shorten(value: Any) -> str:
    return str(value).strip()[:80]
