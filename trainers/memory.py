"""The memory of a run's device: how many tokens a pass may have, and what was taken of it at the peak."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

LEAST_TOKENS = 16
PEAK, RESET = "VmHWM:", "5"
"""The highest resident size that this process ever had, and what sets it back to the size of now (proc_pid_clear_refs(5))."""

T = TypeVar("T")


class Budget:
    """How many tokens a pass may have: as many as planned, and half of that each time memory runs out.

    `calibrated_bytes` is the peak of the heaviest passes, where they were tried before the first step.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens, self.halved = tokens, 0
        self.calibrated_bytes: int | None = None

    def fit(self, work: Callable[[int], T]) -> T:
        """Do work that may be done again, with half the tokens when it finds no memory.

        Raises `torch.OutOfMemoryError` with the remedies when passes can't be smaller.
        """
        while True:
            try:
                return work(self.tokens)
            except torch.OutOfMemoryError as error:
                told = str(error)
            # Only here, outside of the handler, nothing of the failed pass is held any more.
            self._halve(told)

    def _halve(self, told: str) -> None:
        if self.tokens // 2 < LEAST_TOKENS:
            remedies = "set options.recompute_layers = 1, a smaller options.max_row_tokens, or method qlora"
            raise torch.OutOfMemoryError(f"passes of {self.tokens} tokens find no memory: {remedies} ({told})")
        self.tokens //= 2
        self.halved += 1
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def can_run_out(device: str) -> bool:
    """Whether a pass that finds no memory raises there. On a CPU the kernel lends memory that it has not got."""
    return device != "cpu"


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> None:
    """Begin to measure anew."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text(RESET)
    except OSError:  # Then it is the peak of the whole process, which is the run's but for a resident trainer.
        return


def read_peak(device: str) -> int | None:
    """Bytes at the peak: of a card what torch allocated, of the CPU the process's resident size; None where nobody can tell."""
    if device != "cpu":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(PEAK)), None)
