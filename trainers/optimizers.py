"""How gradients become new weights: after a whole step with AdamW in 32 or 8 bits, or weight by weight within the backward pass.

bitsandbytes keeps the moments in 8 bits (about 2 bytes for a weight in place of 8), and can page them to the host on a card.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from trainers.spec import Options

Parameters = Sequence[torch.nn.Parameter]


class AfterStep:
    """Sums the gradients of a step's passes, clips them together and applies them once."""

    is_per_pass = False

    def __init__(self, parameters: Parameters, options: Options) -> None:
        self.parameters, self.clip = parameters, options.clip
        self.optimizer = make_optimizer(parameters, options)
        self.state = self.optimizer.state

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next update."""
        set_rates([self.optimizer], rate)

    def update(self) -> float:
        """Apply the gradients, unless they are not finite; returns their norm before it was clipped."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf).item()
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def prepare(self) -> None:
        """Make the state that a checkpoint's is then copied into."""
        prepare_state(self.optimizer)


class InBackward:
    """Applies each gradient as soon as it is there and drops it, so that a card never holds all of them; nothing is clipped."""

    is_per_pass = True

    def __init__(self, parameters: Parameters, options: Options) -> None:
        self.state: Any = defaultdict(dict)
        self.optimizers = {parameter: make_optimizer([parameter], options) for parameter in parameters}
        self.squares = 0.0
        for parameter, optimizer in self.optimizers.items():
            optimizer.state = self.state
            parameter.register_post_accumulate_grad_hook(self._apply)  # type: ignore[no-untyped-call]

    def _apply(self, parameter: torch.Tensor) -> None:
        square = float(parameter.grad.float().square().sum()) if parameter.grad is not None else 0.0
        self.squares += square
        optimizer = self.optimizers[parameter]  # type: ignore[index]  # the hook is called with the parameter itself
        if math.isfinite(square):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of the next update."""
        set_rates(self.optimizers.values(), rate)

    def update(self) -> float:
        """Close the pass: all is applied already; returns the norm of its gradients."""
        norm, self.squares = math.sqrt(self.squares), 0.0
        return norm

    def prepare(self) -> None:
        """Make the state that a checkpoint's is then copied into."""
        for optimizer in self.optimizers.values():
            prepare_state(optimizer)


def choose(parameters: Parameters, options: Options) -> AfterStep | InBackward:
    """The way of updating that the options name."""
    return InBackward(parameters, options) if options.optimizer_in_backward else AfterStep(parameters, options)


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


def set_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Set the learning rate of every group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def prepare_state(optimizer: Any) -> None:
    """Let bitsandbytes make its state where it wants it (paged memory can't be assigned); torch's own needs none."""
    if hasattr(optimizer, "init_state"):
        for group_index, group in enumerate(optimizer.param_groups):
            for index, parameter in enumerate(group["params"]):
                optimizer.init_state(group, parameter, group_index, index)
