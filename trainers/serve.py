"""The reference inference node: one version per agent, swapped without a restart, on one base or several.

`python -m trainers.serve --base DIR` starts it.

It answers over HTTP with the standard library's server, on loopback unless told otherwise, and says by digest what it serves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import traceback
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import structlog
import torch
from pydantic import ValidationError

from storage import artifacts
from trainers import nodes, score
from trainers.spec import EXIT_REFUSED, Frozen, SpecRefusedError

MAX_BODY_BYTES = 32 * 2**20
IDLE_SECONDS = 60
STOP_SECONDS = 0.7

log = structlog.get_logger()
Body = TypeVar("Body", bound=Frozen)


class NodeServer(ThreadingHTTPServer):
    """HTTP in front of a node, a thread for each connection."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], node: nodes.Node) -> None:
        super().__init__(address, Handler)
        self.node = node

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002
        """A client that went away is its own affair."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            log.error("connection_failed", error=type(error).__name__)


class Handler(BaseHTTPRequestHandler):
    """Routes, and errors as JSON sentences."""

    server: NodeServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """`/healthz`, `/served` and `/served/AGENT`."""
        self.close_connection |= "Content-Length" in self.headers or "Transfer-Encoding" in self.headers  # a body that nobody reads
        self.respond(self.read_resource)

    def do_POST(self) -> None:
        """`/load` and `/score`."""
        self.respond(self.take_order)

    def read_resource(self) -> Any:
        """What a GET asks for."""
        node = self.server.node
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path == "/healthz":
            return {"status": "ok", "base_digest": node.own.digest, "agents": sorted(node.served)}
        if path == "/served":
            return {"served": [node.describe(served) for served in node.served.values()]}
        if path.startswith("/served/"):
            return node.describe(node.find(path.removeprefix("/served/")))
        raise nodes.RequestRefusedError(HTTPStatus.NOT_FOUND, "GET /healthz, /served or /served/AGENT; POST /load or /score")

    def take_order(self) -> Any:
        """What a POST asks for."""
        content = self.read_body()
        node = self.server.node
        path = urllib.parse.urlsplit(self.path).path
        if path == "/load":
            return node.load(parse(nodes.Load, content))
        if path == "/score":
            return node.answer(parse(nodes.Ask, content))
        raise nodes.RequestRefusedError(HTTPStatus.NOT_FOUND, "GET /healthz, /served or /served/AGENT; POST /load or /score")

    def read_body(self) -> bytes:
        """The request's body. A page in a browser can't send this content type without asking first, so it can't reach the node."""
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdigit()):
            self.close_connection = True
            raise nodes.RequestRefusedError(HTTPStatus.LENGTH_REQUIRED, "send the body with a Content-Length")
        if int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            raise nodes.RequestRefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {MAX_BODY_BYTES} bytes: send fewer claims at a time"
            )
        content = self.rfile.read(int(length))
        if self.headers.get_content_type() != "application/json":
            raise nodes.RequestRefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send JSON with Content-Type: application/json")
        return content

    def respond(self, act: Any) -> None:
        """Answer the request with what `act` returns, or with the sentence of its refusal."""
        try:
            status, answer = HTTPStatus.OK, act()
        except nodes.RequestRefusedError as error:
            status, answer = error.status, {"error": str(error)}
        except artifacts.DigestMismatchError as error:
            status, answer = HTTPStatus.CONFLICT, {"error": str(error)}
        except (SpecRefusedError, FileNotFoundError, NotADirectoryError, PermissionError, score.LogitsNotFiniteError) as error:
            status, answer = HTTPStatus.UNPROCESSABLE_ENTITY, {"error": str(error)}
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:  # noqa: BLE001 one bad request must not end the connection without an answer; a claim's text stays out of the log
            where = "".join(traceback.format_tb(error.__traceback__))
            log.error("request_failed", path=self.path, error=type(error).__name__, where=where)  # noqa: TRY400
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, {"error": f"the node failed ({type(error).__name__}); its log says where"}
        self.send(status, answer)

    def send(self, status: int, answer: Any) -> None:
        """One JSON answer."""
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses by itself, as JSON and always the client's fault: an unknown method or HTTP version too."""
        self.request_version = self.protocol_version  # else a garbled request line is answered as HTTP/0.9, without headers
        status = {501: HTTPStatus.METHOD_NOT_ALLOWED, 505: HTTPStatus.BAD_REQUEST}.get(code, HTTPStatus(code))
        self.close_connection = True
        self.send(status, {"error": message or explain or status.phrase})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Requests are not logged: they are many, and changes of state log themselves."""


def parse(kind: type[Body], content: bytes) -> Body:
    """The body as a checked value. Refused with the key, what is wrong with it and the value."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        status = HTTPStatus.BAD_REQUEST if first["type"] == "json_invalid" else HTTPStatus.UNPROCESSABLE_ENTITY
        where = ".".join(map(str, first["loc"])) or "the body"
        raise nodes.RequestRefusedError(status, f"{where}: {first['msg']} (got {first['input']!r:.80})") from error


def serve(server: NodeServer) -> None:
    """Answer requests until SIGTERM or SIGINT; a request that is being scored then is waited for, but not for long."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    listener = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    listener.start()
    host, port = server.server_address[:2]
    sys.stdout.write(f"listening on http://{host!s}:{port}\n")
    sys.stdout.flush()
    stop.wait()
    server.shutdown()
    server.server_close()
    server.node.lock.acquire(timeout=STOP_SECONDS)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m trainers.serve", description="Serve one base model and a version per agent over HTTP.")
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="checkpoint folder of the base model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback only)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: a free one)")
    parser.add_argument("--state", type=Path, metavar="FILE", help="remember here what is served, and serve it again after a restart")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--in-4bit", action="store_true", help="hold the base in 4 bits, unless a version asks for the whole one")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    return parser.parse_args(arguments)


def main() -> int:
    """Start the node; returns the exit code."""
    options = parse_arguments()
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    try:
        node = nodes.Node(options.base, options.device, options.state, in_4bit=options.in_4bit)
        node.restore()
        server = NodeServer((options.host, options.port), node)
    except (SpecRefusedError, OSError, OverflowError) as error:
        sys.stderr.write(f"can't serve: {error}\n")
        return EXIT_REFUSED
    serve(server)
    os._exit(0)  # all is said and closed; taking torch down in order would take seconds more


if __name__ == "__main__":
    sys.exit(main())
