"""Training: Ratchet beside what a user would take instead, on the same tiny base, cases, epochs and effective batch.

Every contender trains in a process of its own; they take turns. Of their times the best of the runs counts, of their losses the mean: each
run has its seed. Ours is the ordinary trainer (`python -m trainers.train`), once without and once with shared prefixes.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import transformers
from rich.console import Console

from benchmarks import contenders
from benchmarks.figures import Figure, finish
from daemon import imr
from daemon.rehearsal import LABEL_LINES
from storage import artifacts, snapshots
from trainers import adapters, attention, bases, encoding, forms, loop, score
from trainers.data import Example
from trainers.spec import Base, LoraOptions, Method, Model, Options, Prompt, ScoreSet, Spec, write_spec

LABELS = ("APPROVED", "DENIED")
PROMPT = "{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n"
POLICY = """Decide whether the treatment is medically necessary for this patient under the plan's own rules.
It is when the diagnosis is established by records, a standard treatment was tried and failed or must not be given,
evidence from trials or from a specialist society speaks for it, and no cheaper treatment does as well.
It is not when it is experimental for this diagnosis, serves convenience, or is left out by the plan. Answer with one word.

"""
EPOCHS = 3
NEW, RECENT, REPLAYED = 200, 500, 2000
console = Console(stderr=True)


@dataclass(frozen=True)
class Task:
    """One data set with its prompt: what is trained on, what the loss is measured on, and what is scored."""

    name: str
    prompt: Prompt
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """Trainings: `seconds` are those of the steps, `whole` those of the process from start to evaluated adapter; an adapter of each run.

    `peak_bytes` is the process's peak; of the resident one, that of the run alone.
    """

    claims: float
    seconds: float
    whole: float
    peak_bytes: int
    adapters: list[Path]

    @property
    def rate(self) -> float:
        """Claims a second."""
        return self.claims / self.seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--long-cases", type=int, default=64, help="so many for the guide's own padding, which takes about a second a case")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    cases = list(imr.read_decisions(2001, 2005))
    train, held_out = cases[: asked.cases], cases[-RECENT:]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_base(work, train, [PROMPT, POLICY + PROMPT])
        plain = Task("plain", Prompt(text=PROMPT), train, held_out)
        policy = Task("policy", Prompt(text=POLICY + PROMPT), train, held_out)
        long = Task("long", Prompt(text=PROMPT), train[: asked.long_cases], held_out)
        new = Task("new", Prompt(text=PROMPT), train[:NEW], held_out[:NEW])
        replay = Task("replay", Prompt(text=PROMPT), cases[: NEW + REPLAYED], held_out[:NEW])
        best: dict[tuple[str, str], Outcome] = {}
        for run in range(asked.runs):
            for task, names in (
                (plain, ["guide", "trl", "trl-padding-free", "trl-packing", "ours"]),
                (policy, ["trl", "trl-padding-free", "trl-packing", "ours-unshared", "ours"]),
                (long, ["guide-2048", "ours"]),
                (new, ["trl", "trl-padding-free", "trl-packing", "ours", "ours-resident"]),
                (replay, ["ours"]),
            ):
                for name in names:
                    train_one(best, work, base, task, name, run)
        figures = [
            *compare_rates(best, base, plain, policy, long),
            *compare_losses(best, base, plain, policy),
            *compare_jobs(best, base, plain),
        ]
        figures.append(measure_shared(base, policy))
    finish("training", figures)


def make_base(work: Path, cases: Sequence[dict[str, Any]], prompts: Sequence[str] = (PROMPT,)) -> Path:
    """A tiny base made from the prompts and the labels' names, as the demo and the replays make theirs."""
    texts = [Prompt(text=prompt).render(case["input"]) for prompt in prompts for case in cases]
    texts += [f"{label}\n" for label in LABELS for _ in range(math.ceil(LABEL_LINES * len(texts)))]
    (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    console.print("making the tiny base")
    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(work / "texts.jsonl"), "--out", str(work / "base"), "--epochs", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return work / "base"


def train_one(best: dict[tuple[str, str], Outcome], work: Path, base: Path, task: Task, name: str, run: int) -> None:
    """Let one contender train, with a seed of the run's, and keep each figure that is its best."""
    out = work / f"{task.name}-{name}-{run}"
    out.mkdir()
    outcome = (train_here if name.startswith("ours") else train_there)(out, base, task, name, run + 1)
    known = best.get((task.name, name), outcome)
    best[task.name, name] = Outcome(
        outcome.claims,
        min(outcome.seconds, known.seconds),
        min(outcome.whole, known.whole),
        min(outcome.peak_bytes, known.peak_bytes),
        [*(known.adapters if known is not outcome else []), *outcome.adapters],
    )
    console.print(f"{task.name}, {name}, run {run + 1}: {outcome.rate:.0f} claims/s, {outcome.whole:.1f} s in all")


class ContenderFailedError(RuntimeError):
    """A contender ended with an error; says how."""


def train_there(out: Path, base: Path, task: Task, name: str, seed: int) -> Outcome:
    """A contender of `benchmarks.contenders`."""
    job = write_job(out, base, task, seed)
    began = time.perf_counter()
    told = run_contender(name, job)
    return Outcome(len(task.train) * EPOCHS, told["seconds"], time.perf_counter() - began, told["peak_bytes"], [out / "adapter"])


def write_job(out: Path, base: Path, task: Task, seed: int = 1) -> Path:
    """What a contender is asked to do."""
    job: dict[str, Any] = {"base": str(base), "out": str(out), "epochs": EPOCHS, "seed": seed}
    job |= {"cases": describe(base, task.prompt, task.train), "held_out": describe(base, task.prompt, task.held_out)}
    (out / "job.json").write_text(json.dumps(job))
    return out / "job.json"


def run_contender(name: str, job: Path, timeout: float | None = None) -> dict[str, Any]:
    """Run a contender in a process of its own; returns what it measured. Raises `ContenderFailedError`."""
    command = [sys.executable, "-m", "benchmarks.contenders", name, str(job)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise ContenderFailedError(f"{name}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def train_here(out: Path, base: Path, task: Task, name: str, seed: int) -> Outcome:
    """Our own trainer: a process for one run, or one that has done a run before."""
    run_dir = out / "run"
    write_run(run_dir, base, task, share_prefixes=name != "ours-unshared", seed=seed)
    whole = run_resident(out, base, task, run_dir) if name == "ours-resident" else run_cold(run_dir)
    result = read_result(run_dir)
    adapter = run_dir / "attempts" / "1" / result["adapter"]["path"]
    return Outcome(len(task.train) * EPOCHS, result["training"]["seconds"], whole, result["memory"]["peak_bytes"], [adapter])


def run_cold(run_dir: Path) -> float:
    """The seconds of a run in a process of its own."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "trainers.train", str(run_dir)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return time.perf_counter() - began


def run_resident(out: Path, base: Path, task: Task, run_dir: Path) -> float:
    """The seconds of a run in a worker that has done another one before."""
    write_run(out / "before", base, task, share_prefixes=True)
    with start_worker() as worker:
        for place in (out / "before", run_dir):
            began = time.perf_counter()
            answer = ask_worker(worker, place)
            if answer is None or answer["exit"]:
                raise SystemExit(answer["reason"] if answer else "the worker ended")
        return time.perf_counter() - began


def start_worker() -> subprocess.Popen[str]:
    """Our own trainer, resident."""
    command = [sys.executable, "-m", "trainers.worker"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def ask_worker(worker: subprocess.Popen[str], run_dir: Path) -> dict[str, Any] | None:
    """Let it do a run; returns what it answers, or None when it is gone."""
    assert worker.stdin
    assert worker.stdout
    try:
        worker.stdin.write(json.dumps({"run_dir": str(run_dir)}) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    answer: dict[str, Any] | None = json.loads(worker.stdout.readline() or "null")
    return answer


def read_result(run_dir: Path) -> dict[str, Any]:
    """What a run of ours tells of itself."""
    told: dict[str, Any] = json.loads((run_dir / "attempts" / "1" / "result.json").read_text())
    return told


def write_run(
    run_dir: Path,
    base: Path,
    task: Task,
    *,
    share_prefixes: bool,
    device: str = "cpu",
    method: Method = "lora",
    seed: int = 1,
    **changes: Any,
) -> None:
    """A run folder for our trainer, whose candidate answers the held-out claims; `changes` are options."""
    rows = [
        snapshots.Row(case["claim_id"], hashlib.sha256(case["group"].encode()).hexdigest(), "train", "import", case["claim_id"],
                      json.dumps(case["input"]), "{}", case["answer"], None, case["occurred_at"])
        for case in task.train
    ]  # fmt: skip
    manifest = snapshots.write(run_dir / "snapshot", rows, {})
    asked = {"row_id": [case["claim_id"] for case in task.held_out], "input": [json.dumps(case["input"]) for case in task.held_out]}
    pq.write_table(pa.table(asked), run_dir / "recent.parquet")
    options = Options(
        method=method,
        learning_rate=contenders.LEARNING_RATE,
        epochs=EPOCHS,
        batch_rows=contenders.BATCH * contenders.ACCUMULATION,
        warmup=contenders.WARMUP,
        lora=LoraOptions(rank=16, alpha=32),
        share_prefixes=share_prefixes,
    ).model_copy(update=changes)
    spec = Spec(
        run_id=run_dir.name,
        kind="train",
        agent="adjudication",
        base=Base(path=base, digest=digest(base)),
        dataset=run_dir / "snapshot",
        dataset_digest=manifest["root"],
        candidate=Model(name="candidate", prompt=task.prompt, labels=LABELS),
        score_sets=(ScoreSet(name="recent", path=run_dir / "recent.parquet"),),
        options=options,
        device=device,
        seed=seed,
    )
    write_spec(run_dir, spec)


@functools.cache
def digest(base: Path) -> str:
    """The base's digest: 16 GB take a while."""
    return artifacts.digest_folder(base)


@functools.cache
def load(base: Path) -> tuple[Any, Any]:
    """The base, to measure losses and to score."""
    return bases.load_base(base, "cpu")


@functools.cache
def load_tokenizer(base: Path) -> Any:
    """The base's tokenizer alone."""
    return transformers.AutoTokenizer.from_pretrained(base)


def render(base: Path, prompt: Prompt, cases: Sequence[dict[str, Any]]) -> list[str]:
    """The prompts as a model reads them."""
    return encoding.build_prompts(load_tokenizer(base), prompt, [case["input"] for case in cases], [contenders.OWN_LENGTH] * len(cases))[0]


def read_examples(base: Path, prompt: Prompt, cases: Sequence[dict[str, Any]]) -> list[Example]:
    """The cases as our trainer reads them."""
    tokenizer = load_tokenizer(base)
    form = forms.find(tokenizer, prompt.form)
    prompts = encoding.encode_prompts(tokenizer, render(base, prompt, cases))
    return [
        Example(read, encoding.encode_completion(tokenizer, form, case["answer"], None)) for read, case in zip(prompts, cases, strict=True)
    ]


def describe(base: Path, prompt: Prompt, cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases for a contender: as text, and as our tokens."""
    examples = zip(cases, read_examples(base, prompt, cases), strict=True)
    return [
        {"prompt": prompt.render(case["input"]), "answer": case["answer"], "read": example.prompt, "graded": example.completion}
        for case, example in examples
    ]


def compare_rates(best: dict[tuple[str, str], Outcome], base: Path, plain: Task, policy: Task, long: Task) -> Iterator[Figure]:
    """Claims and real tokens a second, memory and the whole time, beside each of the others."""
    tuned, tuned_policy = (max(names(best, task, "trl"), key=lambda name: best[task, name].rate) for task in ("plain", "policy"))
    for task, name, who, goal in (
        (long, "guide-2048", "the guide's script padded at its own 2,048", 20),
        (plain, "guide", "the guide's script padded at the next power of two", 3),
        (plain, tuned, f"TRL's best ({tuned})", 1.3),
        (policy, tuned_policy, f"TRL's best with a shared policy ({tuned_policy})", 1.8),
        (policy, "ours-unshared", "ours with a shared policy that is not shared", None),
    ):
        ours, other = best[task.name, "ours"], best[task.name, name]
        yield Figure(f"claims/s, {who}", ours.rate, other.rate, at_least=goal)
        yield Figure(f"real tokens/s, {who}", ours.rate * count_tokens(base, task, "ours"), other.rate * count_tokens(base, task, name))
        yield Figure(f"peak memory, MB, {who}", ours.peak_bytes / 1e6, other.peak_bytes / 1e6)
        end = " (saved, not evaluated)" if name.startswith("guide") else ""
        yield Figure(f"seconds from start to evaluated adapter, {who}{end}", ours.whole, other.whole)


def count_tokens(base: Path, task: Task, name: str) -> float:
    """The tokens of a claim as a contender is given it, without padding: the guide has a form of its own."""
    if name.startswith("guide"):
        texts = [contenders.write_as_in_the_guide(task.prompt.render(case["input"]), case["answer"]) for case in task.train]
        return statistics.mean(len(ids) for ids in load_tokenizer(base)(texts)["input_ids"])
    return statistics.mean(example.tokens for example in read_examples(base, task.prompt, task.train))


def names(best: dict[tuple[str, str], Outcome], task: str, start: str) -> list[str]:
    """The contenders of a task whose names begin so."""
    return [name for place, name in best if place == task and name.startswith(start)]


def compare_losses(best: dict[tuple[str, str], Outcome], base: Path, *tasks: Task) -> list[Figure]:
    """The completion loss on held-out claims by our scorer, the mean of the runs: ours, and how far TRL's lies from it."""
    figures = []
    for task in tasks:
        examples = read_examples(base, task.prompt, task.held_out)
        found = {
            name: [measure_loss(base, adapter, examples) for adapter in outcome.adapters]
            for (place, name), outcome in best.items()
            if place == task.name
        }
        console.print(f"{task.name}, completion loss on held-out claims, run by run: {found}")
        losses = {name: statistics.mean(some) for name, some in found.items()}
        apart = max(abs(losses[name] - losses["ours"]) for name in losses if not name.startswith("guide"))
        figures.append(Figure(f"completion loss, {task.name}", losses["ours"]))
        figures.append(Figure(f"completion loss, {task.name}, farthest from ours of TRL and unshared", apart, at_most=0.01))
    return figures


def measure_loss(base: Path, adapter: Path, examples: Sequence[Example]) -> float:
    """The mean loss of an adapter on completions."""
    model = peft.PeftModel.from_pretrained(load(base)[0], str(adapter)).eval()
    try:
        with attention.packed(model):
            return loop.mean_loss(model, examples, 4096)
    finally:
        model.unload()


def compare_jobs(best: dict[tuple[str, str], Outcome], base: Path, recent: Task) -> list[Figure]:
    """A whole small job from start to evaluated adapter, and what an exam's scoring costs beside its training."""
    theirs = min((best["new", name] for name in names(best, "new", "trl")), key=lambda outcome: outcome.whole)
    ours, resident = best["new", "ours"], best["new", "ours-resident"]
    scoring = score_exam(base, ours.adapters[-1], recent)
    return [
        Figure(f"seconds for {NEW} new claims, start to evaluated adapter, cold, TRL's best", ours.whole, theirs.whole, at_most=0.9),
        Figure(f"seconds for {NEW} new claims, resident, cold TRL's best", resident.whole, theirs.whole, at_most=0.5),
        Figure(f"peak memory, MB, for {NEW} new claims, resident, cold TRL's best", resident.peak_bytes / 1e6, theirs.peak_bytes / 1e6),
        Figure(
            f"seconds to score {RECENT} claims with two models, the training of {NEW} new and {REPLAYED:,} old ones as in the loop",
            scoring,
            best["replay", "ours"].seconds,
            at_most=0.2,
        ),
        Figure(f"seconds to score {RECENT} claims with two models, the training of {NEW} and no others", scoring, ours.seconds),
    ]


def score_exam(base: Path, adapter: Path, recent: Task) -> float:
    """Seconds to let two models answer the recent claims; best of three. One adapter stands for both: the work is the same."""
    model, tokenizer = load(base)
    prompts = render(base, recent.prompt, recent.held_out)
    worn = adapters.load_adapter(model, "scored", adapter)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        for _model in ("champion", "candidate"):
            score.score_prompts(worn, tokenizer, prompts, LABELS, max_tokens=Options().max_tokens)
        times.append(time.perf_counter() - began)
    adapters.drop_adapter(worn, "scored")
    return min(times)


def measure_shared(base: Path, policy: Task) -> Figure:
    """The share of the tokens that the policy is, in the data set with one."""
    examples = read_examples(base, policy.prompt, policy.train)
    prefix = len(encoding.encode_prompt(load_tokenizer(base), POLICY))
    return Figure(
        "share of the tokens that is the policy", prefix * len(examples) / sum(example.tokens for example in examples), at_least=0.4
    )


if __name__ == "__main__":
    main()
