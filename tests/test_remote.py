"""A run whose folder lies in a store: what is fetched, what is brought back, and what is removed there."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from storage import mirror
from tests import training_fixtures as fixtures
from trainers import remote, spec, stopping

FILES = ("best.safetensors", "optimizer.safetensors", "state.json", "weights.safetensors")


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder on a disk, or in fsspec's own memory, as an object store has them."""
    return f"{request.param}://{tmp_path}/store/run"


def make_checkpoint(place: Path, step: int, signature: str = "s") -> Path:
    """Files that pass for a checkpoint where nobody loads them."""
    folder = place / f"checkpoints/step-{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text(json.dumps({"signature": signature, "step": step, "file": name}))
    return folder


def find_checkpoints(folder: Path) -> dict[str, set[str]]:
    """The files of each checkpoint of all attempts."""
    return {
        str(place.relative_to(folder / "attempts")): {file.name for file in place.iterdir()}
        for place in folder.glob("attempts/*/checkpoints/step-*")
    }


def test_the_store_has_the_checkpoints_that_the_trainer_keeps(url: str, tmp_path: Path) -> None:
    store, place = mirror.Mirror(url), tmp_path / "attempts/1"
    for step in range(1, 6):
        make_checkpoint(place, step)
        if step > 2:
            shutil.rmtree(place / f"checkpoints/step-{step - 2}")
        if step != 4:  # that one comes together with the next
            remote.bring_back(store, place, 1)
    assert store.names("attempts/1/checkpoints") == {"step-4", "step-5"}


def begin(url: str, folder: Path, attempt: int) -> None:
    """The daemon begins an attempt."""
    (folder / "attempt.json").write_text("{}")
    mirror.Mirror(url).push(folder / "attempt.json", f"attempts/{attempt}/attempt.json")


class Killed(BaseException):
    """What a process does not survive."""


class Dying(mirror.Mirror):
    """A store that is written to by a process that is killed, in the midst of the change with this number."""

    def __init__(self, url: str, changes: int) -> None:
        super().__init__(url)
        self.changes = changes

    def _put(self, path: Path, name: str) -> None:
        if self._is_last():
            half = path.with_name(".half")
            half.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            super()._put(half, name)
            raise Killed
        super()._put(path, name)

    def remove(self, name: str) -> None:
        if self._is_last():
            super().remove(f"{name}/{min(self.names(name))}")
            raise Killed
        super().remove(name)

    def _is_last(self) -> bool:
        self.changes -= 1
        return self.changes < 0


def test_a_kill_at_any_moment_leaves_the_newest_whole_checkpoint_or_a_newer_one(url: str, tmp_path: Path) -> None:
    place = tmp_path / "attempts/1"
    fetched = set()
    for moment in range(100):
        shutil.rmtree(tmp_path, ignore_errors=True)
        mirror.Mirror(url).remove("")
        old = [make_checkpoint(place, step) for step in (1, 2)]
        remote.bring_back(mirror.Mirror(url), place, 1)
        for step in (3, 4):
            make_checkpoint(place, step)
            shutil.rmtree(old[step - 3])
        try:
            remote.bring_back(Dying(url, moment), place, 1)
            break
        except Killed:
            begin(url, tmp_path, 2)
            remote.fetch(mirror.Mirror(url), tmp_path / "next", 2)
            whole = [name for name, files in find_checkpoints(tmp_path / "next").items() if files == set(FILES)]
            fetched |= set(whole)
            assert 1 <= len(whole) <= 2, f"killed at change {moment}"
    assert fetched >= {f"1/checkpoints/step-{step}" for step in (2, 4)}
    assert moment == 2 * len(FILES) + 2, "two were copied and two removed"


def test_only_what_the_attempt_may_go_on_from_is_fetched(url: str, tmp_path: Path) -> None:
    store = mirror.Mirror(url)
    for attempt, step, signature in ((1, 3, "s"), (1, 6, "s"), (2, 5, "other"), (3, 6, "s"), (3, 4, "s"), (4, 7, "s")):
        make_checkpoint(tmp_path / f"attempts/{attempt}", step, signature)
        (tmp_path / f"attempts/{attempt}/attempt.json").write_text("{}")
        (tmp_path / f"attempts/{attempt}/scores.parquet").write_text("")
    (tmp_path / "attempts/4/checkpoints/step-7/state.json").unlink()
    (tmp_path / "spec.json").write_text("{}")
    (tmp_path / "inputs/0-set").mkdir(parents=True)
    (tmp_path / "inputs/0-set/rows.parquet").write_text("")
    for name in ("attempts", "inputs", "spec.json"):
        store.push(tmp_path / name, name)
    remote.fetch(store, tmp_path / "next", 4)
    found = find_checkpoints(tmp_path / "next")
    assert {name for name, files in found.items() if len(files) > 1} == {
        "3/checkpoints/step-6",
        "1/checkpoints/step-6",
        "2/checkpoints/step-5",
    }, "of each signature two: the first one may be damaged"
    others = {str(path.relative_to(tmp_path / "next")) for path in (tmp_path / "next").rglob("*") if path.is_file()}
    assert {name for name in others if "checkpoints" not in name} == {"spec.json", "inputs/0-set/rows.parquet", "attempts/4/attempt.json"}


@pytest.mark.parametrize(("there", "ends"), [((1, 2), False), ((1, 2, 3), True), ((), True)])
def test_a_job_whose_run_went_on_or_is_done_without_it_ends(url: str, tmp_path: Path, there: tuple[int, ...], ends: bool) -> None:
    begin(f"{url}-another", tmp_path, 1)
    for attempt in there:
        begin(url, tmp_path, attempt)
    assert remote.is_superseded(mirror.Mirror(url), 2) is ends


def test_a_store_that_is_not_mounted_ends_no_job_and_begins_none_anew(tmp_path: Path) -> None:
    store = mirror.Mirror(f"file://{tmp_path}/store/run")
    assert not remote.is_superseded(store, 2)
    with pytest.raises(FileNotFoundError, match="is it mounted here"):
        remote.fetch(store, tmp_path / "next", 2)


def test_a_store_in_which_nothing_may_be_deleted_fails_no_training(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_store: mirror.Mirror, _name: str) -> None:
        raise PermissionError

    monkeypatch.setattr(mirror.Mirror, "remove", refuse)
    store, place = mirror.Mirror(url), tmp_path / "attempts/1"
    for step in (1, 2):
        make_checkpoint(place, step)
        remote.bring_back(store, place, 1)
        shutil.rmtree(place / f"checkpoints/step-{step}") if step == 1 else None
    remote.bring_back(store, place, 1)
    assert store.names("attempts/1/checkpoints") == {"step-1", "step-2"}
    assert "step-1 can't be deleted (PermissionError)" in capsys.readouterr().err


class Moving(mirror.Mirror):
    """A store in which an earlier attempt, which is ending, puts newer checkpoints in the place of those that were listed."""

    def __init__(self, url: str, place: Path) -> None:
        super().__init__(url)
        self.place = place

    def pull(self, name: str, folder: Path, *, without: Collection[str] = ()) -> None:
        if name.endswith(spec.STATE) and "step-2" in self.names("attempts/1/checkpoints"):
            for step in (1, 2):
                mirror.Mirror(self.url).remove(f"attempts/1/checkpoints/step-{step}")
                mirror.Mirror(self.url).push(make_checkpoint(self.place, step + 2), f"attempts/1/checkpoints/step-{step + 2}")
        super().pull(name, folder, without=without)


def test_checkpoints_that_are_replaced_while_they_are_fetched_are_looked_for_again(url: str, tmp_path: Path) -> None:
    place = tmp_path / "attempts/1"
    for step in (1, 2):
        make_checkpoint(place, step)
    for attempt in (1, 2):
        begin(url, tmp_path, attempt)
    mirror.Mirror(url).push(place, "attempts/1")
    remote.fetch(Moving(url, place), tmp_path / "next", 2)
    whole = {name for name, files in find_checkpoints(tmp_path / "next").items() if files == set(FILES)}
    assert whole == {"1/checkpoints/step-3", "1/checkpoints/step-4"}


def test_an_attempt_that_is_ending_removes_nothing_that_the_next_one_reads(url: str, tmp_path: Path) -> None:
    store, place = mirror.Mirror(url), tmp_path / "attempts/1"
    begin(url, tmp_path, 1)
    make_checkpoint(place, 1)
    remote.bring_back(store, place, 1)
    shutil.rmtree(place / "checkpoints/step-1")
    make_checkpoint(place, 2)
    begin(url, tmp_path, 2)
    remote.bring_back(store, place, 1)
    assert store.names("attempts/1/checkpoints") == {"step-1", "step-2"}


def test_long_copying_gives_signs_of_life(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SYNC_SECONDS", 0.001)
    told, is_enough = [], threading.Event()

    def tell() -> None:
        remote.note_copying(mirror.Mirror(url), tmp_path / "attempts/1", 1)
        told.append(None)
        if len(told) == 3:
            is_enough.set()

    remote.copy(lambda: assert_set(is_enough), tell)
    mirror.Mirror(url).pull("attempts/1/progress.jsonl", tmp_path / "read")
    phases = [json.loads(line)["phase"] for line in (tmp_path / "read").read_text().splitlines()]
    assert phases == ["copying"] * len(told)
    with pytest.raises(OSError, match="no room"):
        remote.copy(lambda: FailingStore(url).push(tmp_path, "x"), tell)


def assert_set(event: threading.Event) -> None:
    assert event.wait(60)


class FailingStore(mirror.Mirror):
    """A store that is full from the first copy on."""

    def push(self, folder: Path, name: str, *, without: Collection[str] = ()) -> None:
        raise OSError(f"no room for {folder.name} as {name} without {without}")


def test_a_trainer_is_not_left_behind_by_a_store_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    spec.write_spec(tmp_path / "run", fixtures.make_spec(tmp_path / "base", tmp_path / "set"))
    (tmp_path / "run/attempts/1").mkdir(parents=True)
    (tmp_path / "run/attempts/1/attempt.json").write_text("{}")
    started: list[subprocess.Popen[bytes]] = []

    def begin(_command: list[str], **_options: Any) -> subprocess.Popen[bytes]:
        (tmp_path / "here/attempts/1/progress.jsonl").write_text("{}\n")
        started.append(popen(["sleep", "60"]))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", begin)
    with pytest.raises(OSError, match="no room"):
        remote.perform(FailingStore(f"file://{tmp_path}/run"), tmp_path / "here", 1, stopping.Stop())
    assert started[0].returncode == -signal.SIGKILL


def test_a_checkpoint_that_the_trainer_removes_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, store = tmp_path / "attempts/1", mirror.Mirror(f"file://{tmp_path}/store")
    for step in (1, 2):
        (place / f"checkpoints/step-{step}").mkdir(parents=True)
        (place / f"checkpoints/step-{step}/state.json").write_text("{}")
    whole = shutil.copytree

    def copy(source: Path, target: Path, **options: Any) -> Path:
        if source.name == "step-1":
            shutil.rmtree(source)
        return whole(source, target, **options)

    monkeypatch.setattr(shutil, "copytree", copy)
    remote.bring_back(store, place, 1)
    assert store.names("attempts/1/checkpoints") == {"step-2"}
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-2"]
