"""storage.artifacts: a model folder is known by its digest, appears whole or not at all, and a changed byte is noticed."""

import json
import shutil
import threading

import pytest

from storage import artifacts


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"abc")
    (folder / "inner" / "config.json").write_text("{}")
    return folder


def test_the_digest_is_over_paths_sizes_and_contents(model):
    first = artifacts.digest_folder(model)
    assert first == "sha256:9b5604daaf26e7cf8208ab3ef772cfad9e4e8922161ed9fa6459f5bead4e147d"
    copy = shutil.copytree(model, model.with_name("copy"))
    assert artifacts.digest_folder(copy) == first
    (copy / "weights").rename(copy / "weight")
    assert artifacts.digest_folder(copy) != first


def test_a_changed_byte_is_noticed_and_named_with_the_remedy(model):
    digest = artifacts.digest_folder(model)
    artifacts.check(model, digest)
    (model / "weights").write_bytes(b"abd")
    with pytest.raises(artifacts.DigestMismatchError, match="restore it from a backup"):
        artifacts.check(model, digest)


def test_an_empty_folder_has_no_digest(tmp_path):
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no files"):
            artifacts.digest_folder(folder)


def test_an_adapter_has_the_same_digest_on_every_machine(model):
    (model / "adapter_config.json").write_text(json.dumps({"r": 4, "base_model_name_or_path": "/home/ann/base"}))
    artifacts.pin_base(model, "sha256:base")
    here = artifacts.digest_folder(model)
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/base", "r": 4}))
    artifacts.pin_base(model, "sha256:base")
    assert artifacts.digest_folder(model) == here
    assert artifacts.pinned_base(model) == "sha256:base"


def test_publishing_names_a_folder_by_its_digest_and_twice_is_once(model, tmp_path):
    place, digest = artifacts.publish(model, tmp_path / "store")
    assert place.name == digest.removeprefix("sha256:")
    artifacts.check(place, digest)
    assert artifacts.publish(model, tmp_path / "store") == (place, digest)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [place.name]


def test_publishing_again_puts_a_damaged_copy_right(model, tmp_path):
    place, digest = artifacts.publish(model, tmp_path / "store")
    (place / "weights").write_bytes(b"rot")
    artifacts.publish(model, tmp_path / "store")
    artifacts.check(place, digest)


def test_what_is_published_at_once_from_many_sides_is_one_whole_folder(model, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(artifacts.publish(model, tmp_path / "store"))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    artifacts.check(*found[0])
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_a_copy_that_is_cut_short_is_never_visible(model, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "digest_folder", die)
    with pytest.raises(KeyboardInterrupt):
        artifacts.publish(model, tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_nothing_to_publish_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        artifacts.publish(tmp_path / "empty", tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "current.json"
    for content in (b"old", b"new"):
        artifacts.write_atomically(path, content)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
