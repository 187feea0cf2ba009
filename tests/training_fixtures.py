"""A small run folder with a real dataset: claims whose verdict follows from the plan and the treatment."""

import importlib
import json
import multiprocessing
import multiprocessing.process
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage import artifacts, snapshots
from tests.model_fixtures import PROMPT, claim
from trainers import bases, spec, stopping, train

LABELS = ("APPROVED", "DENIED")
OPTIONS = {"learning_rate": 5e-3, "epochs": 3, "batch_rows": 8, "max_tokens": 512, "checkpoint_steps": 3}


def truth(number: int) -> str:
    """The verdict on a made-up claim."""
    return LABELS[0] if claim(number)["plan"] == "HMO" else LABELS[1]


def row(number: int, split: str, **changes: str | None) -> snapshots.Row:
    """One labelled claim."""
    fields = {
        "row_id": f"row-{number}",
        "group_digest": f"group-{number}",
        "split": split,
        "origin": "import",
        "label_id": f"label-{number}",
        "input": json.dumps(claim(number)),
        "attributes": "{}",
        "answer": truth(number),
        "rationale": None,
        "answered_at": "2026-01-01T00:00:00+00:00",
    }
    return snapshots.Row(**(fields | changes))


def dataset(folder: Path, train: int = 48, dev: int = 12, gold: int = 6) -> Path:
    """A snapshot of imported rows; the numbers of train, dev and gold rows follow each other."""
    splits = ["train"] * train + ["dev"] * dev + ["gold"] * gold
    snapshots.write(folder, [row(number, split) for number, split in enumerate(splits)], {})
    return folder


def score_set(path: Path, numbers: range) -> spec.ScoreSet:
    """Claims to score, as the daemon writes them."""
    table = {"row_id": [str(n) for n in numbers], "input": [json.dumps(claim(n)) for n in numbers]}
    pq.write_table(pa.table(table), path)
    return spec.ScoreSet(name=path.stem, path=path)


def model(name: str = "toy-v1.0", **changes: object) -> spec.Model:
    """A model that answers with our prompt and labels."""
    return spec.Model(name=name, prompt=spec.Prompt(text=PROMPT), labels=LABELS).model_copy(update=changes)


def base_of(folder: Path) -> spec.Base:
    """A checkpoint folder with its digest."""
    return spec.Base(path=folder, digest=artifacts.digest_folder(folder))


def make_spec(base: Path, data: Path, options: dict[str, object] | None = None, **changes: object) -> spec.Spec:
    """A LoRA run on a dataset folder."""
    fields = {
        "run_id": "run-1",
        "kind": "train",
        "agent": "toy",
        "base": base_of(base),
        "dataset": data,
        "candidate": model(),
        "options": spec.Options(**(OPTIONS | (options or {}))),
        "threads": 1,
    }
    return spec.Spec(**(fields | changes))


def perform(run_dir: Path, asked: spec.Spec, held: bases.Bases | None = None) -> int:
    """Write the spec and perform the run in this process."""
    spec.write_spec(run_dir, asked)
    return train.run(run_dir, None, held or bases.Bases(), stopping.Stop())[0]


class NoWeights(bases.Bases):
    """Fails when weights are loaded."""

    def load(self, base: spec.Base, device: str, *, in_4bit: bool = False) -> tuple[object, object]:
        """There is nothing to load yet."""
        raise AssertionError((base, device, in_4bit))


def refuse(run_dir: Path, asked: spec.Spec) -> str:
    """Perform a run that must be refused before weights are loaded; returns the reason."""
    assert perform(run_dir, asked, NoWeights()) == spec.EXIT_REFUSED
    return result(run_dir)["reason"]


def result(run_dir: Path, attempt: int = 1) -> dict:
    """The published result of an attempt."""
    return json.loads((run_dir / "attempts" / str(attempt) / "result.json").read_text())


def progress(run_dir: Path, attempt: int = 1) -> list[dict]:
    """The lines of progress that are there."""
    path = run_dir / "attempts" / str(attempt) / "progress.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], process: multiprocessing.process.BaseProcess) -> None:
    """Wait until something is there that a running process makes."""
    deadline = time.monotonic() + 90
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def last_step(run_dir: Path) -> int:
    """The step of the furthest checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in run_dir.glob("attempts/*/checkpoints/step-*")), default=0)


# Importing torch and its kin takes seconds: one server does it once and forks every program from there.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trainers.tiny", "bitsandbytes"])


def start(module: str, *arguments: object, said: Path) -> multiprocessing.process.BaseProcess:
    """Start one of the trainers' programs in a process of its own that can be killed; what it says goes to a file."""
    process = FORKS.Process(target=run_program, args=(module, [str(argument) for argument in arguments], said), daemon=True)
    process.start()
    return process


def run_program(module: str, arguments: list[str], said: Path) -> None:
    """What `python -m MODULE ARGUMENTS` does."""
    sys.argv = [module, *arguments]
    with said.open("w") as sys.stderr:
        sys.exit(importlib.import_module(module).main())
