"""One CUDA card, 1B- and 8B-shaped models with random weights: speed and memory beside the guide's script and TRL.

`benchmarks/gpu.sh` runs it. A row that was not run, or that failed, says so in place of a figure. Two more runs take the settings that the
planner chooses for cards of 12 and 24 GB, with passes of 4,096 tokens, and hold the planner against the peak. Every run of ours is done by
one resident trainer, which reads 16 GB once; each of the others has a process of its own. The largest shape comes first.

Ours attends by torch's own flash attention (`varlen_attn`), the others by the libraries' default (`sdpa`, with a mask); where flash-attn is
installed, TRL packs with it as well. Of losses, only those of our own first step with shared prefixes and without are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import training
from benchmarks.figures import Figure
from benchmarks.training import POLICY, PROMPT, Task
from daemon import cards, estimates, imr
from trainers import tiny
from trainers.spec import Method, Options, Prompt

SHAPES = {
    "tiny": {**tiny.SHAPE, "num_hidden_layers": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
VOCABULARY = 128_256
ROW_TOKENS, ROWS = 4096, 64
"""Of the planned runs: the longest row and so the pass, and the rows of a step, which fill a pass."""
PLANNED: tuple[tuple[Method, int, float], ...] = (("qlora", 12, 10.0), ("lora", 24, 20.0))
"""Method, the card in GB that it is planned for, and the GB that it may take with passes of 4,096 tokens."""
DEFAULTS, TUNED, FLASH = ("trl-packing-checkpointed",), ("trl-packing", "trl-padding-free"), ("trl-packing-flash",)
SPARING = {"recompute_layers": 1, "max_tokens": 900}
OURS: tuple[tuple[str, Method, dict[str, Any]], ...] = (
    ("ours-unshared", "lora", {}),
    ("ours", "lora", {}),
    ("ours-sparing-unshared", "lora", SPARING),
    ("ours-sparing", "lora", SPARING),
    ("ours", "qlora", {}),
)
"""Name, method, and options that are changed. What is *sparing* computes all activations again, in shorter passes, as TRL's default."""
GOALS = (
    ("claims/s against the guide's script", "claims_per_second", "ours-unshared", ("guide",), {"at_least": 3.0}),
    (
        "claims/s against TRL packing at its defaults, one row a step",
        "claims_per_second",
        "ours-sparing-unshared",
        DEFAULTS,
        {"at_least": 1.3},
    ),
    ("peak GB against the same", "peak_gb", "ours-sparing-unshared", DEFAULTS, {"at_most": 1.0}),
    ("claims/s against the same, with a shared prefix", "claims_per_second", "ours-sparing", DEFAULTS, {"at_least": 1.3}),
    ("peak GB against the same, with a shared prefix", "peak_gb", "ours-sparing", DEFAULTS, {"at_most": 1.0}),
    ("claims/s against the same, in more memory", "claims_per_second", "ours-unshared", DEFAULTS, {}),
    ("peak GB against the same, in more memory", "peak_gb", "ours-unshared", DEFAULTS, {}),
    ("claims/s against TRL tuned", "claims_per_second", "ours-unshared", TUNED, {"at_least": 1.0}),
    ("claims/s against TRL tuned, with a shared prefix", "claims_per_second", "ours", TUNED, {"at_least": 1.5}),
    ("claims/s against TRL packing with flash attention", "claims_per_second", "ours-unshared", FLASH, {"at_least": 1.0}),
)
OTHERS = (*DEFAULTS, *TUNED, "guide", *FLASH)
GB = 1e9
LEAST_SECONDS, NO_TIME = 5, "not measured: no time left"
DRY_RUN = "a dry run: its figures say nothing"
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few cases: shows that everything runs, measures nothing")
    parser.add_argument("--cases", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=450)
    asked = parser.parse_args()
    ends = time.monotonic() + asked.seconds
    cases = list(imr.read_decisions(2001, 2005))[: 32 if asked.tiny else asked.cases]
    rows: list[dict[str, Any]] = []
    shapes = ["tiny"] if asked.tiny else ["8B", "1B"]
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(Path(folder) / "base", shape, asked.device, cases)
            task = Task(shape, Prompt(text=POLICY + PROMPT), cases, cases[:16])
            planned = PLANNED if shape == shapes[0] else ()
            rows += measure_ours(Path(folder), base, task, planned, asked.device, ends)
            rows += [measure(Path(folder), base, task, name, ends) for name in OTHERS]
    figures = list(judge({(row["name"], row["method"]): row for row in rows if row["shape"] == shapes[0]}))
    print(json.dumps({"benchmark": "gpu", "machine": describe_card(asked.device, asked.tiny), "rows": rows, "figures": figures}))


def make_base(folder: Path, shape: str, device: str, cases: list[dict[str, Any]]) -> Path:
    """A checkpoint of this shape with random weights and a small vocabulary in a table of the usual size."""
    console.print(f"making a {shape}-shaped base")
    prompt = Prompt(text=POLICY + PROMPT)
    tokenizer = tiny.train_tokenizer([*(prompt.render(case["input"]) for case in cases), *["APPROVED\n", "DENIED\n"] * len(cases)])
    config = transformers.LlamaConfig(
        **SHAPES[shape],
        vocab_size=len(tokenizer) if shape == "tiny" else VOCABULARY,
        max_position_embeddings=8192,
        tie_word_embeddings=shape != "8B",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(work: Path, base: Path, task: Task, name: str, ends: float) -> dict[str, Any]:
    """Claims a second and peak memory of one of the others, or why there are none."""
    row: dict[str, Any] = {"shape": task.name, "name": name, "method": "lora"}
    if name in FLASH and not importlib.util.find_spec("flash_attn"):
        return tell(row | {"result": "not measured: flash-attn is not installed"})
    left = ends - time.monotonic()
    if left < LEAST_SECONDS:
        return row | {"result": NO_TIME}
    out = work / name
    out.mkdir()
    job = training.write_job(out, base, replace(task, held_out=task.held_out[:4]))
    try:
        told = training.run_contender(name, job, timeout=left)
    except subprocess.TimeoutExpired:
        return row | {"result": NO_TIME}
    except training.ContenderFailedError as error:
        return row | {"result": explain(str(error))}
    return tell(row | {"claims_per_second": len(task.train) * training.EPOCHS / told["seconds"], "peak_gb": told["peak_bytes"] / GB})


def measure_ours(
    work: Path, base: Path, task: Task, planned: Sequence[tuple[Method, int, float]], device: str, ends: float
) -> Iterator[dict[str, Any]]:
    """The same of our own trainer, with options and as planned for cards, one run after another in one process."""
    with Resident(ends) as trainer:
        for name, method, changes in OURS:
            if method == "lora" or planned:
                run_dir = work / f"{name}-{method}"
                training.write_run(run_dir, base, task, share_prefixes="unshared" not in name, device=device, method=method, **changes)
                yield tell(train(trainer, run_dir, {"shape": task.name, "name": name, "method": method}, task))
        for method, size, _ in planned:
            yield tell(train_as_planned(trainer, work, base, task, method, size, device))


class Resident(contextlib.ExitStack):
    """Our own trainer, one process for all runs until the time is up; where it broke down, another one does the next run."""

    def __init__(self, ends: float) -> None:
        super().__init__()
        self.ends = ends
        self.worker: subprocess.Popen[str] | None = None

    def perform(self, run_dir: Path) -> str | None:
        """Do a run; returns why it has no result."""
        left = self.ends - time.monotonic()
        if left < LEAST_SECONDS:
            return NO_TIME
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self.enter_context(training.start_worker())
        limit = threading.Timer(left, self.worker.kill)
        limit.start()
        answer = training.ask_worker(self.worker, run_dir)
        limit.cancel()
        if answer is not None:
            return explain(answer["reason"]) if answer["exit"] else None
        code = self.worker.wait()
        if code == -signal.SIGKILL and time.monotonic() >= self.ends:
            return NO_TIME
        return f"not measured: the trainer ended by {signal.Signals(-code).name if code < 0 else f'itself, status {code}'}"


def train(trainer: Resident, run_dir: Path, row: dict[str, Any], task: Task) -> dict[str, Any]:
    """A run of ours: the row with its figures, or why there are none."""
    reason = trainer.perform(run_dir)
    if reason is not None:
        return row | {"result": reason}
    told = training.read_result(run_dir)
    epochs = told["training"]["epochs"]
    progress = [json.loads(line) for line in (run_dir / "attempts" / "1" / "progress.jsonl").read_text().splitlines()]
    return row | {
        "claims_per_second": len(task.train) * epochs / told["training"]["seconds"],
        "peak_gb": told["memory"]["peak_bytes"] / GB,
        "tokens_saved": told["training"]["tokens_saved"],
        "first_loss": next(line["loss"] for line in progress if line.get("step") == 1),
    }


def train_as_planned(trainer: Resident, work: Path, base: Path, task: Task, method: Method, size: int, device: str) -> dict[str, Any]:
    """Peak memory of a run as it is planned for a card of so many GB, at the method's own rank, and what the plan says of it."""
    options = Options(method=method, max_row_tokens=ROW_TOKENS, max_tokens=ROW_TOKENS)
    row: dict[str, Any] = {"shape": task.name, "name": "planned", "method": method, "rank": options.lora.rank}
    card = cards.Card(cards.name_size(size * cards.GB), "cpu" if device == "cpu" else "cuda", size * cards.GB)
    chosen = {"lora": options.lora} | estimates.choose_options(options, estimates.plan_run(options, "train", base, [card])[0].settings)
    run_dir = work / f"planned-{method}"
    training.write_run(run_dir, base, task, share_prefixes=False, device=device, method=method, **chosen, batch_rows=ROWS, epochs=1.0)
    row = train(trainer, run_dir, row, task)
    if "peak_gb" not in row:
        return row
    told = training.read_result(run_dir)
    graded = told["training"]["supervised_tokens"] / told["training"]["tokens"]
    planned = estimates.plan_run(options, "train", base, [card], graded)[0]
    return row | {"planned_gb": planned.parts.allocated / GB, "halved": told["memory"]["halved"]}


def tell(row: dict[str, Any]) -> dict[str, Any]:
    """The row, shown as soon as it is known."""
    console.print(row)
    return row


def explain(reason: str) -> str:
    """Why there is no figure: the last line of what was said."""
    return f"not measured: {reason.strip().splitlines()[-1][-300:]}"


def judge(rows: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The figures with their goals; what was not measured has none."""

    def read(name: str, key: str, method: str = "lora") -> float | None:
        return rows.get((name, method), {}).get(key)

    for name, key, ours, others, goal in GOALS:
        known = [value for other in others if (value := read(other, key)) is not None]
        yield describe(name, read(ours, key), max(known, default=None), goal)
    apart, shared = (read(name, "first_loss") for name in ("ours-sparing-unshared", "ours-sparing"))
    difference = abs(shared - apart) if read("ours-sparing", "tokens_saved") and shared is not None and apart is not None else None
    yield describe("loss of the first step, shared prefixes against none: difference", difference, None, {"at_most": 0.01}, alone=True)
    for method, _, most in PLANNED:
        peak, of_rank = read("planned", "peak_gb", method), f"{method} of rank {Options(method=method).lora.rank}"
        yield describe(f"{of_rank}, passes of 4,096 tokens: peak GB", peak, None, {"at_most": most}, alone=True)
        yield describe(
            f"{of_rank}: planned GB against the peak", read("planned", "planned_gb", method), peak, {"at_least": 0.9, "at_most": 1.1}
        )


def describe(name: str, value: float | None, baseline: float | None, goal: dict[str, float], *, alone: bool = False) -> dict[str, Any]:
    """One figure; without a value where it, or what it is held against unless it stands alone, was not measured."""
    if value is None or (baseline is None and not alone):
        return Figure(name, 1.0, None if alone else 1.0, **goal).to_json() | dict.fromkeys(("value", "baseline", "ratio", "holds"))
    return Figure(name, value, baseline, **goal).to_json()


def describe_card(device: str, is_tiny: bool) -> str:
    """The card's name, or `DRY_RUN`, by which `gpu.sh` knows what is not to be kept."""
    return DRY_RUN if device == "cpu" or is_tiny else torch.cuda.get_device_name()


if __name__ == "__main__":
    sys.exit(main())
