"""Registered versions whose adapters are real files, an agent whose server is two files and `cp`, and servers that misbehave."""

import contextlib
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import socket

from daemon import agents
from daemon.prompts import PromptFile
from storage import artifacts, registry
from trainers import spec

LABELS = ["APPROVED", "DENIED", "PENDING"]
PROMPT = "Claim {{ input.treatment }}\nDecision: "
BASE = "sha256:" + "b" * 64


def make_made(folder: Path, seed: int | None, **changes) -> registry.Made:
    """What a version is made of; its adapter is a folder with one file, None the bare base."""
    place = digest = None
    if seed is not None:
        source = folder / f"adapter-{seed}"
        source.mkdir(parents=True)
        (source / "adapter_model.safetensors").write_text(f"weights {seed}")
        place, digest = artifacts.publish(source, folder / "adapters")
    made = {
        "base_path": str(folder / "base"),
        "base_digest": BASE,
        "adapter_path": place and str(place),
        "adapter_digest": digest,
        "tokenizer_digest": "sha256:" + "7" * 64,
        "prompt": PROMPT,
        "prompt_form": "plain",
        "prompt_digest": spec.digest_text(PROMPT),
        "labels": LABELS,
        "labels_digest": spec.digest_labels(LABELS),
    }
    return registry.Made(**{**made, **changes})


def register(connection, folder: Path, count: int, now, agent: str = "adjudication") -> None:
    """v0 in service and v1.0, v1.1, … registered, each judged fit for promotion."""
    registry.register_bare(connection, agent, make_made(folder, None), now)
    for seed in range(count):
        name = registry.register(connection, agent, make_made(folder, seed, run=f"run-{seed}"), now)
        registry.give_verdict(connection, agent, name, "promote", ["It is better."], now)


def make_agent(folder: Path, **publisher) -> agents.Agent:
    """An agent with a pointer file in `folder`; keywords configure its publisher."""
    settings = {"kind": "pointer", "path": folder / "serving" / "current.json", "timeout_seconds": 60, **publisher}
    return agents.Agent(name="adjudication", labels=tuple(LABELS), prompt=PromptFile(text=PROMPT), publisher=agents.Publisher(**settings))


def copying(folder: Path) -> dict[str, str]:
    """A publisher's settings whose server loads at once: it serves what `cp` copied."""
    return {
        "command": f"cp {folder}/serving/current.json {folder}/served.json",
        "confirm": "command",
        "confirm_command": f"cat {folder}/served.json",
    }


@contextlib.contextmanager
def listening(serve_one: Callable[[socket, threading.Event], None]) -> Iterator[str]:
    """A server on loopback that reads each request and then leaves the connection to `serve_one`; yields its address."""
    is_over = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100_000)
            with contextlib.suppress(OSError):  # the client may hang up at any time
                serve_one(self.request, is_over)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        is_over.set()
        server.shutdown()


def drip(before: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Callable[[socket, threading.Event], None]:
    """Send a byte now and then, sooner than any read would give up, and never come to an end."""

    def serve_one(connection: socket, is_over: threading.Event) -> None:
        connection.sendall(before)
        while not is_over.wait(0.1):
            connection.sendall(b"H" if not before else b" ")

    return serve_one


def answer(body: bytes, status: int = 200) -> Callable[[socket, threading.Event], None]:
    """Answer every request with this body."""

    def serve_one(connection: socket, _: threading.Event) -> None:
        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(body)) + body)

    return serve_one
