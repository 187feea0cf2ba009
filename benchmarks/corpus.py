"""Memory of pre-training on a corpus: the peak of a process that tokenises it and reads pieces back, for 10 MB and for 100 MB.

The texts are the prompts of real decisions, over and over, each with its own number. Each size is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.figures import Figure, finish
from daemon import imr
from trainers import texts, tiny

MEGABYTE = 10**6
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs=2, type=int, default=[10, 100], metavar="MB")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(measure(asked.child)))
        return
    found = []
    for size in asked.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_corpus(Path(folder) / "corpus.txt", size * MEGABYTE)
            command = [sys.executable, "-m", "benchmarks.corpus", "--child", folder]
            found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        console.print(f"{size} MB: {found[-1]}")
    small, large = found
    finish(
        "corpus",
        [
            Figure(
                f"peak memory for {asked.sizes[1]} MB against {asked.sizes[0]} MB of text, MB", large["peak"], small["peak"], at_most=1.1
            ),
            Figure("characters tokenised per CPU second", large["characters_per_second"]),
        ],
    )


def write_corpus(path: Path, size: int) -> None:
    """A text file of so many bytes."""
    notes = ["".join(f"{name}: {value}\n" for name, value in case["input"].items()) for case in imr.read_decisions(2001, 2003)]
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            file.write(f"Case {number}\n{notes[number % len(notes)]}\n")
            number += 1


def measure(folder: Path) -> dict[str, float]:
    """Tokenise the corpus, read a thousand pieces at random, and tell the peak of this process's memory in MB."""
    corpus = folder / "corpus.txt"
    with corpus.open(encoding="utf-8") as file:
        tokenizer = tiny.train_tokenizer([file.read(2 * MEGABYTE)])
    began = time.process_time()
    pieces = texts.tokenize(corpus, tokenizer, 2048, folder / "tokens", "corpus")
    seconds = time.process_time() - began
    for index in torch.randperm(len(pieces))[:1000].tolist():
        assert len(pieces[index].completion) < 2048
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"peak": peak, "characters_per_second": corpus.stat().st_size / seconds, "tokens": pieces.count_tokens()}


if __name__ == "__main__":
    main()
