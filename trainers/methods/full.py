"""All weights of a base: `full` on the labels, `pretrain` on texts; the result is a base of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage import artifacts


def begin(base: Any) -> Any:
    """The base itself with every weight trainable: there may be no room for a second one."""
    return base.requires_grad_(requires_grad=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write an ordinary Hugging Face checkpoint (safetensors) and return its digest."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return artifacts.digest_folder(folder)
