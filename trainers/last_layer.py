"""The last layer of a model of which only some positions are read: what follows its keys and values runs on those alone.

What it would make of the others reaches nothing, so losses, gradients and scores stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

NARROWED = ("self_attn.q_proj", "self_attn.o_proj", "mlp")


@contextlib.contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """Let a forward pass name the positions that are read of it, `asked`; to the language-model head they are named by `logits_to_keep`.

    A model whose layers have other names than Llama's computes all of them.
    """
    last = getattr(model.get_decoder(), "layers", [torch.nn.Identity()])[-1]
    asked: torch.Tensor | None = None
    positions = 0

    def note(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: Mapping[str, Any]) -> None:
        nonlocal asked, positions
        asked, positions = options.get("asked"), inputs[0].shape[1]

    def pick(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return inputs if asked is None else (inputs[0].index_select(1, asked),)

    def spread(_: torch.nn.Module, __: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        if asked is None:
            return output
        return output.new_zeros(len(output), positions, output.shape[2]).index_copy(1, asked, output)

    # A hook of the layer itself runs again when its activations are computed a second time in the backward pass.
    hooks = [last.register_forward_pre_hook(note, with_kwargs=True)]
    for name, module in last.named_modules():
        if name in NARROWED:
            hooks += [module.register_forward_pre_hook(pick), module.register_forward_hook(spread)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
