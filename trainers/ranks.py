"""The processes that share a run, one for each part of its device: each takes its rows of a step, and their gradients are summed.

That is data parallelism (DDP). Every process holds the whole model and makes the same step; the first one alone writes, scores and
publishes. Started by `trainers.torchrun`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from trainers.spec import SpecRefusedError

PR_SET_PDEATHSIG = 1

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which of how many processes this one is."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def pick_device(self, device: str) -> str:
        """This process's part of a device. Raises `SpecRefusedError` when there are not as many processes as parts."""
        parts = device.split("+")
        if len(parts) != self.size:
            raise SpecRefusedError(f"device {device} is for {len(parts)} processes, there are {self.size}: use python -m trainers.torchrun")
        return parts[self.rank]

    def share(self, rows: Sequence[T]) -> list[T]:
        """This process's part of rows that are in order of their length: every part is about as long."""
        return list(rows[self.rank :: self.size])

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Give every process the sum of all gradients."""
        if self.size == 1:
            return
        works = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            works.append(distributed.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()

    def sum_numbers(self, *numbers: float, device: str) -> list[float]:
        """Each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        return summed.tolist()


ALONE = Ranks()


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started together with this one; alone where it started none."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    die_with_parent()
    ranks = Ranks(int(os.environ["RANK"]), size)
    part = device.split("+")[min(ranks.rank, device.count("+"))]
    if part != "cpu":
        torch.cuda.set_device(part)
    distributed.init_process_group("gloo" if part == "cpu" else "nccl")
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def die_with_parent() -> None:
    """Let the kernel kill this process when torchrun is killed: in a session of its own it would live on (prctl(2))."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
