"""Which prompts begin alike: claims of one agent share its instructions and policy text, which are read once for all of them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# What one more attention call costs, in tokens that are read: a family that saves less is not worth it.
COST = 16


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Prompts, named by their place, whose first `shared` tokens are the same. Each has at least one more token of its own."""

    rows: list[int]
    shared: int

    @property
    def saved(self) -> int:
        """Tokens that need not be read again."""
        return (len(self.rows) - 1) * self.shared


def find_families(prompts: Sequence[Sequence[int] | np.ndarray]) -> list[Family]:
    """Part the prompts into families so that the fewest tokens are read, a family counted as `COST` of them; most often it is one.

    In the order of their tokens relatives are neighbours, so a family is a stretch of that order: the best partition of the first n
    prompts is that of the first m with the family of the others, for the best m. Those without relatives come last, sharing nothing.
    """
    tokens = [np.asarray(prompt, dtype=">u4") for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda row: tokens[row].tobytes())
    alike = [count_alike(tokens[first], tokens[second]) for first, second in itertools.pairwise(order)]
    saved, last = [0], [Family([], 0)]
    for end in range(1, len(order) + 1):
        best, family, shared = saved[-1], (end - 1, 0), sys.maxsize
        for begin in range(end - 2, -1, -1):
            shared = min(shared, alike[begin])
            if shared * (end - 1) <= COST:  # not even with all that come before
                break
            gain = saved[begin] + shared * (end - begin - 1) - COST
            if gain > best:
                best, family = gain, (begin, shared)
        saved.append(best)
        last.append(Family(order[family[0] : end], family[1]))
    families, alone, end = [], Family([], 0), len(order)
    while end:
        if last[end].shared:
            families.append(last[end])
        else:
            alone.rows.extend(last[end].rows)
        end -= len(last[end].rows)
    return [*families, alone] if alone.rows else families


def count_alike(first: np.ndarray, second: np.ndarray) -> int:
    """How many tokens two prompts have in common from the start, the last one of each not counted."""
    length = min(len(first), len(second)) - 1
    same = first[:length] == second[:length]
    return length if same.all() else int(same.argmin())
