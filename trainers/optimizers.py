"""How gradients become new weights: after a whole step with AdamW in 32 or 8 bits, or weight by weight within the backward pass.

bitsandbytes keeps the moments in 8 bits (about 2 bytes for a weight in place of 8), and can page them to the host on a card.

A weight in bf16 has 8 bits of precision, and most updates are smaller than its last one: rounded to the nearest they would be lost. So
an update is computed beside the weight and added with stochastic rounding, up or down by chance, which is right in the mean. Moments are
in fp32 or in 8 bits: rounded to the nearest in bf16, the second one would never fall, for 0.999 of it is rounded to itself.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch

from trainers.spec import Options

Parameters = Sequence[torch.nn.Parameter]
CUT_BITS = 16
"""What bf16 leaves out of fp32."""
ROUNDED_AT_ONCE = 2**24
"""Weights that are added to in fp32 together: 64 MB."""


class Adam:
    """AdamW for weights in fp32, together, or for one in bf16."""

    def __init__(self, parameters: Parameters, options: Options, state: Any, chance: torch.Generator) -> None:
        self.optimizer, self.parameters, self.chance = make_optimizer(parameters, options), parameters, chance
        self.optimizer.state = state

    def step(self) -> None:
        """Apply the gradients and drop them."""
        if self.parameters[0].dtype == torch.bfloat16:
            self._move(self.parameters[0])
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _move(self, parameter: torch.nn.Parameter) -> None:
        """Let the optimizer move a zero in the weight's place, and add that. torch's own takes fp32 there, and keeps its moments so."""
        weight, gradient, group = parameter.data, parameter.grad, self.optimizer.param_groups[0]
        if gradient is None:
            return
        wide = torch.float32 if isinstance(self.optimizer, torch.optim.AdamW) else weight.dtype
        parameter.grad = None
        parameter.data = torch.zeros_like(weight, dtype=wide)
        parameter.grad = gradient.to(wide)
        try:
            self.optimizer.step()
        finally:
            parameter.grad = None
            move, parameter.data = parameter.data, weight
        add_randomly(weight, move, 1 - group["lr"] * group["weight_decay"], self.chance)


class AfterStep:
    """Sums the gradients of a step's passes, clips them together and applies them once."""

    is_per_pass = False

    def __init__(self, parameters: Parameters, options: Options, seed: int) -> None:
        self.parameters, self.clip, self.seed = parameters, options.clip, seed
        self.state: Any = defaultdict(dict)
        self.chance = torch.Generator(parameters[0].device)
        narrow = [[one] for one in parameters if one.dtype == torch.bfloat16]
        wide = [one for one in parameters if one.dtype != torch.bfloat16]
        self.parts = [Adam(some, options, self.state, self.chance) for some in (*narrow, wide) if some]

    def begin(self, step: int, rate: float) -> None:
        """Set the learning rate of the next step, and its chance, which is the same in every process and after a restart."""
        begin(self.parts, self.chance, self.seed, step, rate)

    def update(self) -> float:
        """Apply the gradients, unless they are not finite; returns their norm before it was clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf).item()
        for part in self.parts if math.isfinite(norm) else ():
            part.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def prepare(self) -> None:
        """Make the state that a checkpoint's is then copied into."""
        for part in self.parts:
            prepare_state(part.optimizer)


class InBackward:
    """Applies each gradient as soon as it is there and drops it, so that a card never holds all of them; nothing is clipped.

    `learned` are the weights that the pass has moved so far. Where it found no memory, it is made again `without` them.
    """

    is_per_pass = True

    def __init__(self, parameters: Parameters, options: Options, seed: int) -> None:
        self.state: Any = defaultdict(dict)
        self.seed, self.squares = seed, 0.0
        self.chance = torch.Generator(parameters[0].device)
        self.parts = {parameter: Adam([parameter], options, self.state, self.chance) for parameter in parameters}
        self.learned: set[torch.Tensor] = set()
        self.without: frozenset[torch.Tensor] = frozenset()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._apply)  # type: ignore[no-untyped-call]

    def _apply(self, parameter: torch.Tensor) -> None:
        square = float(parameter.grad.float().square().sum()) if parameter.grad is not None else 0.0
        self.squares += square
        if math.isfinite(square) and parameter not in self.without:
            self.learned.add(parameter)
            self.parts[parameter].step()  # type: ignore[index]  # the hook is called with the parameter itself
        parameter.grad = None

    def begin(self, step: int, rate: float) -> None:
        """Set the learning rate of the next step, and its chance."""
        begin(self.parts.values(), self.chance, self.seed, step, rate)

    def begin_pass(self, without: frozenset[torch.Tensor]) -> None:
        """Begin a pass that does not move these weights: they have learned from its rows already."""
        self.without, self.learned, self.squares = without, set(), 0.0

    def update(self) -> float:
        """Close the pass: all is applied already; returns the norm of its gradients."""
        return math.sqrt(self.squares)

    def prepare(self) -> None:
        """Make the state that a checkpoint's is then copied into."""
        for part in self.parts.values():
            prepare_state(part.optimizer)


def choose(parameters: Parameters, options: Options, seed: int = 0) -> AfterStep | InBackward:
    """The way of updating that the options name."""
    return (InBackward if options.optimizer_in_backward else AfterStep)(parameters, options, seed)


def name_rounding(parameters: Iterable[torch.nn.Parameter]) -> Literal["nearest", "stochastic"]:
    """How these weights take an update that is smaller than their last digit."""
    return "stochastic" if any(one.dtype == torch.bfloat16 for one in parameters) else "nearest"


def make_optimizer(parameters: Parameters, options: Options) -> torch.optim.Optimizer:
    """AdamW over the parameters. bitsandbytes is imported only where it is asked for: that takes seconds."""
    shared: Any = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    if options.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **shared)
    import bitsandbytes  # noqa: PLC0415

    # Only a card has memory to page out; on CPU both are the same.
    is_paged = options.optimizer == "paged_adamw_8bit" and parameters[0].device.type == "cuda"
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, is_paged=is_paged, **shared)
    return optimizer


def reserve_moments(parameters: Parameters, options: Options) -> list[torch.Tensor]:
    """As much memory as the two moments of each weight will take from the first update on; paged ones lie on the host."""
    device = parameters[0].device
    if options.optimizer == "paged_adamw_8bit" and device.type == "cuda":
        return []
    kind = torch.float32 if options.optimizer == "adamw" else torch.uint8
    return [torch.empty(2 * one.numel(), dtype=kind, device=device) for one in parameters]


def begin(parts: Iterable[Adam], chance: torch.Generator, seed: int, step: int, rate: float) -> None:
    """Set the learning rate of every weight, and the chance that rounds them, by the step alone."""
    chance.manual_seed(seed * 1_000_003 + step)
    for part in parts:
        for group in part.optimizer.param_groups:
            group["lr"] = rate


def add_randomly(weight: torch.Tensor, move: torch.Tensor, keep: float, chance: torch.Generator) -> None:
    """Make a weight in bf16 `keep` of itself and the move, rounded stochastically; in fp32 is only a part of it at a time."""
    for part, change in zip(*(torch.split(one.view(-1), ROUNDED_AT_ONCE) for one in (weight, move)), strict=True):
        part.copy_(round_randomly(part.float().mul_(keep).add_(change), chance))


def round_randomly(values: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """fp32 values as bf16 knows them: away from zero with the share of the way that they are towards the next one, else towards zero."""
    bits = values.view(torch.int32)
    noise = torch.randint(1 << CUT_BITS, bits.shape, dtype=torch.int32, device=bits.device, generator=chance)
    return noise.add_(bits).bitwise_and_(-(1 << CUT_BITS)).view(torch.float32)


def prepare_state(optimizer: Any) -> None:
    """Let bitsandbytes make its state where it wants it (paged memory can't be assigned); torch's own needs none."""
    if hasattr(optimizer, "init_state"):
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
