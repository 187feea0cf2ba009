"""One CUDA card, 1B- and 8B-shaped models with random weights: speed and memory beside the guide's script and TRL.

`benchmarks/gpu.sh` runs it. A row that was not run, or that failed, says so in place of a figure.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import training
from benchmarks.training import POLICY, PROMPT, Task
from daemon import imr
from trainers import tiny
from trainers.spec import Prompt

SHAPES = {
    "tiny": {**tiny.SHAPE, "num_hidden_layers": 2},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
VOCABULARY = 128_256
NAMES = ("guide", "trl-packing-checkpointed", "trl-packing", "trl-padding-free", "ours-unshared", "ours")
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
            methods = [(name, "lora") for name in NAMES] + ([("ours", "qlora")] if shape != "1B" else [])
            rows += [measure(Path(folder), base, task, name, method, asked.device, ends) for name, method in methods]
    print(json.dumps({"benchmark": "gpu", "machine": describe_card(asked.device), "rows": rows}))


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
        training.write_run(out, base, task, share_prefixes=name == "ours", device=device, method=method)
        job = out / "spec.json"
    else:
        job = training.write_job(out, base, replace(task, held_out=task.held_out[:4]))
    try:
        told = training.run_contender(name, job, timeout=left)
    except (subprocess.TimeoutExpired, training.ContenderFailedError) as error:
        return row | {"result": f"not measured: {str(error)[-300:]}"}
    figures = {"claims_per_second": len(task.train) * training.EPOCHS / told["seconds"], "peak_gb": told["peak_bytes"] / GB}
    console.print(f"{task.name}, {name}, {method}: {figures}")
    return row | figures


def describe_card(device: str) -> str:
    """The card's name."""
    return torch.cuda.get_device_name() if device != "cpu" else "no card: a dry run, its figures say nothing"


if __name__ == "__main__":
    sys.exit(main())
