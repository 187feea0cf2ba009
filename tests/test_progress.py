"""A trainer at work gives signs of life, however long one phase takes: the daemon takes a silent one for dead."""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import training_fixtures as runs
from tests.model_fixtures import tiny_base
from trainers import attempts, bases, data, encoding, memory, ranks, spec, stopping, texts, token_tables, train, work

LINES = 30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> spec.Base:
    return runs.base_of(tiny_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
def slow_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of work that are small, and each of which takes longer than a sign of life may be away."""
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0)
    monkeypatch.setattr(texts, "BLOCK", 64)
    monkeypatch.setattr(token_tables, "ROWS_AT_ONCE", 2)


def ask(base: spec.Base, folder: Path, method: str, **options: object) -> spec.Spec:
    """A run on ten rows, or on so many texts."""
    corpus = folder / "texts.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"note {number}: the knee hurts"}) + "\n" for number in range(LINES)))
    rows = runs.dataset(folder / "set", train=10, dev=6)
    changes = {"texts": corpus, "dataset": None, "candidate": None} if method == "pretrain" else {}
    return runs.make_spec(base.path, rows, {"method": method, "epochs": 1, **options}, **changes)


def count_lines(run_dir: Path) -> Counter[str]:
    """How many lines of progress each phase has."""
    lines = (run_dir / "attempts/1" / spec.PROGRESS).read_text().splitlines()
    return Counter(json.loads(line)["phase"] for line in lines)


@pytest.mark.usefixtures("slow_pieces")
def test_a_run_gives_a_sign_of_life_for_each_piece_of_text_that_it_tokenises(base: spec.Base, tmp_path: Path) -> None:
    assert runs.perform(tmp_path, ask(base, tmp_path, "pretrain")) == spec.EXIT_DONE
    assert count_lines(tmp_path)["tokenizing"] == 1 + LINES


@pytest.mark.usefixtures("slow_pieces")
def test_a_run_gives_a_sign_of_life_for_rows_that_it_tokenises_and_for_losses_that_it_measures(base: spec.Base, tmp_path: Path) -> None:
    assert runs.perform(tmp_path, ask(base, tmp_path, "lora", max_tokens=16)) == spec.EXIT_DONE
    counted = count_lines(tmp_path)
    assert counted["tokenizing"] == 1 + (10 + 6) / 2
    assert counted["measuring"] == 1 + 6
    assert counted["saving"] == 1


@pytest.mark.parametrize("options", [{"method": "lora"}, {"method": "full", "optimizer": "adamw", "optimizer_in_backward": True}])
@pytest.mark.usefixtures("slow_pieces")
def test_a_step_gives_a_sign_of_life_after_each_of_its_passes(base: spec.Base, tmp_path: Path, options: dict[str, str]) -> None:
    asked = ask(base, tmp_path, batch_rows=10, epochs=3, max_tokens=16, patience=3, **options)
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    # Ten passes before each line of a step, of which the first step's show the line before it; six for the dev loss behind each.
    assert count_lines(tmp_path)["training"] >= 2 * 10 + 3 * 6


def test_a_sign_of_life_says_what_the_last_line_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0)
    progress = attempts.Progress(attempts.open_attempt(tmp_path))
    progress.beat()
    progress.write("training", step=3, loss=0.5)
    progress.beat()
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "attempts/1" / spec.PROGRESS).read_text().splitlines()]
    assert [(line["phase"], line["step"], line["loss"], line["heartbeat"]) for line in lines] == [("training", 3, 0.5, n) for n in (1, 2)]


def test_signs_of_life_are_no_more_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 1e9)
    progress = attempts.Progress(attempts.open_attempt(tmp_path))
    progress.write("training")
    for _ in range(100):
        progress.beat()
    progress.close()
    assert count_lines(tmp_path) == {"training": 1}


def compute(seconds: float) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pass


def live_through(folder: Path, call: Callable[[float], None], seconds: float) -> Counter[str]:
    """The lines of progress that one long call gives, by phase."""
    progress = attempts.Progress(attempts.open_attempt(folder))
    progress.write("loading")
    with progress.alive():
        call(seconds)
    progress.close()
    return count_lines(folder)


@pytest.mark.parametrize(("call", "gives_signs"), [(compute, True), (time.sleep, False)])
def test_a_long_call_gives_signs_of_life_while_it_works_and_none_while_it_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[float], None], gives_signs: bool
) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0)
    monkeypatch.setattr(attempts, "LOOK_SECONDS", 0.2)
    assert (live_through(tmp_path, call, 1)["loading"] > 1) is gives_signs


def test_a_call_that_works_for_hours_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0)
    monkeypatch.setattr(attempts, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(attempts, "LONGEST_CALL_SECONDS", 0)
    assert live_through(tmp_path, compute, 0.2) == {"loading": 1}


@pytest.mark.parametrize(
    ("slow", "phase"),
    [("trainers.checks.check_spec", "checking"), ("trainers.bases.load_base", "loading"), ("trainers.methods.lora.save_adapter", "saving")],
)
def test_checking_loading_and_saving_a_great_base_give_signs_of_life(
    base: spec.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str, phase: str
) -> None:
    genuine = pkgutil.resolve_name(slow)

    def take_longer(*arguments: object, **options: object) -> object:
        compute(0.5)
        return genuine(*arguments, **options)

    monkeypatch.setattr(attempts, "BEAT_SECONDS", 0)
    monkeypatch.setattr(attempts, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(slow, take_longer)
    assert runs.perform(tmp_path, ask(base, tmp_path, "lora")) == spec.EXIT_DONE
    assert count_lines(tmp_path)[phase] > 1


@pytest.mark.parametrize("method", ["lora", "pretrain"])
@pytest.mark.usefixtures("slow_pieces")
def test_a_run_that_is_asked_to_stop_while_it_tokenises_stops(
    base: spec.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    stop = stopping.Stop()
    spec.write_spec(tmp_path, ask(base, tmp_path, method))
    stop_at_third(monkeypatch, stop)
    assert train.run(tmp_path, None, bases.Bases(), stop)[0] == spec.EXIT_RESUMABLE
    assert set(count_lines(tmp_path)) == {"checking", "tokenizing"}
    left = tmp_path / ("tokens" if method == "pretrain" else ".set.tokens")
    assert not list(left.iterdir()), "nothing half-written is left"


def test_of_several_processes_none_stops_while_others_would_wait_for_it(base: spec.Base, tmp_path: Path) -> None:
    stop, attempt = stopping.Stop(), attempts.open_attempt(tmp_path)
    stop.is_requested = True
    one = work.Work(
        ask(base, tmp_path, "lora"), attempt, attempts.Progress(attempt), stop, bases.Bases(), None, memory.Budget(16), ranks.Ranks(1, 2)
    )
    one.beat()
    with pytest.raises(stopping.StoppedError):
        dataclasses.replace(one, together=ranks.ALONE).beat()
    one.progress.close()


def stop_at_third(monkeypatch: pytest.MonkeyPatch, stop: stopping.Stop) -> None:
    """Ask for a stop with the third piece of work."""
    done: list[None] = []

    def note(genuine: Callable[..., object]) -> Callable[..., object]:
        def tell(*arguments: object) -> object:
            done.append(None)
            stop.is_requested = len(done) >= 3
            return genuine(*arguments)

        return tell

    monkeypatch.setattr(encoding, "encode_texts", note(encoding.encode_texts))
    monkeypatch.setattr(data, "encode_block", note(data.encode_block))
