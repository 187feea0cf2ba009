"""A run on a machine that shares no disk with the daemon: `python -m trainers.remote STORE_URL --attempt N`.

The run folder is copied from the store, the trainer works in a folder of this machine, and what it leaves is copied back: signs of life
and checkpoints as they come, the result last. The base must lie on this machine, at the path that the spec names.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from storage import mirror
from trainers import spec
from trainers.attempts import PROGRESS, RESULT
from trainers.stopping import Stop

SYNC_SECONDS, POLL_SECONDS = 5.0, 0.2
CHECKPOINTS = "checkpoints"


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
    store.pull("", folder)
    asked = spec.read_spec(folder)
    spec.write_spec(folder, move_inputs(asked, folder))
    module = "trainers.torchrun" if "+" in asked.device else "trainers.train"
    command = [sys.executable, "-m", module, str(folder), "--attempt", str(attempt)]
    trainer = subprocess.Popen(command, cwd=Path(spec.__file__).parents[1])  # noqa: S603  our own interpreter and module
    try:
        return accompany(trainer, store, folder / "attempts" / str(attempt), attempt, stop)
    finally:
        trainer.kill()  # A store that fails must not leave it behind, at work in a folder that is gone.
        trainer.wait()


def accompany(trainer: subprocess.Popen[bytes], store: mirror.Mirror, place: Path, attempt: int, stop: Stop) -> int:
    """Bring back what the trainer leaves until it has ended; returns its exit status."""
    synced_at, is_told = 0.0, False
    while trainer.poll() is None:
        time.sleep(POLL_SECONDS)
        if stop.is_requested and not is_told:
            trainer.send_signal(signal.SIGTERM)
            is_told = True
        if time.monotonic() - synced_at >= SYNC_SECONDS:
            synced_at = time.monotonic()
            bring_back(store, place, attempt)
            if is_superseded(store, attempt):
                return spec.EXIT_RESUMABLE
    if not is_superseded(store, attempt):
        bring_back(store, place, attempt)
        store.push(place, f"attempts/{attempt}", without=(RESULT, CHECKPOINTS))
        if (place / RESULT).exists():
            store.push(place / RESULT, f"attempts/{attempt}/{RESULT}")
    return trainer.poll() or spec.EXIT_DONE


def bring_back(store: mirror.Mirror, place: Path, attempt: int) -> None:
    """Copy signs of life, and whole checkpoints that the store has not yet."""
    if (place / PROGRESS).exists():
        store.push(place / PROGRESS, f"attempts/{attempt}/{PROGRESS}")
    there = store.names(f"attempts/{attempt}/{CHECKPOINTS}")
    for checkpoint in (place / CHECKPOINTS).glob("step-*"):
        if checkpoint.name in there:
            continue
        kept = place / CHECKPOINTS / f".{checkpoint.name}"
        try:
            shutil.copytree(checkpoint, kept, dirs_exist_ok=True)
            store.push(kept, f"attempts/{attempt}/{CHECKPOINTS}/{checkpoint.name}")
        except (shutil.Error, FileNotFoundError):
            if checkpoint.is_dir():
                raise  # Otherwise the trainer has removed it meanwhile, for there are two newer ones.
        finally:
            shutil.rmtree(kept, ignore_errors=True)


def is_superseded(store: mirror.Mirror, attempt: int) -> bool:
    """Whether the daemon has begun a newer attempt."""
    return max((int(name) for name in store.names("attempts") if name.isdigit()), default=0) > attempt


def move_inputs(asked: spec.Spec, folder: Path) -> spec.Spec:
    """The spec with the inputs where they lie now: relative paths count from the run folder."""
    return spec.map_inputs(asked, lambda path: path if path.is_absolute() else folder / path)


if __name__ == "__main__":
    sys.exit(main())
