"""The heaviest passes that a run can come to: what is tried before its first step, so that memory runs out then and not in hours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainers.data import Example


def find_heaviest(examples: Sequence[Example], rows: int) -> tuple[list[Example], list[Example]]:
    """So many rows with the most graded tokens, and so many with the most tokens at all, the longest first; each row is read once.

    Of those with as many graded tokens the shorter come first: more of them share a pass.
    """
    sizes = ((len(example.completion), example.tokens) for example in examples)
    graded, tokens = np.fromiter(sizes, np.dtype((np.int64, 2)), len(examples)).T
    most_graded, longest = np.lexsort((tokens, -graded)), np.argsort(-tokens, kind="stable")
    return [examples[place] for place in most_graded[:rows].tolist()], [examples[place] for place in longest[:rows].tolist()]


def fill_pass(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The longest of some rows, the last one cut, so that they have exactly so many tokens: other rows may fit together as well as that.

    The longest one stays whole: with more tokens it has a pass of its own.
    """
    filled: list[Example] = []
    for example in sorted(examples, key=lambda example: example.tokens, reverse=True):
        left = tokens - sum(one.tokens for one in filled) if filled else max(tokens, example.tokens)
        filled += [cut(example, left)] if left > 0 else []
    return filled


def cut(example: Example, tokens: int) -> Example:
    """The first tokens of a row, of which one at least is graded."""
    return Example(example.prompt[:tokens], example.completion[: 1 + max(0, tokens - len(example.prompt))], example.weight)
