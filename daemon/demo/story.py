"""What the demo shows, in order. Nothing is canned: each step waits for what the daemon does, and an outcome that differs ends it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from sqlalchemy import Engine

from daemon import cases, config, rehearsal, run_folders
from daemon.demo import direct, home, servers
from daemon.demo.clients import Desk, Expert, News, Node, Producer
from daemon.demo.home import AGENT, Home
from daemon.demo.loop import FROZEN, Loop, OutcomeDiffersError
from daemon.demo.screen import Screen
from daemon.kafka import Kafka
from storage import db, exams

RETRAIN_CLAIMS, VERDICT_CLAIMS, GAIN_CLAIMS, HARM_CLAIMS = 1200, 1000, 200, 1000
EXPERT = "physician"
FIRST, BETTER, SPOILED = "v1.0", "v1.1", "v1.2"
FIRST_EPOCHS = 6
SPOILED_OPTIONS = {"warm_start": "champion", "epochs": 3, "new_weight": 0.2}
FORCED_REASON = "The archive is the larger sample."


def prepare(folder: Path, sections: str, seed: int, screen: Screen) -> Home:
    """Make the files and the small base; `sections` of the configuration say where database and stream are, if they are elsewhere."""
    servers.run("init", folder)
    made = home.furnish(folder, seed, sections)
    if sections:
        (folder / "ratchet.db").unlink()
        servers.run("db", "upgrade", "--config", made.config)
        servers.run("topics", "create", "--config", made.config)
    known = cases.read(made.history)
    texts = made.folder / "texts.jsonl"
    rehearsal.write_texts(texts, config.load(made.config, {}).agent(AGENT), known)
    make_base(made, texts, seed, screen)
    screen.say(f"a Llama-type base of 1 M parameters, made from the prompts of {len(known)} decisions of 2001-2002, without their answers")
    servers.run("import", made.history, "--config", made.config)
    return made


def make_base(made: Home, texts: Path, seed: int, screen: Screen) -> None:
    """Pre-train the small base."""
    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(texts), "--out", str(made.base), "--seed", str(seed)]
    log = made.folder / "base.log"
    with screen.bar("making the small base") as bar, servers.started(command, log) as process:
        while process.poll() is None:
            bar.show_training(run_folders.read_progress(made.base.with_name(".base.making"), 1))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(servers.POLL_SECONDS)
    if process.returncode:
        raise servers.CommandFailedError(f"the small base can't be made: {log.read_text().strip()}")


@contextlib.contextmanager
def running(made: Home, screen: Screen) -> Iterator[Loop]:
    """The node, the daemon and their clients; all of it is ended in order, whatever happens."""
    with contextlib.ExitStack() as stack:
        node_url = f"http://127.0.0.1:{made.node_port}"
        state = made.folder / "node.json"
        node = [sys.executable, "-m", "trainers.serve", "--base", str(made.base), "--port", str(made.node_port), "--state", str(state)]
        node_log, daemon_log = made.folder / "node.log", made.folder / "daemon.log"
        with screen.bar("starting the node and the daemon"):
            node_process = stack.enter_context(servers.started([*node, "--threads", "1"], node_log))
            servers.await_answer(f"{node_url}/healthz", node_process, node_log)
            daemon_process = stack.enter_context(servers.started([servers.RATCHET, "up", "--config", str(made.config)], daemon_log))
            servers.await_answer(f"http://127.0.0.1:{made.port}/login", daemon_process, daemon_log)
        engine = db.open_engine(config.load(made.config, {}).database.url)
        stack.callback(engine.dispose)
        screen.say(f"the daemon answers at http://127.0.0.1:{made.port}, the inference node at {node_url}")
        yield connect(made, engine, screen, stack)


def connect(made: Home, engine: Engine, screen: Screen, stack: contextlib.ExitStack) -> Loop:
    """The clients. Each has a token of its own; over Kafka only the expert needs one, to be known."""

    def add_token(name: str, role: str) -> str:
        return str(servers.run_json("tokens", "add", name, "--role", role, "--config", made.config)["token"])

    def open_client(port: int, token: str | None = None) -> httpx.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False))

    token, kafka = add_token(EXPERT, "reviewer"), config.load(made.config, {}).kafka
    producer: Producer
    desk: Desk
    news: News
    if kafka.bootstrap is None:
        producer = direct.Producer(open_client(made.port, add_token("inference-node", "producer")))
        desk, news = direct.Desk(open_client(made.port, token)), direct.News(engine)
    else:
        producer, desk, news = join_stream(kafka, engine, stack)
    stream = cases.read(made.stream)
    expert = Expert(desk, {case.claim_id: case.answer for case in stream})
    return Loop(engine, screen, Node(open_client(made.node_port)), producer, expert, news, stream)


def join_stream(kafka: Kafka, engine: Engine, stack: contextlib.ExitStack) -> tuple[Producer, Desk, News]:
    """The clients' side of the topics."""
    from consumers import counterpart  # noqa: PLC0415  without Kafka its packages need not be there
    from daemon.demo import streamed  # noqa: PLC0415

    access, topics = kafka.to_access(), kafka.topics
    sender = stack.enter_context(counterpart.sending(access))
    reviews, announcements = (stack.enter_context(counterpart.listening(access, name)) for name in (topics.queue, topics.events))
    desk = streamed.Desk(sender, reviews, topics.labels, EXPERT)
    return streamed.Producer(sender, topics.predictions, engine), desk, streamed.News(announcements)


def train_first(made: Home, loop: Loop, seed: int) -> None:
    """The first version: trained by the daemon on the history, published to the node."""
    loop.screen.begin_chapter("2. The first version")
    servers.run(
        "train", "--reason", "the first version", "--set", f"epochs={FIRST_EPOCHS}", "--set", f"seed={seed}", "--config", made.config
    )
    run = loop.follow_training(f"training {FIRST} on the history")
    loop.wait_until(lambda: loop.is_confirmed(FIRST), f"{FIRST} in service")
    loop.check_served(FIRST)
    loop.node.load(FROZEN, dict(loop.read_version(FIRST)))
    seconds = (run["finished_at"] - run["started_at"]).total_seconds()
    loop.screen.say(f"{FIRST} is trained ({seconds:.0f} s) and in service: the node reports its digest")


def improve(loop: Loop) -> None:
    """Nine years later: experts answer, a training starts by itself, its candidate is examined and promoted."""
    loop.screen.begin_chapter("3. Nine years later: the claims of 2011 come in, experts answer the unsure ones")
    loop.stream_until(lambda: loop.read_live("train") is not None, "claims until a training starts by itself", RETRAIN_CLAIMS)
    came, answered = len(loop.served), len(loop.expert.answered_at)
    loop.screen.say(f"{came} claims came in, the expert answered {answered}: a training has started by itself")
    loop.follow_training(f"training {BETTER} on history and answers")
    loop.stream_until(lambda: loop.news.read_verdict(BETTER) is not None, f"the blind exam of {BETTER}", VERDICT_CLAIMS)
    loop.screen.say(explain(loop, BETTER))
    expect_verdict(loop, BETTER, "promote")
    loop.wait_until(lambda: loop.is_confirmed(BETTER), f"{BETTER} in service")
    loop.check_served(BETTER)
    loop.screen.say(f"{BETTER} is in service: the node reports its digest")
    loop.stream_some(GAIN_CLAIMS, f"claims that {BETTER} answers")


def spoil(made: Home, loop: Loop, seed: int) -> None:
    """A bad import teaches a candidate the opposite; the exam must reject it and say what it broke."""
    loop.screen.begin_chapter("4. A bad import: 1,500 overturned denials of 2003-2010 come in with their answers inverted")
    servers.run("import", made.archive, "--config", made.config)
    options = [part for key, value in {**SPOILED_OPTIONS, "seed": seed}.items() for part in ("--set", f"{key}={value}")]
    servers.run("train", "--reason", "learn the archive", *options, "--config", made.config)
    loop.follow_training(f"training {SPOILED} on the bad import")
    loop.stream_until(lambda: loop.news.read_verdict(SPOILED) is not None, f"the blind exam of {SPOILED}", VERDICT_CLAIMS)
    loop.screen.say(explain(loop, SPOILED))
    expect_verdict(loop, SPOILED, "reject")


def force(made: Home, loop: Loop) -> None:
    """An operator promotes the rejected version all the same, and the watch rolls it back by itself."""
    loop.screen.begin_chapter("5. An operator forces the rejected version")
    with contextlib.suppress(servers.CommandFailedError):
        servers.run("promote", SPOILED, "--config", made.config)
        raise OutcomeDiffersError(f"{SPOILED} was promoted without --force")
    loop.screen.say(f"`ratchet promote {SPOILED}` is refused: it takes --force and a reason")
    servers.run("promote", SPOILED, "--force", "--reason", FORCED_REASON, "--config", made.config)
    loop.check_served(SPOILED)
    loop.screen.say(f"with both, {SPOILED} is in service, and marked for ever")
    loop.stream_until(lambda: loop.is_confirmed(BETTER), f"the watch over {SPOILED}", HARM_CLAIMS)
    loop.check_served(BETTER)
    loop.wait_until(lambda: (loop.news.read_change() or {}).get("version") == BETTER, f"word of {BETTER}'s return")
    change = loop.news.read_change()
    if change is None or change["kind"] != "rollback" or change["actor"] != "ratchet":
        raise OutcomeDiffersError(f"{BETTER} came back by {change and change['kind']}, not by the watch")
    loop.screen.say(f"rolled back to {BETTER} by itself. {change['reason']}")
    loop.stream_some(GAIN_CLAIMS, f"claims that {BETTER} answers again")


def expect_verdict(loop: Loop, version: str, expected: str) -> None:
    """Raise `OutcomeDiffersError` unless the exam said what the demo is to show."""
    verdict = loop.news.read_verdict(version)
    if verdict != expected:
        raise OutcomeDiffersError(f"the verdict on {version} is {verdict}, expected was {expected}")


def explain(loop: Loop, version: str) -> str:
    """The exam's own words."""
    with db.reading(loop.engine) as connection:
        exam = [one for one in exams.of_version(connection, AGENT, version) if one["kind"] == "exam"][-1]
    report = exam["report"]
    counts = f"{report.get('asked', 0)} blind reviews, {report.get('wins', 0)} won, {report.get('losses', 0)} lost"
    return f"{version}: {exam['outcome']} ({counts}). {' '.join(report['reasons'])}"
