"""Folders travel through a store, whole or in part."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.mirror import Mirror


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Mirror:
    """A folder on a disk, or in fsspec's own memory, as an object store has them."""
    return Mirror(f"{request.param}://{tmp_path}/store/run/")


def make_folder(folder: Path) -> Path:
    for name in ("spec.json", "attempts/1/result.json", "attempts/1/checkpoints/step-3/state.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_pushed_is_pulled(store: Mirror, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here")
    store.push(folder, "kept")
    store.pull("kept", tmp_path / "there")
    assert list_files(tmp_path / "there") == list_files(folder)
    store.pull("kept/spec.json", tmp_path / "one.json")
    assert (tmp_path / "one.json").read_text() == "spec.json"
    assert store.names("kept/attempts/1") == {"result.json", "checkpoints"}
    assert store.has("kept/spec.json")


def test_what_is_removed_is_gone_and_may_be_removed_again(store: Mirror, tmp_path: Path) -> None:
    store.push(make_folder(tmp_path / "here"), "kept")
    for _ in range(2):
        store.remove("kept/attempts/1/checkpoints/step-3")
        store.remove("kept/spec.json")
    store.pull("", tmp_path / "there")
    assert list_files(tmp_path / "there") == {"kept/attempts/1/result.json"}
    for _ in range(2):
        store.remove("")
    assert store.names("") == set()


def test_parts_are_left_out_and_what_is_not_there_is_nothing(store: Mirror, tmp_path: Path) -> None:
    store.push(make_folder(tmp_path / "here"), "kept", without=("checkpoints",))
    store.pull("kept", tmp_path / "there", without=("result.json",))
    assert list_files(tmp_path / "there") == {"spec.json"}
    store.pull("absent", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert store.names("absent") == set()
    assert not store.has("absent")
