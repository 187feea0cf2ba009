"""The pointer: a file that names the version in service, for a server that reads it at its start or watches it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
from typing import Any, BinaryIO

import structlog

from daemon import agents
from daemon.serving import exchange, publisher
from storage import artifacts

log = structlog.get_logger()


class Pointer:
    """Replaces the file atomically, runs a command if there is one, and asks a URL or another command."""

    def __init__(self, settings: agents.Publisher) -> None:
        self.settings = settings

    def publish(self, target: publisher.Target) -> None:
        """Write the file, then run the command. Raises `PublishFailedError`."""
        publisher.check_files(target)
        path = self.settings.path
        if path is None:
            raise publisher.PublishFailedError(f"agents.{target.agent}.publisher.path is missing: name the pointer file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_atomically(path, json.dumps(describe(target), indent=2, ensure_ascii=False).encode())
        except OSError as error:
            raise publisher.PublishFailedError(f"{path} can't be written: {error.strerror}") from error
        if self.settings.command is not None:
            status = run_command(self.settings.command, self.settings.timeout_seconds, None)
            log.info("publish_command_ended", agent=target.agent, serving_name=target.serving_name, exit_status=status)
            if status != 0:
                raise publisher.PublishFailedError(f"`{self.settings.command}` {_explain(status)}")

    def ask(self, target: publisher.Target) -> publisher.Answer:
        """The server's word, by `confirm`."""
        if self.settings.confirm == "url":
            return self._ask_url(target)
        if self.settings.confirm == "command":
            return self._ask_command(target)
        return publisher.Answer("unverified", "the pointer file is written; `confirm` names nobody to ask")

    def _ask_url(self, target: publisher.Target) -> publisher.Answer:
        try:
            reply = exchange.send_request("GET", str(self.settings.url), self._ask_seconds())
        except exchange.NoAnswerError as error:
            return publisher.Answer("unreachable", str(error))
        if reply.is_error:
            return publisher.Answer("unreachable", f"{self.settings.url} answers {reply.status}")
        return publisher.compare(target, _read_report(reply.content))

    def _ask_command(self, target: publisher.Target) -> publisher.Answer:
        command = str(self.settings.confirm_command)
        with tempfile.TemporaryFile() as output:
            status = run_command(command, self._ask_seconds(), output)
            output.seek(0)
            content = output.read(exchange.MAX_ANSWER)
        if status != 0:
            return publisher.Answer("unreachable", f"`{command}` {_explain(status)}")
        return publisher.compare(target, _read_report(content))

    def _ask_seconds(self) -> float:
        return min(publisher.ASK_SECONDS, self.settings.timeout_seconds)


def describe(target: publisher.Target) -> dict[str, Any]:
    """The content of the pointer file."""
    return {
        "agent": target.agent,
        "version": target.version,
        "serving_name": target.serving_name,
        "adapter_path": target.adapter and str(target.adapter),
        "adapter_digest": target.adapter_digest,
        "base_path": str(target.base),
        "base_digest": target.base_digest,
        "in_4bit": target.in_4bit,
        "digest": target.digest,
        "prompt": target.prompt,
        "prompt_form": target.prompt_form,
        "prompt_digest": target.prompt_digest,
        "labels": list(target.labels),
        "temperature": target.temperature,
    }


def run_command(command: str, seconds: float, output: BinaryIO | None) -> int | None:
    """Run a command without a shell; returns its exit status, None when it did not end in time, 127 when it can't be started.

    What it prints goes into `output` or nowhere: it may hold claims. A file and no pipe, which a grandchild could keep open.
    """
    sink = output or subprocess.DEVNULL
    try:
        child = subprocess.Popen(  # noqa: S603 — the operator's own command, from the configuration
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.DEVNULL, start_new_session=True
        )
    except (OSError, ValueError):
        return 127
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        return None


def _explain(status: int | None) -> str:
    if status is None:
        return "did not end in time"
    return "can't be started" if status == 127 else f"ended with status {status}"  # noqa: PLR2004 — as a shell says it


def _read_report(content: bytes) -> dict[str, Any]:
    """A server's report: a JSON object, or the digest as plain text."""
    try:
        report = exchange.read_json(content)
    except ValueError:
        report = content.decode(errors="replace").strip()
    if isinstance(report, dict):
        return report
    return {"digest": report} if isinstance(report, str) and report else {}
