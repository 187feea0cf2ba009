"""One run from its spec to its result: `python -m trainers.train RUN_DIR`, by hand or started by the daemon.

Exit status: 0 done, 1 failed, 2 refused before any weights were loaded (says why), 75 stopped and resumable.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from storage import artifacts, snapshots
from trainers import (
    adapters,
    attempts,
    attention,
    bases,
    checkpoints,
    checks,
    data,
    encoding,
    forms,
    loop,
    memory,
    optimizers,
    ranks,
    score,
    texts,
)
from trainers.attempts import Attempt, Progress
from trainers.data import Example, Lessons
from trainers.encoding import LeftOut
from trainers.methods import full, lora
from trainers.spec import EXIT_DONE, EXIT_REFUSED, EXIT_RESUMABLE, Base, Model, Spec, SpecRefusedError, read_device, read_spec
from trainers.stopping import Stop, StoppedError

EXIT_FAILED = 1
SCORES = "scores.parquet"
UNTOUCHED = "base"
FORGETTING_PIECES, FORGETTING_TOKENS = 200, 512
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
    budget: memory.Budget
    together: ranks.Ranks = ranks.ALONE

    @property
    def row_limit(self) -> int:
        """How many tokens a row may have."""
        return encoding.row_limit(self.spec.options, bases.read_context(self.spec.base))

    def load_to_train(self) -> Any:
        """The weights of the run's base; from here on a run is no longer refused but fails."""
        return self._load(self.spec.base, in_4bit=self.spec.options.load_in_4bit)

    def load_to_score(self, base: Base | None) -> Any:
        """The weights of a base, the run's own unless named, as servers hold them."""
        return self._load(base or self.spec.base, in_4bit=self.spec.options.serve_in_4bit)

    def _load(self, base: Base, *, in_4bit: bool) -> Any:
        self.progress.write("loading", now=True)
        return self.held.load(base, self.spec.device, in_4bit=in_4bit)[0]


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
    with ranks.joined(read_device(arguments.run_dir)) as together:
        status, sentence = run(arguments.run_dir, arguments.attempt, bases.Bases(), stop, together)
    sys.stderr.write(sentence + "\n")
    return status


def run(run_dir: Path, number: int | None, held: bases.Bases, stop: Stop, together: ranks.Ranks = ranks.ALONE) -> tuple[int, str]:
    """Perform one run, or this process's part of it; returns the exit status and a sentence about how it ended."""
    attempt = attempts.open_attempt(run_dir, number, is_silent=not together.is_first)
    if attempt.is_done():
        return EXIT_DONE, f"done before: {attempt.folder / attempts.RESULT}"
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
    return EXIT_DONE, f"done: {attempt.folder / attempts.RESULT}"


def perform(spec: Spec, attempt: Attempt, held: bases.Bases, stop: Stop, together: ranks.Ranks) -> dict[str, Any]:
    """Check the spec and do what it asks; returns what `result.json` says about it."""
    if together.size > 1 and spec.options.optimizer_in_backward:
        raise SpecRefusedError("optimizer_in_backward keeps no gradients to sum over several devices: use one, or leave it out")
    if spec.threads:
        torch.set_num_threads(spec.threads)
    tokenizer = checks.check_spec(spec, held)
    progress = Progress(attempt)
    work = Work(spec, attempt, progress, stop, held, tokenizer, memory.Budget(spec.options.max_tokens), together)
    memory.reset_peak(spec.device)
    try:
        found = train_candidate(work) if spec.kind == "train" else score_only(work)
        return found | {"memory": describe_memory(work)}
    finally:
        progress.close()


def describe_memory(work: Work) -> dict[str, Any]:
    """What the run was expected to take and what it took, side by side, and how often it had to halve its passes."""
    budget = work.budget
    return {
        "plan": work.spec.plan,
        "peak_bytes": memory.read_peak(work.spec.device),
        "max_tokens": budget.tokens,
        "halved": budget.halved,
    }


def score_only(work: Work) -> dict[str, Any]:
    """Let the models answer the score sets."""
    models, sheets = list(checks.scored_models(work.spec)), read_sheets(work)
    return score_models(work, models, sheets) | describe_left_out(sheets)


def train_candidate(work: Work) -> dict[str, Any]:
    """Train by the spec's method, calibrate what came of it on dev, and let it and the others answer the score sets."""
    spec, options = work.spec, work.spec.options
    lessons, sheets = read_lessons(work), read_sheets(work)
    examples = read_corpus(work) if options.method == "pretrain" else data.list_examples(lessons.train)
    dev = data.list_examples(lessons.dev)
    model = begin_training(work)
    rounding = optimizers.name_rounding(checkpoints.trained_parameters(model).values())
    try:
        counters = make_loop(work, model, examples, dev).run()
        if not work.together.is_first:
            return {}
        dev_loss = measure_dev_loss(work, model, dev)
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
    scores = score_models(work, [trained, *spec.others], sheets)
    return found | {"temperature": temperature} | scores | describe_left_out(sheets, lessons.left_out)


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


def begin_training(work: Work) -> Any:
    """The model with the weights that the method trains."""
    spec, options = work.spec, work.spec.options
    base = work.load_to_train()
    torch.manual_seed(spec.seed)
    return full.begin(base) if options.trains_all_weights else lora.begin(base, options, spec.init_adapter)


def save_trained(work: Work, model: Any) -> Made:
    """Write what was trained. An adapter that was pre-trained becomes a part of the base: the labels get one of their own."""
    spec, folder = work.spec, work.attempt.folder
    if not spec.options.makes_base:
        place = f"adapters/{checks.the_candidate(spec).name}"
        return Made("adapter", folder, place, lora.save_adapter(model, folder / place, spec.base.digest))
    whole = model if spec.options.trains_all_weights else lora.merge(model)
    return Made("model", folder, "model", full.save_model(whole, work.tokenizer, folder / "model"))


def end_training(work: Work, model: Any) -> None:
    """Leave the base as it was, or let it go when its weights were changed."""
    if work.spec.options.makes_base:
        work.held.release()
    else:
        lora.end(model)


def read_corpus(work: Work) -> Sequence[Example]:
    """The texts to pre-train on, with some general ones among them where there are any; tokenised once for all attempts."""
    spec, cache = work.spec, work.attempt.run_dir / "tokens"
    work.progress.write("tokenizing", now=True)
    corpus, *general = (
        texts.tokenize(path, work.tokenizer, work.row_limit, cache, spec.base.digest)
        for path in (checks.the_texts(spec), spec.general_texts)
        if path is not None
    )
    return texts.Mixture(corpus, general[0], spec.options.pretrain.general_share, spec.seed) if general else corpus


def read_lessons(work: Work) -> Lessons:
    """The snapshot's train and dev rows as tokens. Raises `SpecRefusedError` when there is nothing to learn from."""
    spec, candidate = work.spec, work.spec.candidate
    if spec.dataset is None or candidate is None:  # `pretrain` needs neither
        return Lessons([], [], 0, 0)
    lessons = data.read_lessons(
        spec.dataset,
        work.tokenizer,
        candidate.prompt,
        candidate.labels,
        spec.options,
        limit=work.row_limit,
        warm=spec.init_adapter is not None or spec.learned is not None,
        seed=spec.seed,
        learned=spec.learned,
    )
    note_left_out(work, lessons.left_out)
    if not lessons.train:
        nothing = "no new rows since its beginning" if spec.options.policy == "delta" else "no rows to train on"
        raise SpecRefusedError(f"dataset {spec.dataset} has {nothing}: import history or collect labels first")
    return lessons


def make_loop(work: Work, model: Any, examples: Sequence[Example], dev: Sequence[Example]) -> loop.Loop:
    """The training loop of this run."""
    spec = work.spec
    return loop.Loop(
        model, examples, dev, spec.options, spec.seed, sign(spec), work.attempt, work.progress, work.stop, work.budget, work.together
    )


def sign(spec: Spec) -> str:
    """A digest of all that decides about the weights: a checkpoint with another one belongs to another run."""
    content = [path and snapshots.read_manifest(path)["root"] for path in (spec.dataset, spec.learned)]
    content += [path and texts.digest_texts(path) for path in (spec.texts, spec.general_texts)]
    content += [spec.init_adapter and artifacts.digest_folder(spec.init_adapter)]
    # How the rows of a step are spread over passes changes nothing, unless each pass is an update of its own.
    pace = set() if spec.options.optimizer_in_backward else {"max_tokens", "recompute_layers"}
    # A run may go on elsewhere, where its files lie in other places, and what is scored afterwards doesn't change what was learned.
    places = dict.fromkeys(("dataset", "learned", "texts", "general_texts", "init_adapter", "device", "threads"), True)
    later = dict.fromkeys(("others", "score_sets", "plan"), True)
    asked = spec.model_dump_json(exclude={**places, **later, "base": {"path"}, "options": pace | {"serve_in_4bit"}})
    return hashlib.sha256(f"{asked}\n{content}".encode()).hexdigest()


def measure_dev_loss(work: Work, model: Any, dev: Sequence[Example]) -> float | None:
    """The mean loss on the dev split, None where there is none."""
    if not dev:
        return None
    with attention.packed(model):
        return work.budget.fit(lambda tokens: loop.mean_loss(model, dev, tokens))


def describe_training(work: Work, counters: loop.Counters, examples: Sequence[Example]) -> dict[str, Any]:
    """The figures of the training loop."""
    rows = len(examples)
    steps_per_epoch = -(-rows // work.spec.options.batch_rows)
    epochs = counters.step / steps_per_epoch
    return {
        "method": work.spec.options.method,
        "examined_in_4bit": work.spec.options.serve_in_4bit,
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
    logprobs = answer(work, trained, [case.prompt for case in lessons.dev])
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
        key = ((model.base or work.spec.base).digest, model.prompt.digest, *model.labels)
        if key not in known:
            known[key] = [read_sheet(work, model, name, *rows) for name, rows in sets.items()]
        asked.append(known[key])
    sheets = [sheet for some in asked for sheet in some]
    left_out = [one for sheet in sheets for one in sheet.left_out]
    note_left_out(work, left_out)
    if work.spec.kind == "score" and left_out and not any(sheet.prompts for sheet in sheets):
        encoding.check_left_out(left_out[0], len(left_out[0].row_ids), 0)
    return asked


def read_sheet(work: Work, model: Model, name: str, row_ids: Sequence[str], inputs: Sequence[Mapping[str, Any]]) -> Sheet:
    """What a model is asked about one score set, as long as its own base can read."""
    base = model.base or work.spec.base
    tokenizer = work.held.tokenizer(base)
    form = forms.find(tokenizer, model.prompt.form)
    limit = encoding.prompt_limit(tokenizer, form, model.labels, encoding.row_limit(work.spec.options, bases.read_context(base)))
    rendered = encoding.render_prompts(tokenizer, model.prompt, inputs, [limit] * len(inputs))
    return Sheet(
        name=name,
        row_ids=[row_ids[index] for index in rendered.texts],
        prompts=list(rendered.texts.values()),
        cut=len(rendered.cut),
        left_out=encoding.list_left_out(name, row_ids, rendered),
    )


def note_left_out(work: Work, left_out: Sequence[LeftOut]) -> None:
    """Tell of rows without a prompt as soon as that is known."""
    for one in left_out:
        work.progress.write("rendering", now=True, set=one.set, rows_left_out=len(one.row_ids), first_left_out=one.row_ids[0])


def describe_left_out(asked: Sequence[Sequence[Sheet]], lessons: Sequence[LeftOut] = ()) -> dict[str, Any]:
    """The rows that were left out because no prompt can be made of them; each set is told once for models asked in the same words."""
    distinct = {id(sheet): sheet for some in asked for sheet in some}.values()
    return {"left_out": [one.describe() for one in (*lessons, *(one for sheet in distinct for one in sheet.left_out))]}


def score_models(work: Work, models: Sequence[Model], asked: Sequence[Sequence[Sheet]]) -> dict[str, Any]:
    """Let every model answer its sheets and write `scores.parquet`; those on one base follow each other, so that each is loaded once."""
    scores: list[score.Score] = []
    order = list(dict.fromkeys((model.base or work.spec.base).digest for model in models))
    pairs = sorted(zip(models, asked, strict=True), key=lambda pair: order.index((pair[0].base or work.spec.base).digest))
    for model, sheets in pairs:
        for sheet in sheets:
            logprobs = answer(work, model, sheet.prompts)
            scores += score.judge(sheet.name, sheet.row_ids, model.name, model.labels, logprobs, model.temperature)
    score.write_scores(work.attempt.folder / SCORES, scores)
    return measure_forgetting(work, models) | {
        "scores": SCORES,
        "scored_rows": len(scores),
        "scored_prompts_cut": sum(sheet.cut for sheets in asked for sheet in sheets),
    }


def measure_forgetting(work: Work, models: Sequence[Model]) -> dict[str, Any]:
    """How likely plain text is to each model and to the untouched base of the run: nats per token on the first of the general texts."""
    path = work.spec.general_texts
    if work.spec.kind != "train" or path is None:
        return {}
    losses = {model.name: measure_text_loss(work, model.base, model.adapter, path) for model in models}
    return {"text_loss": losses | {UNTOUCHED: measure_text_loss(work, None, None, path)}}


def measure_text_loss(work: Work, base: Base | None, adapter: Path | None, path: Path) -> float | None:
    """The loss of the first texts; when it is back nothing holds the base any more, so that there is room for the next one."""
    place = base or work.spec.base
    tokenizer, limit = work.held.tokenizer(place), min(FORGETTING_TOKENS, bases.read_context(place))
    corpus = texts.tokenize(path, tokenizer, limit, work.attempt.run_dir / "tokens", place.digest)
    with wearing(work.load_to_score(base), adapter) as worn:
        return measure_dev_loss(work, worn, corpus[:FORGETTING_PIECES])


@contextlib.contextmanager
def wearing(base: Any, adapter: Path | None) -> Iterator[Any]:
    """The base with an adapter on it for a while, or the bare base."""
    worn = adapters.load_adapter(base, "scored", adapter) if adapter else base
    try:
        yield worn
    finally:
        if adapter:
            adapters.drop_adapter(worn, "scored")


def answer(work: Work, model: Model, prompts: Sequence[str]) -> np.ndarray:
    """The model's label log-probabilities for each prompt, with signs of life in between."""
    base = work.load_to_score(model.base)
    tokenizer = work.held.tokenizer(model.base or work.spec.base)
    form = forms.find(tokenizer, model.prompt.form)
    labels = [form.say(label) for label in model.labels]
    parts = [np.empty((0, len(model.labels)))]
    with wearing(base, model.adapter) as worn:
        for start in range(0, len(prompts), SCORED_AT_ONCE):
            work.stop.check()
            work.progress.write("scoring", model=model.name, rows=start, of=len(prompts))
            some = prompts[start : start + SCORED_AT_ONCE]
            ask = functools.partial(ask_prompts, worn, tokenizer, some, labels)
            parts.append(work.budget.fit(ask))
    return np.concatenate(parts)


def ask_prompts(model: Any, tokenizer: Any, prompts: Sequence[str], labels: Sequence[str], max_tokens: int) -> np.ndarray:
    """The label log-probabilities in passes of so many tokens."""
    return score.score_prompts(model, tokenizer, prompts, labels, max_tokens=max_tokens)


if __name__ == "__main__":
    sys.exit(main())
