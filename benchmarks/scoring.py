"""Scoring: whole-label probabilities against generating text and parsing it, same batch size, 32 forced tokens."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.figures import Figure, finish
from benchmarks.training import LABELS, PROMPT, make_base
from daemon import imr
from trainers import score
from trainers.spec import Prompt

BATCH, FORCED = 32, 32
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--claims", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    cases = list(imr.read_decisions(2001, 2005))[: asked.claims]
    prompts = [Prompt(text=PROMPT).render(case["input"]) for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = score.load_base(make_base(Path(folder), cases), "cpu")
        tokens = max(len(ids) for ids in tokenizer(prompts)["input_ids"]) * BATCH
        ours, theirs = [], []
        for run in range(asked.runs):
            began = time.perf_counter()
            score.score_prompts(model, tokenizer, prompts, LABELS, max_tokens=tokens)
            ours.append(len(prompts) / (time.perf_counter() - began))
            theirs.append(generate(model, tokenizer, prompts))
            console.print(f"run {run + 1}/{asked.runs}: generate {theirs[-1]:.0f}, ours {ours[-1]:.0f} claims/s")
    finish("scoring", [Figure("scoring, claims/s (best of the runs)", max(ours), max(theirs), at_least=5)])


def generate(model: torch.nn.Module, tokenizer: object, prompts: list[str]) -> float:
    """Claims per second when the answer is generated and read from the text."""
    tokenizer.padding_side = "left"  # type: ignore[attr-defined]
    began = time.perf_counter()
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)  # type: ignore[operator]
        with torch.inference_mode():
            out = model.generate(
                **batch, min_new_tokens=FORCED, max_new_tokens=FORCED, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )  # type: ignore[attr-defined, operator]
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
        _ = [next((label for label in LABELS if label in text), None) for text in texts]
    return len(prompts) / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
