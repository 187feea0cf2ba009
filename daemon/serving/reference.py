"""The reference node (`trainers.serve`): told over HTTP, swaps the version without a restart, and says what it serves."""

from __future__ import annotations

import urllib.parse

import httpx

from daemon import agents
from daemon.serving import exchange, publisher


class Reference:
    """Posts the version to `/load` and asks `/served/AGENT`."""

    def __init__(self, settings: agents.Publisher) -> None:
        self.settings = settings
        self.url = str(settings.url).rstrip("/")

    def publish(self, target: publisher.Target) -> None:
        """Have the node load the version. Raises `PublishFailedError` with the node's own reason."""
        publisher.check_files(target)
        body = {
            "agent": target.agent,
            "version": target.version,
            "serving_name": target.serving_name,
            "base": str(target.base.absolute()),
            "base_digest": target.base_digest,
            "in_4bit": target.in_4bit,
            "adapter": target.adapter and str(target.adapter.absolute()),
            "adapter_digest": target.adapter_digest,
            "prompt": target.prompt,
            "prompt_form": target.prompt_form,
            "labels": list(target.labels),
            "temperature": target.temperature,
        }
        try:
            reply = exchange.send_request("POST", f"{self.url}/load", self.settings.timeout_seconds, body)
        except exchange.NoAnswerError as error:
            raise publisher.PublishFailedError(str(error)) from error
        if reply.is_error:
            raise publisher.PublishFailedError(f"{self.url} refuses {target.serving_name}: {_read_error(reply)}")

    def ask(self, target: publisher.Target) -> publisher.Answer:
        """Whether the node serves the version on this base, held so, with this prompt, labels and temperature."""
        seconds = min(publisher.ASK_SECONDS, self.settings.timeout_seconds)
        try:
            reply = exchange.send_request("GET", f"{self.url}/served/{urllib.parse.quote(target.agent, safe='')}", seconds)
            report = exchange.read_json(reply.content)
        except exchange.NoAnswerError as error:
            return publisher.Answer("unreachable", str(error))
        except ValueError as error:
            return publisher.Answer("unreachable", f"{self.url} does not answer in JSON ({type(error).__name__})")
        if reply.status == httpx.codes.NOT_FOUND:
            return publisher.Answer("different", f"{self.url} serves nothing for {target.agent}")
        if reply.is_error or not isinstance(report, dict):
            return publisher.Answer("unreachable", f"{self.url} answers {reply.status}")
        expected = {"serving_name": target.serving_name, "labels": list(target.labels), "temperature": target.temperature}
        differing = [name for name, value in expected.items() if report.get(name) != value]
        answer = publisher.compare(target, {"base_digest": None, "prompt_digest": None, "in_4bit": None, **report})
        if answer.state == "confirmed" and differing:
            return publisher.Answer("different", f"the node has the digest of {target.version} but another {', '.join(differing)}")
        return answer


def _read_error(reply: exchange.Reply) -> str:
    """The node's sentence; it names folders and digests, never a claim."""
    try:
        return str(exchange.read_json(reply.content)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return f"status {reply.status}"
