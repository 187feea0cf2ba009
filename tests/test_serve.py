import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from storage import artifacts
from tests.model_fixtures import LABELS, PROMPT, claim, random_adapter, tiny_base
from trainers import bases, encoding, forms, nodes, score, serve
from trainers.adapters import ADAPTER_WEIGHTS, load_adapter
from trainers.spec import Options, Prompt, digest_text

CLAIMS = [{"input": claim(number)} for number in range(12)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [random_adapter(base, folder / name, seed) for seed, name in enumerate(("first", "second"), 1)]


@pytest.fixture
def node(base, tmp_path):
    return nodes.Node(base, "cpu", tmp_path / "state.json")


@pytest.fixture
def client(node):
    with serve.NodeServer(("127.0.0.1", 0), node) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", timeout=20) as client:
            yield client
        server.shutdown()
        thread.join()


def order(adapter: Path | None, version: str = "v1.0", **changes):
    digest = artifacts.digest_folder(adapter) if adapter else None
    return {
        "agent": "adjudication",
        "version": version,
        "serving_name": f"adjudication-{version}-abc",
        "adapter": str(adapter) if adapter else None,
        "adapter_digest": digest,
        "prompt": PROMPT,
        "labels": list(LABELS),
        "temperature": 2.0,
        **changes,
    }


def ask(client, claims=CLAIMS, agent="adjudication"):
    return client.post("/score", json={"agent": agent, "claims": claims})


def test_it_answers_as_scoring_by_hand_does(base, adapters, client):
    client.post("/load", json=order(adapters[0])).raise_for_status()

    answers = ask(client).json()

    model, tokenizer = bases.load_base(base, "cpu")
    prompts = [Prompt(text=PROMPT).render(one["input"]) for one in CLAIMS]
    logprobs = score.score_prompts(load_adapter(model, "a", adapters[0]), tokenizer, prompts, LABELS, max_tokens=4096)
    expected = score.probabilities(logprobs, 2.0)
    assert [answer["probabilities"] for answer in answers] == [pytest.approx(row.tolist(), abs=1e-4) for row in expected]
    assert [answer["decision"] for answer in answers] == [LABELS[i] for i in expected.argmax(axis=1)]
    assert [answer["confidence"] for answer in answers] == [max(answer["probabilities"]) for answer in answers]
    assert {(answer["version"], answer["serving_name"]) for answer in answers} == {("v1.0", "adjudication-v1.0-abc")}


def test_it_says_what_it_serves(base, adapters, client):
    loaded = client.post("/load", json=order(adapters[0])).json()

    assert client.get("/served/adjudication").json() == loaded
    assert client.get("/served").json() == {"served": [loaded]}
    assert loaded.pop("loaded_at").endswith("+00:00")
    assert loaded == {
        "agent": "adjudication",
        "version": "v1.0",
        "serving_name": "adjudication-v1.0-abc",
        "adapter_digest": artifacts.digest_folder(adapters[0]),
        "base_digest": artifacts.digest_folder(base),
        "in_4bit": False,
        "prompt_digest": digest_text(PROMPT),
        "labels": list(LABELS),
        "temperature": 2.0,
    }
    assert client.get("/healthz").json() == {"status": "ok", "base_digest": artifacts.digest_folder(base), "agents": ["adjudication"]}


def test_the_bare_base_and_adapters_take_turns_without_a_trace(adapters, client):
    answers = {}
    for version, adapter in [("v0", None), ("v1.0", adapters[0]), ("v1.1", adapters[1]), ("v0", None), ("v1.0", adapters[0]), ("v0", None)]:
        client.post("/load", json=order(adapter, version)).raise_for_status()
        now = ask(client).json()
        assert answers.setdefault(version, now) == now
    assert client.get("/served/adjudication").json()["adapter_digest"] is None
    assert len({json.dumps(one) for one in answers.values()}) == 3


@pytest.fixture
def new_base(tmp_path):
    return tiny_base(tmp_path / "new", "mistral")


def test_a_new_base_comes_with_the_first_version_on_it_and_goes_with_the_last(base, adapters, client, node, new_base, tmp_path):
    client.post("/load", json=order(adapters[0], agent="medical"))
    before = ask(client, agent="medical").json()
    on_new = {"base": str(new_base), "base_digest": artifacts.digest_folder(new_base)}
    adapter = random_adapter(new_base, tmp_path / "on-new", seed=5)
    answers = []
    for version, worn in (("v2.0", None), ("v2.1", adapter)):
        loaded = client.post("/load", json=order(worn, version, **on_new)).raise_for_status().json()
        assert loaded["base_digest"] == on_new["base_digest"] == client.get("/served/adjudication").json()["base_digest"]
        answers.append(ask(client).json())
        by_hand, tokenizer = bases.load_base(new_base, "cpu")
        worn_by_hand = load_adapter(by_hand, "a", worn) if worn else by_hand
        prompts = [Prompt(text=PROMPT).render(one["input"]) for one in CLAIMS]
        expected = score.probabilities(score.score_prompts(worn_by_hand, tokenizer, prompts, LABELS, max_tokens=4096), 2.0)
        assert [one["probabilities"] for one in answers[-1]] == [pytest.approx(row.tolist(), abs=1e-4) for row in expected]
    assert ask(client, agent="medical").json() == before
    assert len(node.bases) == 2
    client.post("/load", json=order(adapters[0], "v1.0")).raise_for_status()
    assert list(node.bases) == [(artifacts.digest_folder(base), False)], "a rollback across bases leaves nothing behind"
    assert ask(client).json() != answers[0]


def test_a_base_that_cannot_be_served_is_refused_with_what_to_do(adapters, client, node, new_base, monkeypatch):
    client.post("/load", json=order(adapters[0]))
    before = ask(client).json()
    digest = artifacts.digest_folder(new_base)
    refused = {
        "no folder": client.post("/load", json=order(None, "v2.0", base_digest=digest)),
        "other files": client.post("/load", json=order(None, "v2.0", base=str(new_base), base_digest="sha256:0")),
        "other adapter": client.post("/load", json=order(adapters[0], "v2.0", base=str(new_base), base_digest=digest)),
    }
    monkeypatch.setattr(bases, "load_base", out_of_memory)
    refused["memory"] = client.post("/load", json=order(None, "v2.0", base=str(new_base), base_digest=digest))
    said = {name: (answer.status_code, answer.json()["error"]) for name, answer in refused.items()}
    assert {name: status for name, (status, _) in said.items()} == {
        "no folder": 409,
        "other files": 409,
        "other adapter": 409,
        "memory": 507,
    }
    assert "give its folder as `base`" in said["no folder"][1]
    assert "load it with its own base" in said["other adapter"][1]
    assert f"restart the node with --base {new_base}" in said["memory"][1]
    assert ask(client).json() == before
    assert len(node.bases) == 1


@pytest.mark.parametrize("starts_in_4bit", [True, False])
def test_a_version_is_answered_on_the_base_as_it_was_examined(starts_in_4bit, base, adapters, tmp_path):
    node = nodes.Node(base, "cpu", tmp_path / "state.json", in_4bit=starts_in_4bit)
    answers = {}
    for in_4bit in (True, False, None):
        asked = nodes.Load(**order(adapters[0], base=str(base), base_digest=artifacts.digest_folder(base), in_4bit=in_4bit))
        assert node.load(asked)["in_4bit"] == (starts_in_4bit if in_4bit is None else in_4bit)
        answers[in_4bit] = [one["probabilities"] for one in node.answer(nodes.Ask(agent="adjudication", claims=CLAIMS))]
        by_hand, tokenizer = bases.load_base(base, "cpu", in_4bit=starts_in_4bit if in_4bit is None else in_4bit)
        prompts = [Prompt(text=PROMPT).render(one["input"]) for one in CLAIMS]
        logprobs = score.score_prompts(load_adapter(by_hand, "a", adapters[0]), tokenizer, prompts, LABELS, max_tokens=2048)
        assert answers[in_4bit] == [pytest.approx(row.tolist(), abs=1e-4) for row in score.probabilities(logprobs, 2.0)]
    assert answers[True] != answers[False]
    assert list(node.bases) == [node.own], "the other one has left"


def out_of_memory(path, device, **how):
    raise torch.OutOfMemoryError(f"{path} on {device} {how}")


def test_agents_do_not_disturb_each_other(adapters, client):
    client.post("/load", json=order(adapters[0]))
    before = ask(client).json()

    client.post("/load", json=order(adapters[1], agent="medical", labels=["YES", "NO"])).raise_for_status()

    assert ask(client).json() == before
    assert {answer["decision"] for answer in ask(client, agent="medical").json()} <= {"YES", "NO"}
    assert ask(client, agent="scribe").status_code == 404
    assert client.get("/served/scribe").status_code == 404


def test_a_request_during_swaps_is_answered_wholly_by_one_version(adapters, client):
    expected = {}
    for version, adapter in (("v1.0", adapters[0]), ("v1.1", adapters[1])):
        client.post("/load", json=order(adapter, version))
        expected[version] = ask(client).json()

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, client) for _ in range(40)]
        for number in range(10):
            client.post("/load", json=order(adapters[number % 2], f"v1.{number % 2}")).raise_for_status()
        answered = [request.result().json() for request in asked]

    assert all(answers == expected[answers[0]["version"]] for answers in answered)


def test_a_long_prompt_is_cut_by_the_rule_of_training(adapters, node):
    node.load(nodes.Load(**order(adapters[0], max_row_tokens=64)))
    fields = {"treatment": "surgery " * 500, "age": "41", "plan": "HMO"}
    tokenizer = node.bases[node.own].tokenizer
    limit = encoding.prompt_limit(tokenizer, forms.find(tokenizer, "plain"), LABELS, 64)
    cut, was_cut = encoding.build_prompts(tokenizer, Prompt(text=PROMPT), [fields], [limit])

    answer = node.answer(nodes.Ask(agent="adjudication", claims=(nodes.Claim(input=fields),)))

    assert was_cut
    assert answer[0]["probabilities"] == node.ask(node.served["adjudication"], cut)[0].probabilities
    assert Options().max_row_tokens == nodes.Load(**order(None)).max_row_tokens


def wrong_orders(adapter: Path, base: Path, folder: Path):
    """Orders that must be refused: status, a word of the sentence, body."""
    stranger = random_adapter(base, folder / "stranger", 3)
    artifacts.pin_base(stranger, "sha256:" + "0" * 64)
    odd = random_adapter(base, folder / "odd", 4)
    config = odd / artifacts.ADAPTER_CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    poisoned = random_adapter(base, folder / "poisoned", 5)
    weights = ADAPTER_WEIGHTS
    tensors = {name: tensor * float("nan") for name, tensor in score_tensors(poisoned / weights).items()}
    save_tensors(tensors, poisoned / weights)
    return [
        (409, "trained on base", order(stranger)),
        (409, "not the registered", order(adapter, adapter_digest="sha256:" + "1" * 64)),
        (422, "use_dora", order(odd)),
        (422, "NaN", order(poisoned)),
        (422, "holds no", order(None) | {"adapter": str(folder / "absent"), "adapter_digest": "sha256:1"}),
        (422, "both or neither", order(adapter, adapter_digest=None)),
        (422, "both or neither", order(None, adapter_digest="sha256:1")),
        (422, "template", order(adapter, prompt="{{ input.age")),
        (422, "same tokens", order(adapter, labels=["NO", "NO"])),
        (422, "line break", order(adapter, labels=["NO\nYES", "NO"])),
        (422, "labels", order(adapter, labels=["NO"])),
        (422, "temperature", order(adapter, temperature=0)),
        (422, "version", {key: value for key, value in order(adapter).items() if key != "version"}),
        (422, "surprise", order(adapter, surprise=1)),
        (422, "body", []),
    ]


def score_tensors(path: Path):
    from safetensors.torch import load_file  # noqa: PLC0415

    return load_file(path)


def save_tensors(tensors, path: Path):
    from safetensors.torch import save_file  # noqa: PLC0415

    save_file(tensors, path)


def test_a_wrong_order_is_refused_in_a_sentence_and_changes_nothing(adapters, base, client, node, tmp_path):
    client.post("/load", json=order(adapters[0]))
    before, served, kept = ask(client).json(), client.get("/served").json(), node.state.read_text()

    for status, word, body in wrong_orders(adapters[1], base, tmp_path):
        reply = client.post("/load", json=body)
        assert (reply.status_code, word in reply.json()["error"]) == (status, True), reply.text

    assert ask(client).json() == before
    assert client.get("/served").json() == served
    assert node.state.read_text() == kept
    assert list(node.bases[node.own].model.peft_config) == [node.served["adjudication"].adapter_name]


@pytest.mark.parametrize(
    ("status", "method", "path", "content", "headers"),
    [
        (400, "POST", "/score", b"{", {}),
        (400, "POST", "/score", b"[" * 100_000, {}),
        (400, "POST", "/score", b'{"agent": "\\ud800"}', {}),
        (422, "POST", "/score", b'{"agent": "adjudication", "claims": [{"input": 1}]}', {}),
        (422, "POST", "/score", b'{"agent": "adjudication", "claims": [{"inputs": {}}]}', {}),
        (415, "POST", "/score", b"{}", {"Content-Type": "text/plain"}),
        (411, "POST", "/score", iter([b"{}"]), {}),
        (404, "POST", "/nowhere", b"{}", {}),
        (404, "GET", "/nowhere", b"", {}),
        (404, "GET", "/served/", b"", {}),
        (405, "DELETE", "/served", b"", {}),
        (400, "POST", "/load", b"null and void", {}),
    ],
)
def test_bad_requests_get_a_sentence_and_never_a_server_error(client, status, method, path, content, headers):
    reply = client.request(method, path, content=content, headers={"Content-Type": "application/json"} | headers)

    assert reply.status_code == status
    assert reply.json()["error"]
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("status", "request_lines"),
    [
        (413, "POST /score HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n"),
        (411, "POST /score HTTP/1.1\r\nContent-Length: -1\r\n\r\n"),
        (411, "POST /score HTTP/1.1\r\n\r\n"),
        (400, "GET /healthz HTTP/7.0\r\n\r\n"),
        (400, "what is this\r\n\r\n"),
        (414, f"GET /{'x' * 70_000} HTTP/1.1\r\n\r\n"),
        (431, f"GET /healthz HTTP/1.1\r\nX: {'x' * 70_000}\r\n\r\n"),
        (200, f"GET /healthz HTTP/1.1\r\nContent-Length: 40\r\n\r\n{'GET /nowhere HTTP/1.1'}\r\n\r\n"),
    ],
)
def test_what_is_hardly_http_gets_one_answer_and_no_more(client, status, request_lines):
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=5) as connection:
        connection.sendall(request_lines.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert answer.count(b"HTTP/1.1") == 1


def test_a_claim_that_the_template_cannot_render_is_refused(client):
    client.post("/load", json=order(None, prompt="{{ 100 / (input.age | int) }}")).raise_for_status()

    assert ask(client, [{"input": {"age": "5"}}]).status_code == 200
    assert ask(client, [{"input": {"age": "0"}}]).status_code == 422
    assert ask(client, []).json() == []


def test_a_changed_adapter_is_left_out_after_a_restart_and_the_others_serve(adapters, base, tmp_path):
    state = tmp_path / "state.json"
    node = nodes.Node(base, "cpu", state)
    changed = random_adapter(base, tmp_path / "changed", 7)
    node.load(nodes.Load(**order(changed)))
    kept = node.load(nodes.Load(**order(adapters[0], agent="medical")))
    (changed / "README.md").write_text("more than was registered")

    again = nodes.Node(base, "cpu", state)
    again.restore()

    assert list(again.served) == ["medical"]
    assert again.describe(again.served["medical"])["adapter_digest"] == kept["adapter_digest"]


def test_a_state_file_of_another_base_is_refused(adapters, node, tmp_path):
    node.load(nodes.Load(**order(adapters[0])))
    other = nodes.Node(tiny_base(tmp_path / "other", hidden_size=16), "cpu", node.state)

    with pytest.raises(serve.SpecRefusedError, match="written with base"):
        other.restore()


def test_the_program_serves_again_what_it_served_and_stops_within_a_second(adapters, base, tmp_path):
    nodes.Node(base, "cpu", tmp_path / "state.json").load(nodes.Load(**order(adapters[1], "v1.1")))
    command = [sys.executable, "-m", "trainers.serve", "--base", str(base), "--state", str(tmp_path / "state.json"), "--threads", "1"]
    root = Path(serve.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"}) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:")
            with httpx.Client(base_url=line.split()[-1]) as client:
                assert client.get("/served/adjudication").json()["adapter_digest"] == artifacts.digest_folder(adapters[1])
                assert ask(client).json()[0]["version"] == "v1.1"
                process.send_signal(signal.SIGTERM)
                asked_at = time.monotonic()
                assert process.wait(timeout=10) == 0
            assert time.monotonic() - asked_at < 1
        finally:
            process.kill()
