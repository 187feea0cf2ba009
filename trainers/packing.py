"""Many sequences in one forward pass without padding: none sees another, and only graded positions reach the language-model head.

All tokens lie in one row of restarting `position_ids`. Attention runs on groups of sequences of similar length, so its cost is that of
the sequences, not the square of the pack; a cell beyond a sequence's end lies behind its last token and is seen by none (causal order).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from trainers.data import Example
from trainers.spec import SpecRefusedError

ATTENTION = "packed"
# A sequence joins a group while it has at least this share of the longest one's length: less padding inside attention, or fewer calls.
SIMILAR = 0.75


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that attend in one call: `places` [sequences, longest] in the pack, and which of its cells, counted flat, are real."""

    places: torch.Tensor
    real: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass. `keep` are the positions whose next token is graded, `targets` those tokens, `weights` what each one counts."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    keep: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    groups: tuple[Group, ...]

    @property
    def tokens(self) -> int:
        """How many tokens the model reads."""
        return self.input_ids.shape[1]


def pack(examples: Sequence[Example], max_tokens: int, device: str) -> list[Pack]:
    """Spread `examples` over passes of at most `max_tokens` tokens, those of like length together; a longer one has a pass of its own."""
    packs: list[list[Example]] = []
    filled = 0
    for example in sorted(examples, key=lambda example: example.tokens, reverse=True):
        if not packs or filled + example.tokens > max_tokens:
            packs.append([])
            filled = 0
        packs[-1].append(example)
        filled += example.tokens
    return [collate(some, device) for some in packs]


def collate(examples: Sequence[Example], device: str) -> Pack:
    """Lay the examples end to end; they come ordered from the longest to the shortest."""
    tokens: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for example in examples:
        first = len(tokens) + len(example.prompt) - 1
        keep += range(first, first + len(example.completion))
        tokens += example.prompt + example.completion[:-1]
        positions += range(example.tokens)
        targets += example.completion
        weights += [example.weight] * len(example.completion)
    return Pack(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        keep=torch.tensor(keep, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, device=device),
        groups=tuple(group_sequences([example.tokens for example in examples], device)),
    )


def group_sequences(lengths: Sequence[int], device: str) -> Iterator[Group]:
    """Groups of neighbouring sequences, none of them shorter than `SIMILAR` of the longest in its group."""
    begin = 0
    start = 0
    while begin < len(lengths):
        longest = lengths[begin]
        end = begin
        while end < len(lengths) and SIMILAR * longest <= lengths[end] <= longest:
            end += 1
        yield make_group(start, lengths[begin:end], device)
        start += sum(lengths[begin:end])
        begin = end


def make_group(start: int, lengths: Sequence[int], device: str) -> Group:
    """The group of sequences with these lengths that lie end to end from position `start` on; the first is the longest."""
    length = torch.tensor(lengths)
    first = start + torch.cumsum(length, 0) - length
    step = torch.arange(lengths[0])
    places = first[:, None] + torch.minimum(step[None], length[:, None] - 1)
    real = (step[None] < length[:, None]).flatten().nonzero()[:, 0]
    return Group(places.to(device), real.to(device))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001  # The groups are the mask.
    *,
    groups: Sequence[Group],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence of a pack, as an implementation of transformers' attention interface.

    Takes heads first, [1, heads, tokens, width], and returns tokens first, [1, tokens, heads, width].
    """
    shared = getattr(module, "num_key_value_groups", 1) > 1
    outputs = []
    for group in groups:
        count, longest = group.places.shape
        cells = group.places.flatten()
        queries, keys, values = (
            heads[0].index_select(1, cells).view(-1, count, longest, heads.shape[-1]).transpose(0, 1) for heads in (query, key, value)
        )
        window = window_mask(longest, sliding_window, query.device)
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=window, is_causal=window is None, scale=scaling, enable_gqa=shared
        )
        outputs.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, group.real))
    return torch.cat(outputs)[None], None


def window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Causal order within a sliding window, where the window is shorter than the sequences."""
    if window is None or length <= window:
        return None
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return (distance >= 0) & (distance < window)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, lambda *_args, **_options: None)


@contextlib.contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Let the model read packs. Raises `SpecRefusedError` for an architecture that can't take another attention."""
    before = model.config._attn_implementation  # noqa: SLF001  # The library has no public way to ask.
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:  # noqa: SLF001
        raise SpecRefusedError(
            f"{type(model).__name__} can't read packed sequences: use a base that follows transformers' AttentionInterface"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def token_losses(model: Any, packed: Pack) -> torch.Tensor:
    """The negative log-likelihood of each graded token, in fp32; to be called under `packed_attention`."""
    output = model(
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        logits_to_keep=packed.keep,
        groups=packed.groups,
        use_cache=False,
    )
    return functional.cross_entropy(output.logits[0].float(), packed.targets, reduction="none")
