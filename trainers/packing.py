"""Many examples in one forward pass without padding: none sees another, and only graded positions reach the language-model head.

All tokens lie in one row. Examples whose prompts begin alike share that beginning: it stands once, and each goes on from its end with
the position that it would have alone, so losses and gradients are those of the examples one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from trainers import attention, prefixes
from trainers.attention import Span
from trainers.data import Example
from trainers.prefixes import Family


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass. `keep` are the positions whose next token is graded, `targets` those tokens, `weights` what each one counts.

    `saved` is how many tokens more it would be without shared prefixes.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    layout: attention.Layout
    saved: int
    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return self.input_ids.shape[1]


@dataclass(slots=True)
class Bin:
    """What goes into one pass: the members of each family, and how many tokens they are."""

    members: dict[Family, list[Example]] = field(default_factory=dict)
    tokens: int = 0

    def cost(self, family: Family, example: Example) -> int:
        """Tokens that the example would add."""
        return example.tokens - (family.shared if family in self.members else 0)

    def add(self, family: Family, example: Example) -> None:
        """Put it in."""
        self.tokens += self.cost(family, example)
        self.members.setdefault(family, []).append(example)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that lie end to end in a pack: an example, a family's prefix (which has no example), or what of a member follows it."""

    tokens: np.ndarray
    example: Example | None = None
    family: Family | None = None


def pack(examples: Sequence[Example], max_tokens: int, device: str, *, share_prefixes: bool = True, least_passes: int = 1) -> list[Pack]:
    """Spread `examples` over passes of at most `max_tokens` tokens; a longer one has a pass of its own, none is ever cut.

    There are `least_passes` at least, or one for each example where these are fewer. Prefixes are shared where that saves more than
    it costs (`prefixes.COST`).
    """
    strangers = [Family(list(range(len(examples))), 0)]
    families = prefixes.find_families([example.prompt for example in examples]) if share_prefixes else strangers
    return [collate(filled, device) for filled in fill_bins(examples, families, max_tokens, least_passes)]


def fill_bins(examples: Sequence[Example], families: Sequence[Family], max_tokens: int, least: int) -> list[Bin]:
    """Best fit, the longest first: each goes where it adds the fewest tokens and leaves the least room, when `least` have begun."""
    bins: list[Bin] = []
    asked = [(examples[row], family) for family in families for row in family.rows]
    for example, family in sorted(asked, key=lambda pair: pair[0].tokens, reverse=True):
        costs = [(one.cost(family, example), -one.tokens, place) for place, one in enumerate(bins)]
        fitting = [found for found in costs if found[0] - found[1] <= max_tokens] if len(bins) >= least else []
        if not fitting:
            bins.append(Bin())
        bins[min(fitting)[2] if fitting else -1].add(family, example)
    return bins


def cut_stretches(filled: Bin) -> list[Stretch]:
    """What stands alone, examples and prefixes, the longest first; then what goes on from a prefix, family by family."""
    alone, members = [], []
    for family, examples in filled.members.items():
        if not family.shared or len(examples) == 1:
            alone += [Stretch(example.read, example) for example in examples]
        else:
            alone.append(Stretch(examples[0].read[: family.shared], family=family))
            members += [Stretch(example.read[family.shared :], example, family) for example in examples]
    return sorted(alone, key=lambda stretch: len(stretch.tokens), reverse=True) + members


def place_stretches(stretches: Sequence[Stretch]) -> list[Span]:
    """Where each one lies, and the prefix that it goes on from."""
    starts = itertools.accumulate((len(stretch.tokens) for stretch in stretches), initial=0)
    spans: list[Span] = []
    prefixes_begin: dict[Family | None, int] = {}
    for stretch, start in zip(stretches, starts, strict=False):
        if stretch.family and stretch.example:
            spans.append(Span(start, len(stretch.tokens), prefixes_begin[stretch.family], stretch.family.shared))
        else:
            spans.append(Span(start, len(stretch.tokens)))
            prefixes_begin[stretch.family] = start
    return spans


def collate(filled: Bin, device: str) -> Pack:
    """Lay what is in a bin end to end."""
    stretches = cut_stretches(filled)
    spans = place_stretches(stretches)
    graded = [(stretch.example, span) for stretch, span in zip(stretches, spans, strict=True) if stretch.example]
    completions = [example.completion for example, _ in graded]
    firsts = [span.start + len(example.prompt) - 1 - span.shared for example, span in graded]

    def lay(parts: Iterable[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(list(parts))).to(device)

    return Pack(
        input_ids=lay(stretch.tokens for stretch in stretches)[None],
        position_ids=lay(np.arange(span.shared, span.shared + span.length) for span in spans)[None],
        keep=lay(np.arange(first, first + len(completion)) for first, completion in zip(firsts, completions, strict=True)),
        targets=lay(np.asarray(completion, dtype=np.int64) for completion in completions),
        weights=lay(np.full(len(example.completion), example.weight, dtype=np.float32) for example, _ in graded),
        layout=attention.Layout(spans, device),
        saved=sum(example.tokens for example, _ in graded) - sum(span.length for span in spans),
        examples=tuple(example for example, _ in graded),
    )


def token_losses(model: Any, packed: Pack) -> torch.Tensor:
    """The negative log-likelihood of each graded token, in fp32; to be called under `attention.packed`."""
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        logits_to_keep=packed.keep,
        asked=packed.keep,
        layout=packed.layout,
        use_cache=False,
    )
    return functional.cross_entropy(output.logits[0].float(), packed.targets, reduction="none")
