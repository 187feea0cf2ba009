"""A run on a machine that shares no disk with the daemon: `python -m trainers.remote STORE_URL --attempt N`.

What the attempt needs is copied from the store, the trainer works in a folder of this machine, and what it leaves is copied back: signs of
life and checkpoints as they come, the result last. The base must lie on this machine, at the path that the spec names.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent import futures
from pathlib import Path

from storage import mirror
from trainers import spec
from trainers.spec import CHECKPOINTS, CHECKPOINTS_KEPT, PROGRESS, RESULT, STATE
from trainers.stopping import Stop

SYNC_SECONDS, POLL_SECONDS = 5.0, 0.2


def main() -> int:
    """Perform the attempt and bring back what it made."""
    parser = argparse.ArgumentParser(prog="python -m trainers.remote", description="Perform one run whose folder lies in a store.")
    parser.add_argument("url", help="the run folder in the store")
    parser.add_argument("--attempt", type=int, required=True, help="number of the attempt")
    arguments = parser.parse_args()
    stop = Stop()
    stop.listen()
    with tempfile.TemporaryDirectory(prefix="ratchet-") as folder:
        return perform(mirror.Mirror(arguments.url), Path(folder), arguments.attempt, stop)


def perform(store: mirror.Mirror, folder: Path, attempt: int, stop: Stop) -> int:
    """Fetch, train, bring back; returns the trainer's exit status."""
    place = folder / "attempts" / str(attempt)
    copy(lambda: fetch(store, folder, attempt), lambda: note_copying(store, place, attempt))
    asked = spec.read_spec(folder)
    spec.write_spec(folder, move_inputs(asked, folder))
    module = "trainers.torchrun" if "+" in asked.device else "trainers.train"
    command = [sys.executable, "-m", module, str(folder), "--attempt", str(attempt)]
    trainer = subprocess.Popen(command, cwd=Path(spec.__file__).parents[1])  # noqa: S603  our own interpreter and module
    try:
        return accompany(trainer, store, place, attempt, stop)
    finally:
        trainer.kill()  # A store that fails must not leave it behind, at work in a folder that is gone.
        trainer.wait()


def copy(work: Callable[[], None], tell: Callable[[], None]) -> None:
    """Do some copying, which may be of many gigabytes, with `tell` for each `SYNC_SECONDS` that it takes: silence looks like death."""
    with futures.ThreadPoolExecutor(1) as pool:
        copying = pool.submit(work)
        while futures.wait([copying], SYNC_SECONDS).not_done:
            tell()
        copying.result()


def note_copying(store: mirror.Mirror, place: Path, attempt: int) -> None:
    """A sign of life while no trainer is at work."""
    place.mkdir(parents=True, exist_ok=True)
    spec.note_phase(place, "copying")
    push_progress(store, place, attempt)


def push_progress(store: mirror.Mirror, place: Path, attempt: int) -> None:
    """Copy the signs of life."""
    if (place / PROGRESS).exists():
        store.push(place / PROGRESS, f"attempts/{attempt}/{PROGRESS}")


def fetch(store: mirror.Mirror, folder: Path, attempt: int) -> None:
    """Copy what the attempt needs: the spec with what it names, the fence, and the checkpoints that it may go on from.

    Raises `FileNotFoundError` when the store does not show the attempt, as one that is not mounted.
    """
    store.pull("", folder, without=("attempts",))
    about = f"attempts/{attempt}/attempt.json"
    store.pull(about, folder / about)
    if not (folder / about).is_file():
        raise FileNotFoundError(f"{store.url}/{about} is missing: does the store answer, and is it mounted here?")
    listed = None
    while listed != (names := list_checkpoints(store)):  # An earlier attempt that is ending may still put newer ones in their place.
        fetch_checkpoints(store, folder, names)
        listed = names


def fetch_checkpoints(store: mirror.Mirror, folder: Path, names: Iterable[str]) -> None:
    """Copy of each signature as many whole checkpoints as are kept: the trainer goes on from the second where the first is damaged."""
    fetched: Counter[str] = Counter()
    for name in names:
        store.pull(f"{name}/{STATE}", folder / name / STATE)
        with contextlib.suppress(FileNotFoundError, ValueError):  # no whole one
            signature = json.loads((folder / name / STATE).read_bytes())["signature"]
            if fetched[signature] < CHECKPOINTS_KEPT:
                store.pull(name, folder / name)
                fetched[signature] += 1


def list_checkpoints(store: mirror.Mirror) -> list[str]:
    """The checkpoints of all attempts, the furthest first; of equal ones the latest attempt's."""
    folders = [f"attempts/{number}/{CHECKPOINTS}" for number in sorted(list_attempts(store), reverse=True)]
    names = [f"{folder}/{step}" for folder in folders for step in store.names(folder)]
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]), reverse=True)


def accompany(trainer: subprocess.Popen[bytes], store: mirror.Mirror, place: Path, attempt: int, stop: Stop) -> int:
    """Bring back what the trainer leaves until it has ended; returns its exit status."""
    synced_at, is_told = 0.0, False

    def pass_on() -> None:
        nonlocal is_told
        if stop.is_requested and not is_told:
            trainer.send_signal(signal.SIGTERM)
            is_told = True

    def tell() -> None:
        pass_on()
        push_progress(store, place, attempt)

    while trainer.poll() is None:
        time.sleep(POLL_SECONDS)
        pass_on()
        if time.monotonic() - synced_at >= SYNC_SECONDS:
            synced_at = time.monotonic()
            if is_superseded(store, attempt):
                return spec.EXIT_RESUMABLE
            tell()
            copy(lambda: bring_back(store, place, attempt), tell)
    if not is_superseded(store, attempt):
        copy(lambda: bring_back_all(store, place, attempt), lambda: note_copying(store, place, attempt))
    return trainer.poll() or spec.EXIT_DONE


def bring_back_all(store: mirror.Mirror, place: Path, attempt: int) -> None:
    """Copy what an attempt that has ended leaves, the result last."""
    bring_back(store, place, attempt)
    store.push(place, f"attempts/{attempt}", without=(RESULT, CHECKPOINTS))
    if (place / RESULT).exists():
        store.push(place / RESULT, f"attempts/{attempt}/{RESULT}")


def bring_back(store: mirror.Mirror, place: Path, attempt: int) -> None:
    """Copy checkpoints that the store has not yet; then remove those that the trainer has removed, unless a newer attempt reads them.

    Whenever this is cut off, the newest checkpoint that was whole in the store is still there, or a newer one is.
    """
    name = f"attempts/{attempt}/{CHECKPOINTS}"
    there, here = store.names(name), {path.name for path in (place / CHECKPOINTS).glob("step-*")}
    if [step for step in here if step in there or push_checkpoint(store, place / CHECKPOINTS / step, f"{name}/{step}")]:
        for step in there - here:
            if not is_superseded(store, attempt):
                remove(store, f"{name}/{step}")


def remove(store: mirror.Mirror, name: str) -> None:
    """Delete a folder of the store, where that is allowed: it only takes room."""
    try:
        store.remove(name)
    except Exception as error:  # noqa: BLE001  each kind of store has its own
        sys.stderr.write(f"{store.url}/{name} can't be deleted ({type(error).__name__}): allow it, or delete it by hand\n")


def push_checkpoint(store: mirror.Mirror, checkpoint: Path, name: str) -> bool:
    """Copy a checkpoint to `name` in the store; False when the trainer has removed it meanwhile, for there are two newer ones."""
    kept = checkpoint.with_name(f".{checkpoint.name}")
    try:
        shutil.copytree(checkpoint, kept, dirs_exist_ok=True)
        store.push(kept, name, without=(STATE,))
        store.push(kept / STATE, f"{name}/{STATE}")
    except (shutil.Error, FileNotFoundError):
        if checkpoint.is_dir():
            raise
        return False
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    return True


def is_superseded(store: mirror.Mirror, attempt: int) -> bool:
    """Whether the daemon has begun a newer attempt, or has deleted the run's folder."""
    return max(list_attempts(store), default=attempt) > attempt or store.is_gone()


def list_attempts(store: mirror.Mirror) -> list[int]:
    """The numbers of the attempts that the store knows."""
    return [int(name) for name in store.names("attempts") if name.isdigit()]


def move_inputs(asked: spec.Spec, folder: Path) -> spec.Spec:
    """The spec with the inputs where they lie now: relative paths count from the run folder."""
    return spec.map_inputs(asked, lambda path: path if path.is_absolute() else folder / path)


if __name__ == "__main__":
    sys.exit(main())
