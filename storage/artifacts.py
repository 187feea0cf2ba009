"""Model folders on disk: their digest, and how one is published so that nothing half-written is ever visible.

Files only: the GPU programs import this without a database.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
PARTIAL = ".*.partial"
"""What is not whole yet, see `name_partial`; what a process that is gone has left of it may be deleted."""
Fingerprint = tuple[tuple[str, int, int], ...]


class DigestMismatchError(RuntimeError):
    """A folder's files are not the ones that were registered."""


def digest_folder(folder: Path) -> str:
    """`sha256:` over sorted lines `path NUL size NUL sha256` of every file below `folder`.

    Raises `FileNotFoundError` when the folder is absent or empty.
    """
    files = list_files(folder)
    if not files:
        message = f"{folder} holds no files: nothing to take the digest of"
        raise FileNotFoundError(message)
    return digest_files(folder, files)


def list_files(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def take_fingerprint(files: Iterable[Path]) -> Fingerprint:
    """Names, sizes and times of files, in their order: enough to see that one was written again, without reading any."""
    stats = ((path, path.stat()) for path in files)
    return tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """The same over some of the files below `folder`."""
    lines = sorted(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0{digest_file(path)}" for path in files)
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digest_file(path: Path) -> str:
    """The hex SHA-256 of one file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pin_base(adapter: Path, base_digest: str) -> None:
    """Write the base's digest where PEFT wrote its path, so that the adapter's digest is the same on every machine."""
    path = adapter / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base_digest
    write_atomically(path, json.dumps(config, indent=2, sort_keys=True).encode())


def pinned_base(adapter: Path) -> str:
    """The digest of the base that the adapter was trained on."""
    return str(json.loads((adapter / ADAPTER_CONFIG).read_text())["base_model_name_or_path"])


def publish(folder: Path, store: Path) -> tuple[Path, str]:
    """Copy `folder` into `store` under the name of its digest; returns the place and the digest.

    Publishing the same files twice is one folder, and puts right one whose files were damaged. A copy that was cut short is never visible.
    """
    partial = name_partial(store)
    try:
        shutil.copytree(folder, partial)
        os.utime(partial)  # of now, for what was copied may have lain there for days: an old copy is one that was cut short
        # Of the copy, not of what it was copied from: that may change meanwhile.
        digest = digest_folder(partial)
        place = store / digest.removeprefix("sha256:")
        if place.exists() and digest_folder(place) != digest:
            place.rename(store / f".{uuid.uuid4().hex}.damaged")
        move_into_place(partial, place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place, digest


def name_partial(folder: Path) -> Path:
    """A name of its own in `folder` for what is not whole yet, or not any more."""
    return folder / f".{uuid.uuid4().hex}.partial"


def move_into_place(partial: Path, place: Path) -> bool:
    """Rename a finished folder, everything of it on the disk first; False when another process was there before."""
    for path in (*list_files(partial), partial):
        _sync(path)
    try:
        partial.rename(place)
    except OSError:
        if not place.is_dir():
            raise
        return False
    _sync(place.parent)
    return True


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check(folder: Path, digest: str) -> None:
    """Raise `DigestMismatchError` unless the folder's files are the ones that `digest` names."""
    actual = digest_folder(folder)
    if actual != digest:
        message = f"{folder} has digest {actual}, not the registered {digest}: restore it from a backup"
        raise DigestMismatchError(message)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
