"""What a run takes of its card, from the base's `config.json` alone, and the settings that make it fit.

A decoder of the Llama kind saves, for each token and layer, what its backward pass reads: inputs and outputs of both norms, queries, keys,
values and what attention made of them, and in the MLP gate, up and their product. Counted so, Llama 3 8B with adapters of rank 16 takes
136.4 KiB, and so much was measured (docs/hardware.md).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from daemon import cards, shapes

Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]

FP32_BYTES = 4
NF4_BYTES = 0.516
"""Of a weight in NF4 with double quantisation (Dettmers et al. 2023, QLoRA): 4 bits and its share of the blocks' scales."""
LOGIT_BYTES = 10
"""Of one logit in forward and backward pass: bf16, its fp32 copy, and the log-softmax or the gradient."""
CONTEXT_BYTES = {"cuda": 6 * cards.GB // 10, "cpu": 11 * cards.GB // 10}
"""What CUDA and its libraries take before there is a tensor; on a CPU, the interpreter with all that training imports."""
FRAGMENTED = 0.05
"""Of what is not weights, lost between blocks."""
SUPERVISED = 0.05
"""The share of a claim's tokens that are graded, where no run has told it."""
ASKED, GATHERED = 1 / 16, 2**15
"""In scoring: the share of a pass's tokens that are asked for what follows, and the keys that one call gathers (`trainers.trees`)."""
LEAST_ROW = 256
"""Remedies cut rows to so many tokens at the least."""
ADAPTER_RANK = 64
"""The largest rank that a method's defaults give an adapter."""
OF_AGENT = {"method", "serve_in_4bit"}
"""Options that say how the agent's servers hold the base, too: a single run can't change that."""
EVERY = (4, 2, 1)
MOMENTS: Mapping[Optimizer, int] = {"adamw": 2 * FP32_BYTES, "adamw_8bit": 2, "paged_adamw_8bit": 0}
"""Bytes on the card for a weight's two moments: in fp32, in a byte each, or paged to the host."""


@dataclass(frozen=True, slots=True)
class Method:
    """How a run works: what it trains, its longest row, and what is wished for of the rest.

    With `serves_4bit` the models are scored on a base in 4 bits too, else on the whole one.
    """

    name: Literal["lora", "qlora", "full", "pretrain", "score"]
    trains: Literal["adapter", "all", "nothing"]
    rank: int
    row_tokens: int
    max_tokens: int
    supervised: float = SUPERVISED
    is_4bit: bool = False
    serves_4bit: bool = False
    is_bf16: bool = False
    checkpoint_every: int = 0
    optimizer: Optimizer = "adamw"
    in_backward: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What is chosen for a card. `checkpoint_every` n computes the activations of each n-th layer twice; 0 keeps all of them.

    `rounding` is how what is trained takes an update: in bf16 most are smaller than its last digit, and count by chance.
    """

    is_4bit: bool
    checkpoint_every: int
    max_tokens: int
    adapter_dtype: Literal["float32", "bfloat16"] | None
    optimizer: Optimizer
    optimizer_in_backward: bool
    rounding: Literal["nearest", "stochastic"] = "nearest"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run takes at its peak, in bytes; `overhead` is the driver, the libraries, and the gaps between blocks."""

    weights: int
    adapters: int
    optimizer: int
    activations: int
    logits: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def allocated(self) -> int:
        """What torch itself would count: all but the overhead."""
        return self.total - self.overhead


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The settings for a run on a card, what it takes with them, and what would help where that is more than there is."""

    card: cards.Card
    parameters: int
    settings: Settings
    parts: Parts
    remedies: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the card has so much to give."""
        return self.parts.total <= self.card.free

    def to_json(self) -> dict[str, Any]:
        """As it stands in `spec.json`."""
        return {**dataclasses.asdict(self), "total": self.parts.total, "fits": self.fits}


def plan_memory(model_config: Mapping[str, Any], method: Method, card: cards.Card) -> MemoryPlan:
    """The fastest settings that fit, with what they take; where none fits, the smallest ones and what would help.

    Raises `shapes.ShapeUnknownError` when `model_config` is not that of a decoder in `shapes.DECODERS`.
    """
    shape = shapes.read_shape(model_config)
    found = _choose(shape, method, card)
    return found if found.fits else dataclasses.replace(found, remedies=tuple(_find_remedies(shape, method, card)))


def _choose(shape: shapes.Shape, method: Method, card: cards.Card) -> MemoryPlan:
    plans = [_weigh(shape, method, settings, card) for settings in list_settings(method, card)]
    return next((plan for plan in plans if plan.fits), min(plans, key=lambda plan: plan.parts.total))


def list_settings(method: Method, card: cards.Card) -> Iterator[Settings]:
    """Settings from the fastest to the most frugal: smaller passes cost least, another optimizer most."""
    for optimizer, in_backward in _list_optimizers(method, card):
        for every in _list_checkpointing(method):
            for dtype in _list_dtypes(method, card):
                rounding: Any = "stochastic" if dtype == "bfloat16" or (method.trains == "all" and card.kind == "cuda") else "nearest"
                for tokens in _list_budgets(method):
                    yield Settings(method.is_4bit, every, tokens, dtype, optimizer, in_backward, rounding)


def _list_dtypes(method: Method, card: cards.Card) -> tuple[Literal["float32", "bfloat16"] | None, ...]:
    """What an adapter is kept in while it learns."""
    if method.trains != "adapter":
        return (None,)
    if method.is_4bit or method.is_bf16:
        return ("bfloat16",)
    return ("float32", "bfloat16") if card.kind == "cuda" else ("float32",)


def _list_optimizers(method: Method, card: cards.Card) -> Iterator[tuple[Optimizer, bool]]:
    """The optimizer that is asked for; then, on a card, one with less in memory.

    That is 8-bit moments for an adapter; for all weights moments on the host, and then updates within the backward pass, where one card
    does the run: several add up their gradients after it, even if it is asked for.
    """
    in_backward = method.in_backward and card.count == 1
    yield method.optimizer, in_backward
    if method.trains == "adapter" and card.kind == "cuda" and method.optimizer == "adamw":
        yield "adamw_8bit", False
    if method.trains == "all" and card.kind == "cuda":
        yield "paged_adamw_8bit", in_backward
        if card.count == 1:
            yield "paged_adamw_8bit", True


def _list_checkpointing(method: Method) -> list[int]:
    """Every how many layers one is computed twice: as asked for, and then more of them."""
    if method.trains == "nothing":
        return [0]
    asked = method.checkpoint_every
    return [asked, *(every for every in EVERY if not asked or every < asked)]


def _list_budgets(method: Method) -> list[int]:
    """Tokens of a pass: what is wished for, halved down to the longest row, which can't be split."""
    budgets = [method.max_tokens]
    while budgets[-1] > method.row_tokens:
        budgets.append(max(method.row_tokens, budgets[-1] // 2))
    return budgets


def _weigh(shape: shapes.Shape, method: Method, settings: Settings, card: cards.Card) -> MemoryPlan:
    """What these settings take of the card, in training or in the scoring after it, whichever takes more."""
    parts = [estimate(shape, method, settings, card.kind)]
    if method.is_4bit and not method.serves_4bit:
        scoring = dataclasses.replace(method, trains="nothing", rank=0)
        parts.append(estimate(shape, scoring, dataclasses.replace(settings, is_4bit=False), card.kind))
    return MemoryPlan(card, shape.parameters, settings, max(parts, key=lambda one: one.total))


def estimate(shape: shapes.Shape, method: Method, settings: Settings, kind: str) -> Parts:
    """What a run takes at its peak, part by part, in bytes."""
    value = 2 if kind == "cuda" or settings.is_4bit else 4
    adapter_value = 2 if settings.adapter_dtype == "bfloat16" else 4
    tokens = max(settings.max_tokens, method.row_tokens)
    rest = shape.parameters - shape.in_layers
    weights = round(shape.in_layers * (NF4_BYTES if settings.is_4bit else value)) + rest * value
    adapters = shape.count_adapter(method.rank) * adapter_value if method.trains != "all" else 0
    optimizer = _count_optimizer(shape, method, settings, value, adapters)
    # An adapter in fp32 is copied into the precision of what it is applied to, and the copies are kept with the activations.
    copies = shape.count_adapter(method.rank) * value if adapters and adapter_value != value and settings.adapter_dtype else 0
    activations = tokens * _count_saved(shape, method, settings, value) + copies
    graded = method.supervised
    if method.trains == "nothing":  # Each prompt is asked for its labels, and what they attend to lies there in copies, of every head.
        graded = max(graded, ASKED)
        activations += 2 * value * GATHERED * shape.queries
    logits = round(tokens * graded) * shape.vocabulary * LOGIT_BYTES
    unpacked = value * max(inputs * outputs for inputs, outputs in shape.linears) if settings.is_4bit else 0
    fragments = round(FRAGMENTED * (adapters + optimizer + activations + logits))
    return Parts(weights, adapters, optimizer, activations, logits, CONTEXT_BYTES[kind] + unpacked + fragments)


def _count_optimizer(shape: shapes.Shape, method: Method, settings: Settings, value: int, adapters: int) -> int:
    """Gradients as wide as what is trained, and AdamW's two moments.

    In the backward pass there is no more than the largest gradient. The update of a weight in bf16 is computed beside it, one weight at a
    time: as wide as the weight, or by torch's AdamW in fp32 with its gradient.
    """
    if method.trains != "all":
        return adapters + MOMENTS[settings.optimizer] * shape.count_adapter(method.rank) if method.trains == "adapter" else 0
    largest = max(shape.vocabulary * shape.width, *(inputs * outputs for inputs, outputs in shape.linears))
    beside = {"adamw": 2 * FP32_BYTES}.get(settings.optimizer, value) if settings.rounding == "stochastic" else 0
    gradients = largest if settings.optimizer_in_backward else shape.parameters
    return value * gradients + MOMENTS[settings.optimizer] * shape.parameters + beside * largest


def _count_saved(shape: shapes.Shape, method: Method, settings: Settings, value: int) -> int:
    """Bytes for each token of a pass: what all layers keep, the gradients that pass through one, and the last norm."""
    layer = count_layer(shape, method, value)
    passing = value * (3 * shape.inner + 2 * shape.width)
    last = value * shape.width
    if method.trains == "nothing":  # Nothing is kept but for the layer that is computed.
        return layer + last
    if not settings.checkpoint_every:
        return shape.layers * layer + passing + last
    thrown = -(-shape.layers // settings.checkpoint_every)
    return (shape.layers - thrown) * layer + thrown * value * shape.width + layer + passing + last


def count_layer(shape: shapes.Shape, method: Method, value: int) -> int:
    """Bytes that one layer saves for each token, with values of `value` bytes."""
    norms = 4 * value * shape.width + 2 * FP32_BYTES
    attention = 2 * value * (shape.queries + shape.keys) + FP32_BYTES * shape.heads
    saved = norms + attention + 3 * value * shape.inner
    if method.trains == "all":  # On a CPU torch's norm keeps what it made of its input, for its weights' gradients.
        return saved + (2 * value * shape.width if value == FP32_BYTES else 0)
    return saved + value * method.rank * len(shape.linears)


def _find_remedies(shape: shapes.Shape, method: Method, card: cards.Card) -> Iterator[str]:
    """What would make a run fit that does not, each tried: options, the memory that others hold, a larger card, or that and options."""
    every = list(_list_changes(method))
    told: set[str] = set()
    for changes in every:  # Of several values of one option the first that fits is the smallest change.
        if not told & changes.keys() and _choose(shape, _change(method, changes), card).fits:
            told |= changes.keys()
            yield _tell(changes)
    if card.taken and _choose(shape, method, dataclasses.replace(card, taken=0)).fits:
        yield f"free the {card.taken / cards.GB:.1f} GB that others hold on this card"
    one = "one card" if card.count > 1 else "a card"
    if size := _find_size(shape, method):
        yield f"use {one} of {size} GB"
        return
    if not told:
        sizes = ((_find_size(shape, _change(method, changes)), changes) for changes in every)
        yield from itertools.islice((f"use {one} of {size} GB and {_tell(changes)}" for size, changes in sizes if size), 1)
    yield "FSDP would spread the weights over several cards: it is not in this version"


def _find_size(shape: shapes.Shape, method: Method) -> int | None:
    """The smallest card that a run fits, in GB; None where it fits none."""
    return next((size for size in cards.SIZES if _choose(shape, method, cards.Card("", "cuda", size * cards.GB)).fits), None)


def _tell(changes: Mapping[str, Any]) -> str:
    where = " in the agent's configuration" if changes.keys() & OF_AGENT else ""
    return "set " + " and ".join(f"{name} = {value}" for name, value in changes.items()) + where


def _list_changes(method: Method) -> Iterator[dict[str, Any]]:
    """Changes of options that take less memory, each alone and then 4 bits together with shorter rows."""
    quantised = {"method": "qlora"} if method.name in {"lora", "full"} else {}
    if not method.serves_4bit and (method.is_4bit or method.name == "score"):
        yield {"serve_in_4bit": "true"}
    if method.name == "pretrain" and method.trains == "all":
        yield {"pretrain.weights": "adapter"}
    shorter = [{"max_row_tokens": rows} for rows in _halve(method.row_tokens)]
    if quantised:
        yield quantised
    yield from shorter
    if method.trains == "adapter":
        yield from ({"lora.rank": rank} for rank in (32, 16, 8) if rank < method.rank)
    if quantised:
        yield from (quantised | rows for rows in shorter)


def _change(method: Method, changes: Mapping[str, Any]) -> Method:
    changed = dataclasses.replace(method, rank=changes.get("lora.rank", method.rank))
    if "method" in changes:
        changed = dataclasses.replace(_to_adapter(changed), name=changes["method"], is_4bit=True, serves_4bit=True)
    if "pretrain.weights" in changes:
        changed = _to_adapter(changed)
    if "serve_in_4bit" in changes:
        changed = dataclasses.replace(changed, is_4bit=True, serves_4bit=True)
    return dataclasses.replace(changed, row_tokens=changes.get("max_row_tokens", method.row_tokens))


def _to_adapter(method: Method) -> Method:
    """The same run with an adapter of the preset's rank at the least."""
    return dataclasses.replace(method, trains="adapter", rank=max(method.rank, ADAPTER_RANK), optimizer="adamw", in_backward=False)


def _halve(tokens: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= LEAST_ROW:
        yield tokens
