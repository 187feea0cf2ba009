"""`ratchet init`: a folder to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder; made when it is absent.")]


class AlreadyThereError(FileExistsError):
    """The folder has a configuration, which stays as it is."""


class FolderRefusedError(OSError):
    """The folder can't be made, or not written to."""


def init(folder: Folder) -> None:
    """Write a commented `ratchet.toml`, a prompt template, the folders and the database; it works as it is."""
    from daemon import config  # noqa: PLC0415 — `ratchet --help` needs none of it

    target = folder / config.FILE
    if target.exists():
        raise AlreadyThereError(f"{target} is there already and stays as it is: edit it, or name another folder")
    try:
        _make_home(folder, target)
    except OSError as error:
        problem = f"{error.filename or folder} can't be made ({error.strerror or error})"
        raise FolderRefusedError(f"{problem}: name a folder where you may write") from error
    step = "" if folder.samefile(".") else f"`cd {folder}` and "
    typer.echo(f"Wrote {target}. Next: edit it, then {step}`ratchet doctor`.")


def _make_home(folder: Path, target: Path) -> None:
    """Fill the folder. The configuration gets its name last, so that an init that failed can be tried again."""
    from daemon import config  # noqa: PLC0415 — `ratchet --help` needs none of it
    from storage import db, schema  # noqa: PLC0415

    if not folder.exists():
        folder.mkdir(parents=True)
        folder.chmod(0o700)  # claims will lie here
    _write_template(folder / "prompts" / "adjudication.j2")
    partial = _write_template(folder / f".{config.FILE}.partial", mode=0o600)  # it may come to hold a password
    settings = config.load(partial)
    places = settings.storage
    for place in (places.snapshots, places.adapters, places.bases, places.runs, settings.home / "models"):
        place.mkdir(parents=True, exist_ok=True)
    engine = db.open_engine(settings.database.url)
    try:
        schema.upgrade(engine)
    finally:
        engine.dispose()
    partial.rename(target)


def _write_template(path: Path, mode: int = 0o666) -> Path:
    """Write the shipped file of that name, unless the user has written one there."""
    name = path.name.removeprefix(".").removesuffix(".partial")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode)
        path.write_bytes((resources.files("daemon") / "templates" / name).read_bytes())
    return path
