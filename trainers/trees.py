"""Prompts in one forward pass as a tree: what some of them begin with stands once, and behind each prompt hang the labels' branches.

All tokens lie in one row without padding, in the order of the prompts' tokens, in which relatives are neighbours: each prompt goes on
where it leaves the one before it. What the first of a pass has in common with the last of the pass before is kept from there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trainers import attention, prefixes

NAME = "tree"
# Keys that one attention call gathers at most, or a single prompt's: what prompts share is read once, but each attends to all of it.
CELLS = 2**15
ASKED = 16
"""One in so many of a pass's tokens may be asked what follows it: what the head says is as wide as the vocabulary."""


@dataclass(frozen=True, slots=True)
class Branches:
    """The labels' tokens as the model reads them behind every prompt, the last one of each left out, for it is only predicted.

    `tokens`, `depths` and `sees` describe the columns behind the prompt: the token, how far behind the prompt it stands, and which
    of these columns it attends to. `reads`, `targets` and `owners` describe every label token: the column that predicts it (0 is the
    prompt's last), the token, and the label's index.
    """

    tokens: np.ndarray
    depths: np.ndarray
    sees: np.ndarray
    reads: np.ndarray
    targets: np.ndarray
    owners: np.ndarray
    labels: int


@dataclass(frozen=True, slots=True)
class Limb:
    """One prompt in a pass: its place among all prompts, its tokens, and how many of them the prompt before it has too."""

    row: int
    tokens: np.ndarray
    shared: int

    @property
    def own(self) -> int:
        """How many tokens are read for it."""
        return len(self.tokens) - self.shared


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts that attend in one call, padded on the left so that they end in the same column: the labels' branches follow there.

    `queries` [prompts, columns] are places in the pass, `keys` [prompts, columns] in what is kept and the pass behind it, and `mask`
    [prompts, 1, queries, keys] says who sees whom: a prompt its past, a branch the prompt and itself, nobody the padding.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True, slots=True)
class Tree:
    """One forward pass. `asked` are the places whose next tokens are read: of each prompt its last token, then the labels' columns.

    `cells` says where among the groups' cells each token of the pass lies, `path` where the last prompt's tokens do (in what is kept
    and the pass behind it).
    """

    rows: list[int]
    kept: int
    input_ids: torch.Tensor
    position_ids: torch.Tensor
    asked: torch.Tensor
    cells: torch.Tensor
    path: torch.Tensor
    groups: list[Group]


class Trunk(transformers.DynamicCache):  # type: ignore[misc]  # transformers is not typed
    """Keys and values of the last prompt of a pass, layer by layer: the next pass goes on from there."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def bear(self, tree: Tree) -> None:
        """Get ready for a pass."""
        self.tree = tree

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer attends to: what is kept, and then the pass."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # As they lie in memory.
        if self.tree.kept:
            before = (heads[:, : self.tree.kept] for heads in self.heads[layer])
            keys, values = (torch.cat(pair, dim=1) for pair in zip(before, (keys, values), strict=True))
        self.heads[layer] = keys.index_select(1, self.tree.path), values.index_select(1, self.tree.path)
        return keys.transpose(1, 2), values.transpose(1, 2)


def build_branches(labels: Sequence[Sequence[int]]) -> Branches:
    """Lay the labels' tokens side by side."""
    tokens: list[int] = []
    branch: list[int] = []
    depths: list[int] = []
    reads: list[int] = []
    for index, label in enumerate(labels):
        reads += [0, *range(len(tokens) + 1, len(tokens) + len(label))]
        tokens += label[:-1]
        branch += [index] * (len(label) - 1)
        depths += range(len(label) - 1)
    return Branches(
        tokens=np.array(tokens, dtype=np.int64),
        depths=np.array(depths, dtype=np.int64),
        sees=np.tril(np.equal.outer(branch, branch)),
        reads=np.array(reads),
        targets=np.array([token for label in labels for token in label]),
        owners=np.array([index for index, label in enumerate(labels) for _ in label]),
        labels=len(labels),
    )


def grow(prompts: Sequence[Sequence[int]], branches: Branches, max_tokens: int, window: int | None, device: str) -> Iterator[Tree]:
    """Spread the prompts over passes of at most `max_tokens` tokens, the labels' included, one in `ASKED` of them asked.

    A longer prompt, or one with more labels, has a pass of its own.
    """
    tokens = [np.asarray(prompt, dtype=">u4") for prompt in prompts]
    order = sorted(range(len(tokens)), key=lambda row: tokens[row].tobytes())
    alike = [0, *(prefixes.count_alike(tokens[first], tokens[second]) for first, second in itertools.pairwise(order))]
    width = len(branches.tokens)
    most = max_tokens // ASKED // (width + 1)
    limbs, count = list[Limb](), 0
    for row, shared in zip(order, alike[: len(order)], strict=True):
        limb = Limb(row, tokens[row], shared)
        count += limb.own + width
        if limbs and (count > max_tokens or len(limbs) >= most):
            yield lay(limbs, branches, window, device)
            limbs, count = [], limb.own + width
        limbs.append(limb)
    if limbs:
        yield lay(limbs, branches, window, device)


def lay(limbs: Sequence[Limb], branches: Branches, window: int | None, device: str) -> Tree:
    """Lay the prompts end to end, each with its branches behind it."""
    width, kept = len(branches.tokens), limbs[0].shared
    starts = np.cumsum([0, *(limb.own + width for limb in limbs)])
    paths = [np.arange(kept)]
    for limb, start in zip(limbs, starts[:-1], strict=True):
        paths.append(np.concatenate([paths[-1][: limb.shared], np.arange(kept + start, kept + start + limb.own)]))

    def send(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    groups, cells, count = [], np.empty(starts[-1], dtype=np.int64), 0
    for members in group(limbs, width):
        some = [limbs[index] for index in members]
        padded = pad(some, [paths[index + 1] for index in members], starts[members], branches, kept, window)
        rows, columns = padded[0].shape
        for place, (index, limb) in enumerate(zip(members, some, strict=True)):
            end = count + (place + 1) * columns
            cells[starts[index] : starts[index + 1]] = np.arange(end - limb.own - width, end)
        count += rows * columns
        groups.append(Group(*map(send, padded)))
    read = [part for limb in limbs for part in (limb.tokens[limb.shared :], branches.tokens)]
    positions = [part for limb in limbs for part in (np.arange(limb.shared, len(limb.tokens)), len(limb.tokens) + branches.depths)]
    return Tree(
        rows=[limb.row for limb in limbs],
        kept=kept,
        input_ids=send(np.concatenate(read).astype(np.int64))[None],
        position_ids=send(np.concatenate(positions))[None],
        asked=send((starts[1:, None] + np.arange(-width - 1, 0)).ravel()),
        cells=send(cells),
        path=send(paths[-1]),
        groups=groups,
    )


def group(limbs: Sequence[Limb], width: int) -> Iterator[list[int]]:
    """Indices of prompts that attend in one call: none has twice another's tokens, nor twice as many to be read."""
    alike: dict[tuple[int, int], list[int]] = {}
    for index, limb in enumerate(limbs):
        alike.setdefault(((limb.own + width).bit_length(), len(limb.tokens).bit_length()), []).append(index)
    for members in alike.values():
        count = max(1, CELLS // max(len(limbs[index].tokens) + width for index in members))
        yield from (members[start : start + count] for start in range(0, len(members), count))


def pad(
    limbs: Sequence[Limb], paths: Sequence[np.ndarray], starts: np.ndarray, branches: Branches, kept: int, window: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Group` holds. A cell of padding stands for any token: what it attends to is read by nobody."""
    width = len(branches.tokens)
    own, lengths = np.array([limb.own for limb in limbs]), np.array([len(limb.tokens) for limb in limbs])
    longest, columns = lengths.max(), own.max() + width
    queries = starts[:, None] + np.maximum(np.arange(-columns, 0) + (own + width)[:, None], 0)
    keys = np.zeros((len(limbs), longest + width), dtype=np.int64)
    for row, path in enumerate(paths):
        keys[row, longest - len(path) : longest] = path
    keys[:, longest:] = (kept + starts + own)[:, None] + np.arange(width)
    positions = np.concatenate([np.arange(longest) - (longest - lengths)[:, None], lengths[:, None] + branches.depths], axis=1)
    sees = np.tri(columns, longest + width, longest + width - columns, dtype=bool)
    sees[columns - width :, longest:] = branches.sees
    mask = sees & (positions >= 0)[:, None]
    if window is not None:
        mask &= positions[:, -columns:, None] - positions[:, None] < window
    return queries, keys, mask[:, None]


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # The groups have masks of their own.
    *,
    tree: Tree,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in a tree, group by group, as an implementation of transformers' attention interface.

    Takes heads first, [1, heads, tokens, width], and returns tokens first, [1, tokens, heads, width].
    """
    attended = []
    for some in tree.groups:
        asked = ((query, some.queries), (key, some.keys), (value, some.keys))
        q, k, v = (heads[0].transpose(0, 1)[places].transpose(1, 2) for heads, places in asked)
        attended.append(sdpa_attention_forward(module, q, k, v, some.mask, scaling=scaling)[0].flatten(0, 1))
    return torch.cat(attended).index_select(0, tree.cells)[None], None


attention.register(NAME, attend, "tree")
