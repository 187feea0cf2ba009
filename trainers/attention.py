"""Attention in a pack: each sequence sees its own past and the prefix that it shares with others, and nothing else.

Attention runs on the sequences, so its cost is theirs and not the square of the pack: on a card by `varlen_attn`, elsewhere on groups
of sequences of similar length.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from transformers import AttentionInterface, AttentionMaskInterface

from trainers import last_layer, lean_layers
from trainers.spec import SpecRefusedError

NAME = "packed"
# A sequence joins a group while it has at least this share of the longest one's length: less padding inside attention, or fewer calls.
SIMILAR = 0.75


class Span(NamedTuple):
    """A sequence of `length` tokens from `start` on, and the `shared` tokens from `after` on that come before its first."""

    start: int
    length: int
    after: int = 0
    shared: int = 0


@dataclass(frozen=True, slots=True)
class Groups:
    """Sequences that attend in one call, padded to the longest: for each group (sequences, longest, shared).

    `queries` and `keys` are the places of all groups' cells in the pack, `real` the cells that are no padding, in the pack's order.
    A cell beyond a sequence's end lies behind its last token and is seen by none (causal order).
    """

    shapes: list[tuple[int, int, int]]
    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True, slots=True)
class Ragged:
    """Sequences without padding: where each one's queries and keys begin, and the keys' places in the pack, or None: as they lie."""

    keys: torch.Tensor | None
    query_begins: torch.Tensor
    key_begins: torch.Tensor
    longest_query: int
    longest_key: int


class Layout:
    """The sequences of a pack, end to end and in order, and what attention needs to know of them, made when it is asked for."""

    def __init__(self, spans: Sequence[Span], device: str) -> None:
        self.spans, self.device = spans, device

    @functools.cached_property
    def groups(self) -> Groups:
        """Neighbours with the same prefix, none shorter than `SIMILAR` of the longest in its group, which comes first."""
        shapes: list[tuple[int, int, int]] = []
        queries, keys, real = [], [], []
        cells = 0
        for spans in group_spans(self.spans):
            first = spans[0]
            begin, length = torch.tensor([[span.start, span.length] for span in spans]).T
            step = torch.arange(first.length)
            places = begin[:, None] + torch.minimum(step[None], length[:, None] - 1)
            prefix = torch.arange(first.after, first.after + first.shared).expand(len(spans), -1)
            shapes.append((len(spans), first.length, first.shared))
            queries.append(places.flatten())
            keys.append(torch.cat([prefix, places], dim=1).flatten())
            real.append(cells + (step[None] < length[:, None]).flatten().nonzero()[:, 0])
            cells += places.numel()
        return Groups(shapes, *(torch.cat(parts).to(self.device) for parts in (queries, keys, real)))

    @functools.cached_property
    def ragged(self) -> Ragged:
        """The same without groups."""
        keys = None
        if any(span.shared for span in self.spans):
            places = [torch.arange(b, b + count) for s in self.spans for b, count in ((s.after, s.shared), (s.start, s.length))]
            keys = torch.cat(places).to(self.device)
        lengths = torch.tensor([[span.length, span.shared + span.length] for span in self.spans])
        begins = functional.pad(lengths.cumsum(0), (0, 0, 1, 0)).to(torch.int32).T.contiguous().to(self.device)
        longest = lengths.amax(0).tolist()
        return Ragged(keys, begins[0], begins[1], *longest)


def group_spans(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Neighbours that may attend in one call."""
    group: list[Span] = []
    for span in spans:
        if group and (span[2:] != group[0][2:] or not SIMILAR * group[0].length <= span.length <= group[0].length):
            yield group
            group = []
        group.append(span)
    yield group


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # The layout is the mask.
    *,
    layout: Layout,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within a pack, as an implementation of transformers' attention interface.

    Takes heads first, [1, heads, tokens, width], and returns tokens first, [1, tokens, heads, width].
    """
    options = {"scale": scaling, "enable_gqa": getattr(module, "num_key_value_groups", 1) > 1}
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return attend_ragged(query[0], key[0], value[0], layout.ragged, sliding_window, options)[None], None
    return attend_groups(query[0], key[0], value[0], layout.groups, sliding_window, options)[None], None


def attend_groups(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: Groups, window: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """Group by group with torch's ordinary attention, on any device and in any precision."""
    queries = torch.split(query.index_select(1, groups.queries), [count * longest for count, longest, _ in groups.shapes], dim=1)
    keys, values = (
        torch.split(heads.index_select(1, groups.keys), [count * (shared + longest) for count, longest, shared in groups.shapes], dim=1)
        for heads in (key, value)
    )
    outputs = []
    for (count, longest, shared), *heads in zip(groups.shapes, queries, keys, values, strict=True):
        q, k, v = (some.view(some.shape[0], count, -1, some.shape[-1]).transpose(0, 1) for some in heads)
        mask = see(longest, shared, window, query.device)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, groups.real)


def see(length: int, shared: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which of `shared` + `length` keys each query sees, bool [length, shared + length]; None when it is just its own past."""
    if not shared and (window is None or length <= window):
        return None
    distance = shared + torch.arange(length, device=device)[:, None] - torch.arange(shared + length, device=device)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def attend_ragged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ragged: Ragged, window: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """All sequences in one call of torch's own variable-length attention: half precision on a card.

    Flash attention is named because it aligns the last query with the last key, which lets a sequence see its prefix.
    """
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attended = varlen.varlen_attn(
            query.transpose(0, 1).contiguous(),
            gather(key.transpose(0, 1), ragged.keys),
            gather(value.transpose(0, 1), ragged.keys),
            ragged.query_begins,
            ragged.key_begins,
            ragged.longest_query,
            ragged.longest_key,
            window_size=(-1 if window is None else window - 1, 0),
            **options,
        )
    return torch.as_tensor(attended)


def gather(tokens: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """These of the tokens, which come first; None means all, as they are."""
    return tokens.contiguous() if places is None else tokens.index_select(0, places)


def register(name: str, attend: Callable[..., Any], layout: str) -> None:
    """Let models attend by `attend`, without a mask of the library's, under this name.

    It is called with what the forward pass was given as `layout`. An architecture whose layers don't hand that on is refused
    (`SpecRefusedError`).
    """

    def attend_or_refuse(module: torch.nn.Module, *heads: Any, **options: Any) -> Any:
        if layout not in options:
            raise SpecRefusedError(describe_misfit(module))
        return attend(module, *heads, **options)

    AttentionInterface.register(name, attend_or_refuse)
    AttentionMaskInterface.register(name, lambda *_args, **_options: None)


def describe_misfit(module: torch.nn.Module) -> str:
    """Why a base can't be used, and which can."""
    return f"{type(module).__name__} can't read packed sequences: use a base that follows transformers' AttentionInterface"


@contextlib.contextmanager
def packed(model: Any) -> Iterator[None]:
    """Let the model read packs. Raises `SpecRefusedError` for an architecture that can't take another attention."""
    with implemented(model, NAME), last_layer.narrowed(model), lean_layers.used(model):
        yield


@contextlib.contextmanager
def implemented(model: Any, name: str) -> Iterator[None]:
    """Let the model attend by a registered implementation. Raises `SpecRefusedError` for an architecture that can't take another."""
    before = model.config._attn_implementation  # noqa: SLF001  # The library has no public way to ask.
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:  # noqa: SLF001
        raise SpecRefusedError(describe_misfit(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


register(NAME, attend, "layout")
