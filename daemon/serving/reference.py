"""The reference node (`trainers.serve`): told over HTTP, swaps the version without a restart, and says what it serves."""

from __future__ import annotations

import urllib.parse
from typing import Any

import httpx

from daemon import agents
from daemon.serving import publisher


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
            "adapter": target.adapter and str(target.adapter.absolute()),
            "adapter_digest": target.adapter_digest,
            "prompt": target.prompt,
            "labels": list(target.labels),
            "temperature": target.temperature,
        }
        try:
            response = self._request("POST", "/load", self.settings.timeout_seconds, body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise publisher.PublishFailedError(f"{self.url} does not answer ({type(error).__name__})") from error
        if response.is_error:
            raise publisher.PublishFailedError(f"{self.url} refuses {target.serving_name}: {_read_error(response)}")

    def ask(self, target: publisher.Target) -> publisher.Answer:
        """Whether the node serves the version on this base, with this prompt, labels and temperature."""
        seconds = min(publisher.ASK_SECONDS, self.settings.timeout_seconds)
        try:
            response = self._request("GET", f"/served/{urllib.parse.quote(target.agent, safe='')}", seconds)
            report: Any = response.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return publisher.Answer("unreachable", f"{self.url} does not answer ({type(error).__name__})")
        if response.status_code == httpx.codes.NOT_FOUND:
            return publisher.Answer("different", f"{self.url} serves nothing for {target.agent}")
        if response.is_error or not isinstance(report, dict):
            return publisher.Answer("unreachable", f"{self.url} answers {response.status_code}")
        expected = {"serving_name": target.serving_name, "labels": list(target.labels), "temperature": target.temperature}
        differing = [name for name, value in expected.items() if report.get(name) != value]
        answer = publisher.compare(target, {"base_digest": None, "prompt_digest": None, **report})
        if answer.state == "confirmed" and differing:
            return publisher.Answer("different", f"the node has the digest of {target.version} but another {', '.join(differing)}")
        return answer

    def _request(self, method: str, path: str, seconds: float, body: Any = None) -> httpx.Response:
        # No proxy of the environment: the node is ours.
        with httpx.Client(timeout=seconds, trust_env=False) as client:
            return client.request(method, self.url + path, json=body)


def _read_error(response: httpx.Response) -> str:
    """The node's sentence; it names folders and digests, never a claim."""
    try:
        return str(response.json()["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
