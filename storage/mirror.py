"""Folders of this machine in a store that others reach: any URL that fsspec knows, such as `file:///mnt/shared/runs` or `s3://bucket/runs`.

Files and bytes only: what they mean is known to those who write and read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec


class Mirror:
    """One folder of a store."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._system: Any
        self._system, self._root = fsspec.core.url_to_fs(self.url)

    def push(self, folder: Path, name: str, *, without: Collection[str] = ()) -> None:
        """Copy a file or a folder to `name` in the store; of a folder, files and folders called so are left out."""
        if folder.is_file():
            self._put(folder, name)
            return
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            relative = path.relative_to(folder)
            if not set(relative.parts) & set(without):
                self._put(path, f"{name}/{relative.as_posix()}")

    def pull(self, name: str, folder: Path, *, without: Collection[str] = ()) -> None:
        """Copy the file or the folder `name` of the store to `folder`; nothing when it is not there."""
        self._system.invalidate_cache()
        place = self._place(name)
        for path in self._system.find(place):
            relative = PurePosixPath(path).relative_to(PurePosixPath(place))
            if not set(relative.parts) & set(without):
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                self._system.get_file(path, str(partial))
                partial.replace(target)

    def remove(self, name: str) -> None:
        """Delete the file or the folder `name` of the store; nothing when it is not there."""
        self._system.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self._place(name), recursive=True)

    def names(self, name: str) -> set[str]:
        """What lies in the folder `name` of the store."""
        self._system.invalidate_cache()
        place = self._place(name)
        return {PurePosixPath(path).name for path in self._system.ls(place, detail=False)} if self._system.isdir(place) else set()

    def is_gone(self) -> bool:
        """Whether the folder was deleted: it is not there, and that in which it lay is. A store that does not answer has lost nothing."""
        self._system.invalidate_cache()
        around = str(PurePosixPath(self._root).parent)
        return bool(self._system.exists(around)) and not self._system.exists(self._root)

    def has(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        self._system.invalidate_cache()
        return bool(self._system.exists(self._place(name)))

    def _place(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _put(self, path: Path, name: str) -> None:
        place = self._place(name)
        self._system.makedirs(str(PurePosixPath(place).parent), exist_ok=True)
        self._system.put_file(str(path), place)
