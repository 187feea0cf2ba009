"""One run from its spec to its result: `python -m trainers.train RUN_DIR`, by hand or started by the daemon.

Exit status: 0 done, 1 failed, 2 refused before any weights were loaded (says why), 75 stopped and resumable.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from storage import artifacts, snapshots
from trainers import (
    answers,
    attempts,
    base_config,
    bases,
    checkpoints,
    checks,
    data,
    loop,
    memory,
    optimizers,
    ranks,
    score,
    sheets,
    texts,
)
from trainers.attempts import Attempt, Progress
from trainers.data import Example, Lessons
from trainers.methods import full, lora
from trainers.spec import EXIT_DONE, EXIT_REFUSED, EXIT_RESUMABLE, RESULT, Base, Model, Spec, SpecRefusedError, read_device, read_spec
from trainers.stopping import Stop, StoppedError
from trainers.work import Work

EXIT_FAILED = 1


def main() -> int:
    """Perform the run that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m trainers.train", description="Perform one run from its spec to its result.")
    parser.add_argument("run_dir", type=Path, help="a folder with spec.json")
    parser.add_argument("--attempt", type=int, help="number of the attempt (default: the latest)")
    arguments = parser.parse_args()
    stop = Stop()
    stop.listen()
    with ranks.joined(read_device(arguments.run_dir)) as together:
        status, sentence = run(arguments.run_dir, arguments.attempt, bases.Bases(), stop, together)
    sys.stderr.write(sentence + "\n")
    return status


def run(run_dir: Path, number: int | None, held: bases.Bases, stop: Stop, together: ranks.Ranks = ranks.ALONE) -> tuple[int, str]:
    """Perform one run, or this process's part of it; returns the exit status and a sentence about how it ended."""
    attempt = attempts.open_attempt(run_dir, number, is_silent=not together.is_first)
    if attempt.is_done():
        return EXIT_DONE, f"done before: {attempt.folder / RESULT}"
    try:
        attempt.check_current()  # Who was slow to begin may find another at work on the same device.
        return run_attempt(attempt, held, stop, together)
    except (StoppedError, attempts.SupersededError) as error:
        return EXIT_RESUMABLE, str(error)


def run_attempt(attempt: Attempt, held: bases.Bases, stop: Stop, together: ranks.Ranks) -> tuple[int, str]:
    """Perform one attempt and publish how it ended, a refusal or a failure too."""
    started, run_id = time.monotonic(), attempt.run_dir.name
    try:
        spec = read_spec(attempt.run_dir)
        run_id = spec.run_id
        found = perform(spec.model_copy(update={"device": together.pick_device(spec.device)}), attempt, held, stop, together)
    except SpecRefusedError as error:
        attempt.publish("refused", run_id, reason=str(error))
        return EXIT_REFUSED, f"refused: {error}"
    except (loop.DivergedError, score.LogitsNotFiniteError, torch.OutOfMemoryError) as error:
        attempt.publish("failed", run_id, reason=str(error))
        return EXIT_FAILED, f"failed: {error}"
    attempt.publish("done", run_id, **found, seconds=round(time.monotonic() - started, 3))
    return EXIT_DONE, f"done: {attempt.folder / RESULT}"


def perform(spec: Spec, attempt: Attempt, held: bases.Bases, stop: Stop, together: ranks.Ranks) -> dict[str, Any]:
    """Check the spec and do what it asks; returns what `result.json` says about it."""
    if together.size > 1 and spec.options.optimizer_in_backward:
        raise SpecRefusedError("optimizer_in_backward keeps no gradients to sum over several devices: use one, or leave it out")
    if spec.threads:
        torch.set_num_threads(spec.threads)
    with contextlib.closing(Progress(attempt)) as progress:
        progress.write("checking", now=True)
        with progress.alive():
            tokenizer = checks.check_spec(spec, held)
        work = Work(spec, attempt, progress, stop, held, tokenizer, memory.Budget(spec.options.max_tokens), together)
        memory.reset_peak(spec.device)
        found = train_candidate(work) if spec.kind == "train" else score_only(work)
        return found | {"memory": describe_memory(work)}


def describe_memory(work: Work) -> dict[str, Any]:
    """What the run was expected to take and what it took, side by side, and how often it had to halve its passes."""
    budget = work.budget
    return {
        "plan": work.spec.plan,
        "calibrated_bytes": budget.calibrated_bytes,
        "peak_bytes": memory.read_peak(work.spec.device),
        "max_tokens": budget.tokens,
        "halved": budget.halved,
    }


def score_only(work: Work) -> dict[str, Any]:
    """Let the models answer the score sets."""
    models, asked = list(checks.scored_models(work.spec)), sheets.read_sheets(work)
    return answers.score_models(work, models, asked) | sheets.describe_left_out(asked)


def train_candidate(work: Work) -> dict[str, Any]:
    """Train by the spec's method, calibrate what came of it on dev, and let it and the others answer the score sets."""
    spec, options = work.spec, work.spec.options
    lessons, asked = read_lessons(work), sheets.read_sheets(work)
    general = read_texts(work, spec.general_texts) if spec.general_texts else None  # forgetting is measured there, whatever the method
    examples = read_corpus(work, general) if options.method == "pretrain" else data.list_examples(lessons.train)
    dev = data.list_examples(lessons.dev)
    model = begin_training(work)
    rounding = optimizers.name_rounding(checkpoints.trained_parameters(model).values())
    try:
        counters = make_loop(work, model, examples, dev).run()
        if not work.together.is_first:
            return {}
        dev_loss = work.measure_loss(model, dev)
        made = save_trained(work, model)
    finally:
        end_training(work, model)
        del model  # There may be no room for it beside the base that is read to score.
    found = {
        **made.describe(),
        "training": describe_training(work, counters, examples)
        | {
            "rounding": rounding,
            "dev_rows": len(dev),
            "dev_loss": dev_loss,
            "dev_accuracy": None,
            "prompts_cut": lessons.prompts_cut,
            "rationales_left_out": lessons.rationales_left_out,
        },
    }
    if spec.candidate is None:
        return found
    trained = made.wear(spec.candidate)
    temperature, found["training"]["dev_accuracy"] = calibrate(work, trained, lessons)
    trained = trained.model_copy(update={"temperature": temperature})
    scores = answers.score_models(work, [trained, *spec.others], asked)
    return found | {"temperature": temperature} | scores | sheets.describe_left_out(asked, lessons.left_out)


def read_lessons(work: Work) -> Lessons:
    """The snapshot's train and dev rows as tokens. Raises `SpecRefusedError` when there is nothing to learn from."""
    spec, candidate = work.spec, work.spec.candidate
    if spec.dataset is None or candidate is None:  # `pretrain` needs neither
        return Lessons([], [], 0, 0)
    learns_rows = spec.options.method != "pretrain"
    work.progress.write("tokenizing", now=True)
    lessons = data.read_lessons(
        spec.dataset,
        work.tokenizer,
        candidate.prompt,
        candidate.labels,
        spec.options,
        limit=work.row_limit,
        warm=learns_rows and (spec.init_adapter is not None or spec.learned is not None),
        seed=spec.seed,
        learned=spec.learned,
        beat=work.beat,
    )
    work.note_left_out(lessons.left_out)
    if learns_rows and not lessons.train:
        nothing = "no new rows since its beginning" if spec.options.policy == "delta" else "no rows to train on"
        raise SpecRefusedError(f"dataset {spec.dataset} has {nothing}: import history or collect labels first")
    return lessons


def read_texts(work: Work, path: Path) -> texts.TokenFile:
    """Texts as tokens of the run's base."""
    work.progress.write("tokenizing", now=True)
    return work.read_texts(path, work.spec.base)


def read_corpus(work: Work, general: texts.TokenFile | None) -> Sequence[Example]:
    """The texts to pre-train on, with some general ones among them where there are any."""
    spec, corpus = work.spec, read_texts(work, checks.the_texts(work.spec))
    return corpus if general is None else texts.Mixture(corpus, general, spec.options.pretrain.general_share, spec.seed)


def begin_training(work: Work) -> Any:
    """The model with the weights that the method trains."""
    spec, options = work.spec, work.spec.options
    base = work.load_to_train()
    torch.manual_seed(spec.seed)
    return full.begin(base) if options.trains_all_weights else lora.begin(base, options, spec.init_adapter)


def make_loop(work: Work, model: Any, examples: Sequence[Example], dev: Sequence[Example]) -> loop.Loop:
    """The training loop of this run."""
    spec = work.spec
    with work.progress.alive():
        signature = sign(spec)
    return loop.Loop(
        model, examples, dev, spec.options, spec.seed, signature, work.attempt, work.progress, work.stop, work.budget, work.together
    )


def sign(spec: Spec) -> str:
    """A digest of all that decides about the weights: a checkpoint with another one belongs to another run."""
    content = [path and snapshots.read_manifest(path)["root"] for path in (spec.dataset, spec.learned)]
    content += [path and texts.digest_texts(path) for path in (spec.texts, spec.general_texts)]
    content += [texts.VERSION] if spec.options.method == "pretrain" else []
    content += [spec.init_adapter and artifacts.digest_folder(spec.init_adapter)]
    # How the rows of a step are spread over passes changes nothing, unless each pass is an update of its own.
    pace = set() if spec.options.optimizer_in_backward else {"max_tokens", "recompute_layers"}
    # A run may go on elsewhere, where its files lie in other places, and what is scored afterwards doesn't change what was learned.
    places = dict.fromkeys(("dataset", "learned", "texts", "general_texts", "init_adapter", "device", "threads"), True)
    later = dict.fromkeys(("others", "score_sets", "plan"), True)
    asked = spec.model_dump_json(exclude={**places, **later, "base": {"path"}, "options": pace | {"serve_in_4bit"}})
    return hashlib.sha256(f"{asked}\n{content}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Made:
    """What training left in the attempt's folder: an adapter, or a base of its own."""

    kind: Literal["adapter", "model"]
    folder: Path
    place: str
    digest: str

    def describe(self) -> dict[str, Any]:
        """What `result.json` says of it."""
        return {self.kind: {"path": self.place, "digest": self.digest}}

    def wear(self, candidate: Model) -> Model:
        """The candidate with what was trained."""
        if self.kind == "adapter":
            return candidate.model_copy(update={"adapter": self.folder / self.place, "adapter_digest": self.digest})
        return candidate.model_copy(update={"base": Base(path=self.folder / self.place, digest=self.digest)})


def save_trained(work: Work, model: Any) -> Made:
    """Write what was trained. An adapter that was pre-trained becomes a part of the base: the labels get one of their own."""
    work.progress.write("saving", now=True)
    with work.progress.alive():
        return _save_trained(work.spec, work.attempt.folder, work.tokenizer, model)


def _save_trained(spec: Spec, folder: Path, tokenizer: Any, model: Any) -> Made:
    if not spec.options.makes_base:
        place = f"adapters/{checks.the_candidate(spec).name}"
        return Made("adapter", folder, place, lora.save_adapter(model, folder / place, spec.base.digest))
    try:
        whole = model if spec.options.trains_all_weights else lora.merge(model)
    except ValueError as error:
        raise loop.DivergedError(f"the adapter can't be merged ({error}): lower options.learning_rate") from error
    return Made("model", folder, "model", full.save_model(whole, tokenizer, folder / "model"))


def end_training(work: Work, model: Any) -> None:
    """Leave the base as it was, or let it go when its weights were changed."""
    if work.spec.options.makes_base:
        work.held.release()
    else:
        lora.end(model)


def describe_training(work: Work, counters: loop.Counters, examples: Sequence[Example]) -> dict[str, Any]:
    """The figures of the training loop."""
    rows = len(examples)
    steps_per_epoch = -(-rows // work.spec.options.batch_rows)
    epochs = counters.step / steps_per_epoch
    return {
        "method": work.spec.options.method,
        "examined_in_4bit": work.spec.options.serve_in_4bit or base_config.is_in_4bit(work.spec.base.path),
        "rows": rows,
        "tokens": counters.tokens,
        "tokens_saved": counters.tokens_saved,
        "supervised_tokens": counters.graded_tokens,
        "steps": counters.step,
        "epochs": round(epochs, 3),
        "final_loss": counters.final_loss,
        "seconds": round(counters.seconds, 3),
        "tokens_per_second": round(counters.tokens / counters.seconds, 1),
        "rows_per_second": round(rows * epochs / counters.seconds, 1),
        **({"general_share": round(examples.general_share, 4)} if isinstance(examples, texts.Mixture) else {}),
    }


def calibrate(work: Work, trained: Model, lessons: Lessons) -> tuple[float, float | None]:
    """The candidate's temperature and accuracy on dev; 1 and None where there is no dev split."""
    if not lessons.dev:
        return 1.0, None
    logprobs = answers.answer(work, trained, [case.prompt for case in lessons.dev])
    right = np.array([case.answer for case in lessons.dev])
    return score.fit_temperature(logprobs, right), float((logprobs.argmax(axis=1) == right).mean())


if __name__ == "__main__":
    sys.exit(main())
