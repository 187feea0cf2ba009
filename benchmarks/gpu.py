"""One CUDA card, 1B- and 8B-shaped models with random weights: speed and memory beside the guide's script and TRL.

`benchmarks/gpu.sh` runs it. A row that was not run, or that failed, says so in place of a figure. Two more runs take the settings that the
planner chooses for cards of 12 and 24 GB, with passes of 4,096 tokens, and hold the planner against the peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
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
from trainers.spec import LoraOptions, Method, Options, Prompt

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
DEFAULTS, TUNED = ("trl-packing-checkpointed",), ("trl-packing", "trl-padding-free")
SPARING, SPARING_OPTIONS = "ours-sparing", {"recompute_layers": 1, "max_tokens": 512}
GOALS = (
    ("claims/s against the guide's script", "claims_per_second", "ours-unshared", ("guide",), {"at_least": 3.0}),
    (
        "claims/s against TRL packing at its defaults",
        "claims_per_second",
        "ours-unshared",
        ("trl-packing-checkpointed",),
        {"at_least": 1.3},
    ),
    ("peak GB against the same", "peak_gb", "ours-unshared", DEFAULTS, {"at_most": 1.0}),
    (
        "claims/s against the same, activations computed again",
        "claims_per_second",
        SPARING,
        DEFAULTS,
        {"at_least": 1.3},
    ),
    ("peak GB against the same, activations computed again", "peak_gb", SPARING, DEFAULTS, {"at_most": 1.0}),
    ("claims/s against TRL tuned", "claims_per_second", "ours-unshared", TUNED, {"at_least": 1.0}),
    ("claims/s against TRL tuned, with a shared prefix", "claims_per_second", "ours", TUNED, {"at_least": 1.5}),
)
NAMES = ("guide", "trl-packing-checkpointed", "trl-packing", "trl-padding-free", "ours-unshared", "ours", SPARING)
GB = 1e9
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
    rows = []
    for shape in ["tiny"] if asked.tiny else ["1B", "8B"]:
        with tempfile.TemporaryDirectory() as folder:
            base = make_base(Path(folder) / "base", shape, asked.device, cases)
            task = Task(shape, Prompt(text=POLICY + PROMPT), cases, cases[:16])
            if shape != "1B":
                rows += [measure_planned(Path(folder), base, task, method, size, asked.device, ends) for method, size, _ in PLANNED]
            methods = [(name, "lora") for name in NAMES] + ([("ours", "qlora")] if shape != "1B" else [])
            rows += [measure(Path(folder), base, task, name, method, asked.device, ends) for name, method in methods]
    largest = rows[-1]["shape"]
    figures = list(judge({(row["name"], row["method"]): row for row in rows if row["shape"] == largest}))
    print(json.dumps({"benchmark": "gpu", "machine": describe_card(asked.device), "rows": rows, "figures": figures}))


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


def measure(work: Path, base: Path, task: Task, name: str, method: str, device: str, ends: float) -> dict[str, Any]:
    """Claims a second and peak memory of one contender, or why there are none."""
    row: dict[str, Any] = {"shape": task.name, "name": name, "method": method}
    left = ends - time.monotonic()
    if left < 5:
        return row | {"result": "not measured: no time left"}
    out = work / f"{name}-{method}"
    out.mkdir()
    if name.startswith("ours"):
        changes = SPARING_OPTIONS if name == SPARING else {}
        training.write_run(out, base, task, share_prefixes=name == "ours", device=device, method=method, **changes)
        job = out / "spec.json"
    else:
        job = training.write_job(out, base, replace(task, held_out=task.held_out[:4]))
    try:
        told = training.run_contender("ours" if name.startswith("ours") else name, job, timeout=left)
    except (subprocess.TimeoutExpired, training.ContenderFailedError) as error:
        return row | {"result": explain(error)}
    figures = {"claims_per_second": len(task.train) * training.EPOCHS / told["seconds"], "peak_gb": told["peak_bytes"] / GB}
    console.print(f"{task.name}, {name}, {method}: {figures}")
    return row | figures


def measure_planned(work: Path, base: Path, task: Task, method: Method, size: int, device: str, ends: float) -> dict[str, Any]:
    """Peak memory of a run as it is planned for a card of so many GB, and what the plan says of it."""
    row: dict[str, Any] = {"shape": task.name, "name": "planned", "method": method}
    if ends - time.monotonic() < 5:
        return row | {"result": "not measured: no time left"}
    card = cards.Card(cards.name_size(size * cards.GB), "cpu" if device == "cpu" else "cuda", size * cards.GB)
    options = Options(method=method, lora=LoraOptions(rank=16, alpha=32), max_row_tokens=ROW_TOKENS, max_tokens=ROW_TOKENS)
    chosen = estimates.choose_options(options, estimates.plan_run(options, "train", base, [card])[0].settings)
    out = work / f"planned-{method}"
    training.write_run(out, base, task, share_prefixes=False, device=device, method=method, **chosen, batch_rows=ROWS, epochs=1.0)
    try:
        training.run_contender("ours", out / "spec.json", timeout=ends - time.monotonic())
    except (subprocess.TimeoutExpired, training.ContenderFailedError) as error:
        return row | {"result": explain(error)}
    told = json.loads((out / "attempts" / "1" / "result.json").read_text())
    graded = told["training"]["supervised_tokens"] / told["training"]["tokens"]
    planned = estimates.plan_run(options, "train", base, [card], graded)[0]
    figures = {"peak_gb": told["memory"]["peak_bytes"] / GB, "planned_gb": planned.parts.allocated / GB, "halved": told["memory"]["halved"]}
    console.print(f"{task.name}, planned for {size} GB, {method}: {figures}")
    return row | figures


def explain(error: Exception) -> str:
    """Why there is no figure: the last line of what was said."""
    return f"not measured: {str(error).strip().splitlines()[-1][-300:]}"


def judge(rows: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The figures with their goals; what was not measured has none."""

    def read(name: str, key: str, method: str = "lora") -> float | None:
        return rows.get((name, method), {}).get(key)

    for name, key, ours, others, goal in GOALS:
        known = [value for other in others if (value := read(other, key)) is not None]
        yield describe(name, read(ours, key), max(known, default=None), goal)
    for method, _, most in PLANNED:
        peak = read("planned", "peak_gb", method)
        yield describe(f"{method}, passes of 4,096 tokens: peak GB", peak, None, {"at_most": most}, needs_baseline=False)
        yield describe(
            f"{method}: planned GB against the peak", read("planned", "planned_gb", method), peak, {"at_least": 0.9, "at_most": 1.1}
        )


def describe(
    name: str, value: float | None, baseline: float | None, goal: dict[str, float], *, needs_baseline: bool = True
) -> dict[str, Any]:
    """One figure; without a value where it, or what it is held against, was not measured."""
    if value is None or (needs_baseline and baseline is None):
        return Figure(name, 1.0, 1.0 if needs_baseline else None, **goal).to_json() | dict.fromkeys(("value", "baseline", "ratio", "holds"))
    return Figure(name, value, baseline, **goal).to_json()


def describe_card(device: str) -> str:
    """The card's name."""
    return torch.cuda.get_device_name() if device != "cpu" else "no card: a dry run, its figures say nothing"


if __name__ == "__main__":
    sys.exit(main())
