"""Which rows each step of a training takes, and at what rate."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows each step takes and at what rate: a function of the step alone, so that a resumed run sees the same."""

    rows: int
    batch_rows: int
    epochs: float
    warmup: float
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every row once; the last one may be smaller."""
        return math.ceil(self.rows / self.batch_rows)

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return math.ceil(self.epochs * self.steps_per_epoch)

    def batch(self, step: int) -> list[int]:
        """The rows of this step: each epoch is another permutation."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows: list[int] = permute(self.rows, self.seed, epoch)[place * self.batch_rows : (place + 1) * self.batch_rows].tolist()
        return rows

    def rate(self, step: int) -> float:
        """The share of the learning rate: up in a line while warming up, then down in a line to the end."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        return (self.steps - step) / (self.steps - warm)


@functools.lru_cache(maxsize=2)
def permute(rows: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of the rows, drawn from the seed and the epoch alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator)
