"""Next-token training of all weights on plain texts, for small models: it makes the tiny base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from storage import artifacts


def begin(base: Any) -> Any:
    """A copy of the base in fp32 with all weights trainable: the one in memory stays as it is for later runs."""
    model = copy.deepcopy(base).float()
    return model.requires_grad_(requires_grad=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write an ordinary Hugging Face checkpoint (safetensors) and return its digest."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return artifacts.digest_folder(folder)
