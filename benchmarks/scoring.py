"""Scoring: whole-label probabilities against generating text and parsing it, same prompts, none of them twice, 32 in a batch.

`generate` is forced to 64 tokens, as the guide's agents answer with their reasons; with 32 beside it. The labels that ours gives are
compared with those of one full forward pass for each prompt and label.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.figures import Figure, finish
from benchmarks.training import LABELS, PROMPT, make_base
from daemon import imr
from trainers import bases, encoding, score, trees
from trainers.spec import Prompt

BATCH, CHECKED = 32, 100
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--claims", type=int, default=512, help="distinct ones: ours would read equal prompts once")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    distinct = {Prompt(text=PROMPT).render(case["input"]): case for case in imr.read_decisions(2001, 2005)}
    prompts = list(distinct)[: asked.claims]
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = bases.load_base(make_base(Path(folder), [distinct[prompt] for prompt in prompts]), "cpu")
        tokens = find_budget(tokenizer)
        answered: list[int] = [0]
        score.score_prompts(model, tokenizer, prompts, LABELS, max_tokens=tokens, after_pass=answered.append)
        most = max(after - before for before, after in itertools.pairwise(answered))
        ours: list[float] = []
        theirs: dict[int, list[float]] = {64: [], 32: []}
        for run in range(asked.runs):
            began = time.perf_counter()
            scores = score.score_prompts(model, tokenizer, prompts, LABELS, max_tokens=tokens)
            ours.append(len(prompts) / (time.perf_counter() - began))
            for forced, rates in theirs.items():
                rates.append(generate(model, tokenizer, prompts, forced))
            console.print(f"run {run + 1}/{asked.runs}: ours {ours[-1]:.0f}, generate " + str({n: round(r[-1]) for n, r in theirs.items()}))
        same = float((score_separately(model, tokenizer, prompts[:CHECKED]).argmax(1) == scores[:CHECKED].argmax(1)).mean())
    finish(
        "scoring",
        [
            Figure("claims/s, generate with 64 forced tokens and a parser", max(ours), max(theirs[64]), at_least=10),
            Figure("claims/s, generate with 32 forced tokens and a parser", max(ours), max(theirs[32]), at_least=5),
            Figure("prompts in one pass, at most, those in a batch of generate", most, BATCH),
            Figure("share of claims with the label of separate full forward passes", same, at_least=1),
        ],
    )


def find_budget(tokenizer: Any) -> int:
    """The tokens of a pass in which ours asks for the labels of as many prompts as are in a batch of `generate`."""
    branches = trees.build_branches([encoding.label_tokens(tokenizer, label) for label in LABELS])
    return BATCH * trees.ASKED * (len(branches.tokens) + 1)


def generate(model: Any, tokenizer: Any, prompts: Sequence[str], forced: int) -> float:
    """Claims per second when the answer is generated and read from the text."""
    tokenizer.padding_side = "left"
    began = time.perf_counter()
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True).to(model.device)
        with torch.inference_mode():
            out = model.generate(
                **batch, min_new_tokens=forced, max_new_tokens=forced, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        _ = [next((label for label in LABELS if label in text), None) for text in texts]
    return len(prompts) / (time.perf_counter() - began)


@torch.inference_mode()
def score_separately(model: Any, tokenizer: Any, prompts: Sequence[str]) -> np.ndarray:
    """Log-probabilities [prompts, labels], from a forward pass for each prompt and label without padding or any mask of ours."""
    scores = np.empty((len(prompts), len(LABELS)))
    for row, read in enumerate(encoding.encode_prompts(tokenizer, prompts)):
        for column, label in enumerate(LABELS):
            graded = encoding.label_tokens(tokenizer, label)
            logits = model(input_ids=torch.tensor([read + graded], device=model.device)).logits[0, len(read) - 1 : -1]
            chosen = logits.double().log_softmax(-1).gather(1, torch.tensor(graded, device=model.device)[:, None])
            scores[row, column] = chosen.sum().item()
    return scores


if __name__ == "__main__":
    main()
