"""One run from its spec to its result: `python -m trainers.train RUN_DIR`, by hand or started by the daemon.

Exit status: 0 done, 1 failed, 2 refused before any weights were loaded (says why), 75 stopped and resumable.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from storage import artifacts, snapshots
from trainers import attempts, bases, checks, data, loop, packing, score
from trainers.attempts import Attempt, Progress
from trainers.data import Example, LeftOut, Lessons
from trainers.methods import lora, pretrain
from trainers.spec import EXIT_DONE, EXIT_REFUSED, EXIT_RESUMABLE, Model, Spec, SpecRefusedError, read_spec
from trainers.stopping import Stop, StoppedError

EXIT_FAILED = 1
SCORES = "scores.parquet"
# Rows between two signs of life while scoring.
SCORED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Work:
    """What every stage of a run needs: what is asked, where it is done, and the bases that this process holds."""

    spec: Spec
    attempt: Attempt
    progress: Progress
    stop: Stop
    held: bases.Bases
    tokenizer: Any

    @property
    def row_limit(self) -> int:
        """How many tokens a row may have."""
        return data.row_limit(self.spec.options, bases.read_context(self.spec.base))

    def load_base(self) -> Any:
        """The base's weights; from here on a run is no longer refused but fails."""
        self.progress.write("loading", now=True)
        return self.held.load(self.spec.base, self.spec.device)[0]


@dataclass(frozen=True, slots=True)
class Sheet:
    """What a model is asked about one score set: a prompt for each row that has one."""

    name: str
    row_ids: list[str]
    prompts: list[str]
    cut: int
    left_out: tuple[LeftOut, ...]


def main() -> int:
    """Perform the run that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m trainers.train", description="Perform one run from its spec to its result.")
    parser.add_argument("run_dir", type=Path, help="a folder with spec.json")
    parser.add_argument("--attempt", type=int, help="number of the attempt (default: the latest)")
    arguments = parser.parse_args()
    stop = Stop()
    stop.listen()
    status, sentence = run(arguments.run_dir, arguments.attempt, bases.Bases(), stop)
    sys.stderr.write(sentence + "\n")
    return status


def run(run_dir: Path, number: int | None, held: bases.Bases, stop: Stop) -> tuple[int, str]:
    """Perform one run; returns the exit status and a sentence about how it ended."""
    attempt = attempts.open_attempt(run_dir, number)
    if attempt.is_done():
        return EXIT_DONE, f"done before: {attempt.folder / attempts.RESULT}"
    try:
        return run_attempt(attempt, held, stop)
    except (StoppedError, attempts.SupersededError) as error:
        return EXIT_RESUMABLE, str(error)


def run_attempt(attempt: Attempt, held: bases.Bases, stop: Stop) -> tuple[int, str]:
    """Perform one attempt and publish how it ended, a refusal or a failure too."""
    started, run_id = time.monotonic(), attempt.run_dir.name
    try:
        spec = read_spec(attempt.run_dir)
        run_id = spec.run_id
        found = perform(spec, attempt, held, stop)
    except SpecRefusedError as error:
        attempt.publish("refused", run_id, reason=str(error))
        return EXIT_REFUSED, f"refused: {error}"
    except (loop.DivergedError, score.LogitsNotFiniteError, torch.OutOfMemoryError) as error:
        attempt.publish("failed", run_id, reason=str(error))
        return EXIT_FAILED, f"failed: {error}"
    attempt.publish("done", run_id, **found, seconds=round(time.monotonic() - started, 3))
    return EXIT_DONE, f"done: {attempt.folder / attempts.RESULT}"


def perform(spec: Spec, attempt: Attempt, held: bases.Bases, stop: Stop) -> dict[str, Any]:
    """Check the spec and do what it asks; returns what `result.json` says about it."""
    if spec.threads:
        torch.set_num_threads(spec.threads)
    tokenizer = checks.check_spec(spec, held)
    progress = Progress(attempt)
    work = Work(spec, attempt, progress, stop, held, tokenizer)
    try:
        if spec.kind == "score":
            sheets = read_sheets(work)
            return score_models(work, work.load_base(), list(checks.scored_models(spec)), sheets) | describe_left_out(sheets)
        return train_model(work) if spec.method == "pretrain" else train_adapter(work)
    finally:
        progress.close()


def train_adapter(work: Work) -> dict[str, Any]:
    """Train the candidate's adapter on the snapshot, calibrate it on dev, and let it and the others answer the score sets."""
    spec, options = work.spec, work.spec.options
    lessons, sheets = read_lessons(work), read_sheets(work)
    examples, dev = ([case.example for case in cases] for cases in (lessons.train, lessons.dev))
    base = work.load_base()
    torch.manual_seed(spec.seed)
    model = lora.begin(base, options.lora, spec.init_adapter)
    try:
        counters = make_loop(work, model, examples, dev).run()
        place = Path("adapters") / checks.the_candidate(spec).name
        digest = lora.save_adapter(model, work.attempt.folder / place, spec.base.digest)
        dev_loss = measure_dev_loss(model, dev, options.max_tokens)
    finally:
        base = lora.end(model)
    trained = checks.the_candidate(spec).model_copy(update={"adapter": work.attempt.folder / place, "adapter_digest": digest})
    temperature, dev_accuracy = calibrate(work, base, trained, lessons)
    trained = trained.model_copy(update={"temperature": temperature})
    return {
        "adapter": {"path": place.as_posix(), "digest": digest},
        "temperature": temperature,
        "training": describe_training(work, counters, len(examples))
        | {
            "dev_rows": len(dev),
            "dev_loss": dev_loss,
            "dev_accuracy": dev_accuracy,
            "prompts_cut": lessons.prompts_cut,
            "rationales_left_out": lessons.rationales_left_out,
        },
        **score_models(work, base, [trained, *spec.others], sheets),
        **describe_left_out(sheets, lessons.left_out),
    }


def train_model(work: Work) -> dict[str, Any]:
    """Train all weights on plain texts and write them as a checkpoint of their own."""
    examples = data.read_texts(checks.the_texts(work.spec), work.tokenizer, work.row_limit)
    if not examples:
        raise SpecRefusedError(f"{work.spec.texts} holds no texts: there is nothing to learn from")
    model = pretrain.begin(work.load_base())
    torch.manual_seed(work.spec.seed)
    counters = make_loop(work, model, examples, []).run()
    digest = pretrain.save_model(model, work.tokenizer, work.attempt.folder / "model")
    return {"model": {"path": "model", "digest": digest}, "training": describe_training(work, counters, len(examples))}


def read_lessons(work: Work) -> Lessons:
    """The snapshot's train and dev rows as tokens. Raises `SpecRefusedError` when there is nothing to learn from."""
    spec, candidate = work.spec, checks.the_candidate(work.spec)
    lessons = data.read_lessons(
        checks.the_dataset(spec),
        work.tokenizer,
        candidate.prompt,
        candidate.labels,
        spec.options,
        limit=work.row_limit,
        warm=spec.init_adapter is not None,
        seed=spec.seed,
    )
    note_left_out(work, lessons.left_out)
    if not lessons.train:
        raise SpecRefusedError(f"dataset {spec.dataset} has no rows to train on: import history or collect labels first")
    return lessons


def make_loop(work: Work, model: Any, examples: Sequence[Example], dev: Sequence[Example]) -> loop.Loop:
    """The training loop of this run."""
    spec = work.spec
    return loop.Loop(model, examples, dev, spec.options, spec.seed, sign(spec), work.attempt, work.progress, work.stop)


def sign(spec: Spec) -> str:
    """A digest of all that decides about the weights: a checkpoint with another one belongs to another run."""
    content = snapshots.read_manifest(spec.dataset)["root"] if spec.dataset else artifacts.digest_file(checks.the_texts(spec))
    # A run may go on elsewhere, and what is scored afterwards doesn't change what was learned.
    asked = spec.model_dump_json(exclude={"device", "threads", "others", "score_sets"})
    return hashlib.sha256(f"{asked}\n{content}".encode()).hexdigest()


def measure_dev_loss(model: Any, dev: Sequence[Example], max_tokens: int) -> float | None:
    """The mean loss on the dev split, None where there is none."""
    if not dev:
        return None
    with packing.packed_attention(model):
        return loop.mean_loss(model, dev, max_tokens)


def describe_training(work: Work, counters: loop.Counters, rows: int) -> dict[str, Any]:
    """The figures of the training loop."""
    steps_per_epoch = -(-rows // work.spec.options.batch_rows)
    epochs = counters.step / steps_per_epoch
    return {
        "rows": rows,
        "tokens": counters.tokens,
        "supervised_tokens": counters.graded_tokens,
        "steps": counters.step,
        "epochs": round(epochs, 3),
        "final_loss": counters.final_loss,
        "seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.tokens / counters.seconds, 1),
        "rows_per_second": round(rows * epochs / counters.seconds, 1),
    }


def calibrate(work: Work, base: Any, trained: Model, lessons: Lessons) -> tuple[float, float | None]:
    """The candidate's temperature and accuracy on dev; 1 and None where there is no dev split."""
    if not lessons.dev:
        return 1.0, None
    logprobs = answer(work, base, trained, [case.prompt for case in lessons.dev])
    answers = np.array([case.answer for case in lessons.dev])
    return score.fit_temperature(logprobs, answers), float((logprobs.argmax(axis=1) == answers).mean())


def read_sheets(work: Work) -> list[list[Sheet]]:
    """What each model is asked: a sheet for each score set, in the order of `checks.scored_models`; rendered before weights are loaded.

    Raises `SpecRefusedError` when a run that only scores has nothing left to ask.
    """
    sets = {score_set.name: data.read_score_set(score_set) for score_set in work.spec.score_sets}
    known: dict[tuple[str, ...], list[Sheet]] = {}  # models that are asked in the same words share their sheets
    asked = []
    for model in checks.scored_models(work.spec):
        key = (model.prompt.text, *model.labels)
        if key not in known:
            known[key] = [read_sheet(work, model, name, *rows) for name, rows in sets.items()]
        asked.append(known[key])
    sheets = [sheet for some in asked for sheet in some]
    left_out = [one for sheet in sheets for one in sheet.left_out]
    note_left_out(work, left_out)
    if work.spec.kind == "score" and left_out and not any(sheet.prompts for sheet in sheets):
        data.check_left_out(left_out[0], len(left_out[0].row_ids), 0)
    return asked


def read_sheet(work: Work, model: Model, name: str, row_ids: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> Sheet:
    """What a model is asked about one score set."""
    limit = data.prompt_limit(work.tokenizer, model.labels, work.row_limit)
    rendered = data.render_prompts(work.tokenizer, model.prompt, inputs, [limit] * len(inputs))
    return Sheet(
        name=name,
        row_ids=[row_ids[index] for index in rendered.texts],
        prompts=list(rendered.texts.values()),
        cut=rendered.cut,
        left_out=data.list_left_out(name, row_ids, rendered),
    )


def note_left_out(work: Work, left_out: Sequence[LeftOut]) -> None:
    """Tell of rows without a prompt as soon as that is known."""
    for one in left_out:
        work.progress.write("rendering", now=True, set=one.set, rows_left_out=len(one.row_ids), first_left_out=one.row_ids[0])


def describe_left_out(asked: Sequence[Sequence[Sheet]], lessons: Sequence[LeftOut] = ()) -> dict[str, Any]:
    """The rows that were left out because no prompt can be made of them; each set is told once for models asked in the same words."""
    distinct = {id(sheet): sheet for some in asked for sheet in some}.values()
    return {"left_out": [one.describe() for one in (*lessons, *(one for sheet in distinct for one in sheet.left_out))]}


def score_models(work: Work, base: Any, models: Sequence[Model], asked: Sequence[Sequence[Sheet]]) -> dict[str, Any]:
    """Let every model answer its sheets and write `scores.parquet`."""
    scores: list[score.Score] = []
    for model, sheets in zip(models, asked, strict=True):
        for sheet in sheets:
            logprobs = answer(work, base, model, sheet.prompts)
            scores += score.judge(sheet.name, sheet.row_ids, model.name, model.labels, logprobs, model.temperature)
    score.write_scores(work.attempt.folder / SCORES, scores)
    return {"scores": SCORES, "scored_rows": len(scores), "scored_prompts_cut": sum(sheet.cut for sheets in asked for sheet in sheets)}


def answer(work: Work, base: Any, model: Model, prompts: Sequence[str]) -> np.ndarray:
    """The model's label log-probabilities for each prompt, with signs of life in between."""
    worn = score.load_adapter(base, "scored", model.adapter) if model.adapter else base
    parts = [np.empty((0, len(model.labels)))]
    try:
        for start in range(0, len(prompts), SCORED_AT_ONCE):
            work.stop.check()
            work.progress.write("scoring", model=model.name, rows=start, of=len(prompts))
            some = prompts[start : start + SCORED_AT_ONCE]
            parts.append(score.score_prompts(worn, work.tokenizer, some, model.labels, max_tokens=work.spec.options.max_tokens))
    finally:
        if model.adapter:
            score.drop_adapter(worn, "scored")
    return np.concatenate(parts)


if __name__ == "__main__":
    sys.exit(main())
