"""A decoder's layers in fewer steps, and with less kept for the backward pass, than the libraries compute them; the results are the same.

PEFT copies what an adapted matrix reads into the adapter's precision and keeps the copy; here the adapter's small matrices are cast
instead, and what is learned stays in its own precision with its gradients. The MLP's activation is computed again where its gradient is.
Where nothing is learned, in fp32, an adapter is added to its matrix for the pass.
The norms are torch's own, one kernel on a card.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Their norms and MLPs are Llama's, word for word."""


class AddAdapter(torch.autograd.Function):
    """What a matrix makes of x, `output`, with an adapter's share added to it in place: output + scaling * B A x."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
        """Takes output [..., outputs], x [..., inputs], A [rank, inputs] and B [outputs, rank]."""
        ctx.learned, ctx.scaling = (a.dtype, b.dtype), scaling
        a, b = a.to(x.dtype), b.to(x.dtype)
        low = x.flatten(0, -2) @ a.T
        output.view(-1, len(b)).addmm_(low, b.T, alpha=scaling)
        ctx.mark_dirty(output)
        ctx.save_for_backward(x, low, a, b)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of output, x, A and B; what passes to x through the matrix itself is not counted in."""
        x, low, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, len(b))
        passed = multiply(gradient, b, ctx.scaling)
        of_x = (passed @ a).view(x.shape) if ctx.needs_input_grad[1] else None
        of_a = (passed.T @ x.flatten(0, -2)).to(ctx.learned[0]) if ctx.needs_input_grad[2] else None
        of_b = multiply(gradient.T, low, ctx.scaling).to(ctx.learned[1]) if ctx.needs_input_grad[3] else None
        return gradients[0], of_x, of_a, of_b, None


def multiply(one: torch.Tensor, other: torch.Tensor, scaling: float) -> torch.Tensor:
    """The product of two matrices, scaled within the same kernel."""
    return torch.addmm(one.new_empty(1), one, other, beta=0, alpha=scaling)


class Gate(torch.autograd.Function):
    """silu(gate) * up, of which gate and up alone are kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Takes two tensors of one shape."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of gate and up."""
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradients[0] * up, gate), functional.silu(gate).mul_(gradients[0])


def adapt(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What an adapted matrix makes of x [..., inputs], in place of PEFT's own `forward`; there is no dropout."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not names:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    parts = [(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]) for name in names]
    a, b, scaling = parts[0]
    if len(parts) == 1 and is_mergeable(layer.base_layer, x, a, b):
        return functional.linear(x, torch.addmm(layer.base_layer.weight, b, a, alpha=scaling), layer.base_layer.bias)
    output: torch.Tensor = layer.base_layer(x)
    for part in parts:
        output = AddAdapter.apply(output, x, *part)
    return output


def is_mergeable(base: torch.nn.Linear, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether one product, by a matrix that is made for the pass, does: nothing is learned, and x has so many tokens that it costs less.

    In fp32 alone, where rounding the sum of the two loses nothing that counts. The base's own matrix stays as it is.
    """
    is_exact = type(base) is torch.nn.Linear and {one.dtype for one in (base.weight, a, b, x)} == {torch.float32}
    is_long = x.numel() // x.shape[-1] * sum(base.weight.shape) > base.weight.numel()
    return is_exact and is_long and not torch.is_grad_enabled()


def gate(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """What a gated MLP makes of x [..., width]."""
    return mlp.down_proj(Gate.apply(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-any-return]


def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The root-mean-square norm over the last dimension of x."""
    return functional.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def choose(module: torch.nn.Module, *, is_known: bool) -> Callable[[Any, torch.Tensor], torch.Tensor] | None:
    """How the module is computed, if not as it does by itself; `is_known` says that it belongs to one of `DECODERS`."""
    if hasattr(module, "lora_A") and isinstance(module.base_layer, torch.nn.Linear):
        return adapt
    name = type(module).__name__
    if is_known and name.endswith("RMSNorm"):
        return norm
    if is_known and name.endswith("MLP") and "silu" in str(getattr(module.config, "hidden_act", "")):
        return gate
    return None


@contextlib.contextmanager
def used(model: Any) -> Iterator[None]:
    """Let the model's layers compute so."""
    is_known = model.config.model_type in DECODERS
    before: list[tuple[Any, Any]] = []
    for module in model.modules():
        if compute := choose(module, is_known=is_known):
            before.append((module, vars(module).get("forward")))
            module.forward = functools.partial(compute, module)
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward
