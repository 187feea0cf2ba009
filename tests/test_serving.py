"""daemon.serving: a server is told which version to serve, and believed only by the digest that it reports."""

import contextlib
import dataclasses
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from daemon import agents
from daemon.serving import publisher
from storage import artifacts, registry
from tests import version_fixtures
from tests.model_fixtures import LABELS, PROMPT, random_adapter, tiny_base
from tests.version_fixtures import copying, make_agent, make_made
from trainers import nodes, serve, spec


def make_target(folder: Path, seed: int | None = 1, **changes) -> publisher.Target:
    row = dataclasses.asdict(make_made(folder, seed, **changes))
    return publisher.to_target({**row, "agent": "adjudication", "name": "v1.0"}, in_4bit=False)


@pytest.fixture
def target(tmp_path):
    return make_target(tmp_path)


def answering(handle):
    """A server on loopback whose GET answers what `handle()` returns: status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = handle()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


@pytest.fixture
def reporting(tmp_path):
    """A pointer whose server answers with the current value of `report`."""
    state = {"status": 200, "body": b""}
    server = answering(lambda: (state["status"], state["body"]))
    yield publisher.choose(make_agent(tmp_path, confirm="url", url=f"http://127.0.0.1:{server.server_address[1]}")), state
    server.shutdown()
    server.server_close()


def test_the_pointer_file_names_the_version_and_all_that_it_needs(tmp_path, target):
    pointer = publisher.choose(make_agent(tmp_path))
    pointer.publish(target)
    content = json.loads((tmp_path / "serving" / "current.json").read_text())
    assert content["serving_name"] == registry.serving_name({"agent": "adjudication", "name": "v1.0", **vars_of(target)})
    assert Path(content["adapter_path"]).is_dir()
    names = {"agent", "version", "serving_name", "adapter_path", "adapter_digest", "base_path", "base_digest", "prompt", "labels"}
    assert names | {"in_4bit", "temperature", "prompt_form", "prompt_digest", "digest"} == content.keys()
    assert pointer.ask(target).state == "unverified"


def vars_of(target):
    return {"adapter_digest": target.adapter_digest, "base_digest": target.base_digest}


def test_the_pointer_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path, target):
    pointer = publisher.choose(make_agent(tmp_path))
    for _ in range(3):
        pointer.publish(target)
    assert [path.name for path in (tmp_path / "serving").iterdir()] == ["current.json"]


def test_a_damaged_adapter_is_never_published(tmp_path, target):
    (target.adapter / "adapter_model.safetensors").write_text("other weights")
    remedy = "not the registered adapter of v1.0: restore it from a backup, .*`ratchet rollback --agent adjudication --to V --reason"
    with pytest.raises(publisher.PublishFailedError, match=remedy):
        publisher.choose(make_agent(tmp_path)).publish(target)
    assert not (tmp_path / "serving").exists()


def test_a_missing_adapter_is_never_published(tmp_path, target):
    missing = dataclasses.replace(target, adapter=tmp_path / "gone")
    with pytest.raises(publisher.PublishFailedError, match=r"holds no files.*restore it from a backup"):
        publisher.choose(make_agent(tmp_path)).publish(missing)


def test_the_command_runs_without_a_shell_after_the_file_is_there(tmp_path, target):
    pointer = publisher.choose(make_agent(tmp_path, **copying(tmp_path)))
    assert pointer.ask(target).state == "unreachable"
    pointer.publish(target)
    assert pointer.ask(target).state == "confirmed"
    with pytest.raises(publisher.PublishFailedError, match="ended with status"):
        publisher.choose(make_agent(tmp_path, command=f"ls ; touch {tmp_path}/shell")).publish(target)
    assert not (tmp_path / "shell").exists()


@pytest.mark.parametrize(("command", "reason"), [("false", "ended with status 1"), ("/no/such", "can't be started"), ("'", "can't be")])
def test_a_command_that_fails_is_named_with_its_status(tmp_path, target, command, reason):
    with pytest.raises(publisher.PublishFailedError, match=reason):
        publisher.choose(make_agent(tmp_path, command=command)).publish(target)


def test_a_command_that_hangs_is_stopped_with_all_that_it_started(tmp_path, target):
    script = tmp_path / "hang.sh"
    script.write_text(f"(sleep 1.5; touch {tmp_path}/survived) & sleep 30")
    began = time.monotonic()
    with pytest.raises(publisher.PublishFailedError, match="did not end in time"):
        publisher.choose(make_agent(tmp_path, command=f"sh {script}", timeout_seconds=0.3)).publish(target)
    assert time.monotonic() - began < 1.2
    time.sleep(1.5)
    assert not (tmp_path / "survived").exists()


def test_what_a_command_prints_is_kept_nowhere(tmp_path, target, capfd):
    publisher.choose(make_agent(tmp_path, command=f"{sys.executable} -c 'print(\"a claim\")'")).publish(target)
    streams = capfd.readouterr()
    assert "a claim" not in streams.out + streams.err


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (lambda target: json.dumps({"adapter_digest": target.digest}), "confirmed"),
        (lambda target: json.dumps({"digest": target.digest, "base_digest": target.base_digest}), "confirmed"),
        (lambda target: target.digest + "\n", "confirmed"),
        (lambda target: target.digest.removeprefix("sha256:"), "confirmed"),
        (lambda target: json.dumps(target.digest), "confirmed"),
        (lambda target: json.dumps({"adapter_digest": target.digest, "base_digest": "sha256:0"}), "different"),
        (lambda target: json.dumps({"adapter_digest": target.digest, "prompt_digest": None}), "different"),
        (lambda target: json.dumps({"adapter_digest": None, "base_digest": target.base_digest}), "different"),
        (lambda target: json.dumps({"adapter_digest": 7}), "different"),
        (lambda _: json.dumps({"status": "ok"}), "different"),
        (lambda _: json.dumps([1]), "different"),
        (lambda _: "", "different"),
        (lambda _: "sha256:0", "different"),
        (lambda _: "<html>\xff", "different"),
    ],
)
def test_a_server_is_believed_by_its_digest_alone(reporting, target, report, state):
    pointer, answer = reporting
    answer["body"] = report(target).encode("latin-1")
    assert pointer.ask(target).state == state


def test_a_server_in_trouble_is_unreachable(reporting, target, tmp_path):
    pointer, answer = reporting
    answer["status"] = 503
    assert pointer.ask(target).state == "unreachable"
    gone = publisher.choose(make_agent(tmp_path, confirm="url", url="http://127.0.0.1:9"))
    assert gone.ask(target).state == "unreachable"


@pytest.fixture
def at_a_node(tmp_path):
    """Both publishers over HTTP at a node that does what it is given with each connection, with a short time-out."""
    with contextlib.ExitStack() as stack:

        def choose(kind, serve_one, **settings):
            url = stack.enter_context(version_fixtures.listening(serve_one))
            ours = {"kind": "pointer", "confirm": "url"} if kind == "pointer" else {"kind": kind, "path": None}
            return publisher.choose(make_agent(tmp_path, **{**ours, "url": url, "timeout_seconds": 0.6, **settings}))

        yield choose


KINDS = pytest.mark.parametrize("kind", ["pointer", "reference"])


@KINDS
@pytest.mark.parametrize("before", [b"", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["headers", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up_at_the_time_out(at_a_node, target, kind, before):
    slow = at_a_node(kind, version_fixtures.drip(before))
    began = time.monotonic()
    assert slow.ask(target) == publisher.Answer("unreachable", f"{slow.settings.url}{path_of(kind)} does not answer within 0.6 s")
    assert time.monotonic() - began < 2
    if kind == "reference":
        with pytest.raises(publisher.PublishFailedError, match=r"/load does not answer within 0\.6 s"):
            slow.publish(target)
        assert time.monotonic() - began < 4


def path_of(kind):
    return "/served/adjudication" if kind == "reference" else ""


@KINDS
def test_a_server_that_does_not_stop_talking_is_not_listened_to_the_end(at_a_node, target, kind):
    talking = at_a_node(kind, version_fixtures.answer(b" " * 50_000_000), timeout_seconds=60)
    answer = talking.ask(target)
    assert (answer.state, "answers with more than 100,000 bytes" in answer.detail) == ("unreachable", True)


@pytest.mark.parametrize("body", [b"[" * 99_000, b'{"adapter_digest": ' * 5_000], ids=["lists", "objects"])
def test_an_answer_that_is_nested_too_deeply_confirms_nothing(at_a_node, target, body):
    states = {kind: at_a_node(kind, version_fixtures.answer(body)).ask(target).state for kind in ("pointer", "reference")}
    assert states == {"pointer": "different", "reference": "unreachable"}
    with pytest.raises(publisher.PublishFailedError, match=r"refuses adjudication-v1.0-.*: status 500"):
        at_a_node("reference", version_fixtures.answer(body, 500)).publish(target)


def test_a_command_whose_answer_is_nested_too_deeply_confirms_nothing(tmp_path, target):
    (tmp_path / "answer").write_bytes(b"[" * 99_000)
    pointer = publisher.choose(make_agent(tmp_path, confirm="command", confirm_command=f"cat {tmp_path}/answer"))
    assert pointer.ask(target).state == "different"


def test_the_bare_base_is_confirmed_by_the_base_digest(reporting, tmp_path):
    pointer, answer = reporting
    bare = make_target(tmp_path, None)
    answer["body"] = json.dumps({"adapter_digest": None, "base_digest": bare.base_digest}).encode()
    assert pointer.ask(bare).state == "confirmed"
    answer["body"] = json.dumps({"adapter_digest": "sha256:1", "base_digest": bare.base_digest}).encode()
    assert pointer.ask(bare).state == "different"


def test_an_agent_without_a_publisher_is_unverified(tmp_path, target):
    nobody = publisher.choose(make_agent(tmp_path, kind="none", path=None))
    nobody.publish(target)
    assert nobody.ask(target).state == "unverified"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("serving") / "base")


@pytest.fixture(scope="module")
def node(base):
    """The reference node in this process, on a free port."""
    server = serve.NodeServer(("127.0.0.1", 0), nodes.Node(base, "cpu", None))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def reference(node, tmp_path):
    node.node.served.clear()
    return publisher.choose(make_agent(tmp_path, kind="reference", path=None, url=f"http://127.0.0.1:{node.server_address[1]}/"))


@pytest.fixture
def served(base, tmp_path):
    """Two versions on the node's base, and the bare base."""
    digest = artifacts.digest_folder(base)
    shared = {"base_path": str(base), "base_digest": digest, "prompt": PROMPT, "prompt_digest": spec.digest_text(PROMPT)}
    targets = [make_target(tmp_path, None, labels=list(LABELS), **shared)]
    for seed in (1, 2):
        place, adapter = artifacts.publish(random_adapter(base, tmp_path / f"lora-{seed}", seed), tmp_path / "adapters")
        target = dataclasses.replace(targets[0], version=f"v1.{seed}", serving_name=f"adjudication-v1.{seed}", adapter=place)
        targets.append(dataclasses.replace(target, adapter_digest=adapter))
    return targets


def test_the_reference_node_serves_what_it_is_told_and_says_so(reference, served):
    assert reference.ask(served[1]).state == "different"
    for target in (*served, served[1]):
        reference.publish(target)
        answers = [reference.ask(each).state for each in served]
        assert answers == ["confirmed" if each is target else "different" for each in served]


def test_the_same_weights_under_another_prompt_or_temperature_or_on_a_base_held_otherwise_are_another_version(reference, served):
    reference.publish(served[1])
    other = PROMPT + " "
    worded = {"prompt": other, "prompt_digest": spec.digest_text(other)}
    changes = [worded, {"temperature": 2.0}, {"labels": LABELS[:2]}, {"in_4bit": True}]
    for change in changes:
        changed = dataclasses.replace(served[1], **change)
        assert reference.ask(changed).state == "different"
        reference.publish(changed)
        assert reference.ask(changed).state == "confirmed"


def test_a_refusal_of_the_node_is_told_in_its_words(reference, served):
    with pytest.raises(publisher.PublishFailedError, match=r"refuses .*render|template|expected"):
        reference.publish(dataclasses.replace(served[1], prompt="{% if %}"))


def test_a_damaged_adapter_does_not_reach_the_node(reference, served):
    reference.publish(served[1])
    weights = served[2].adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(publisher.PublishFailedError, match="not the registered"):
        reference.publish(served[2])
    assert reference.ask(served[1]).state == "confirmed"


def test_a_node_that_is_down_is_unreachable(tmp_path, served):
    gone = publisher.choose(make_agent(tmp_path, kind="reference", path=None, url="http://127.0.0.1:9"))
    assert gone.ask(served[1]).state == "unreachable"
    with pytest.raises(publisher.PublishFailedError, match="does not answer"):
        gone.publish(served[1])


def test_a_proxy_of_the_environment_is_not_asked(reference, served, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    reference.publish(served[0])
    assert reference.ask(served[0]).state == "confirmed"


def test_every_kind_in_the_configuration_has_a_publisher(tmp_path):
    kinds = agents.Publisher.model_fields["kind"].annotation.__args__
    chosen = [type(publisher.choose(make_agent(tmp_path, kind=kind, url="http://127.0.0.1:9"))).__name__ for kind in kinds]
    assert chosen == ["Pointer", "Reference", "Nobody"]
