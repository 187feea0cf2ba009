"""All weights of a base: `full` on the labels, `pretrain` on texts; the result is a base of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from storage import artifacts


def begin(base: Any) -> Any:
    """The base itself with every weight trainable: there may be no room for a second one."""
    return base.requires_grad_(requires_grad=True)


def save_model(model: Any, tokenizer: Any, folder: Path) -> str:
    """Write an ordinary Hugging Face checkpoint (safetensors) with the base's generation settings and return its digest."""
    settings, model.generation_config = model.generation_config, transformers.GenerationConfig()
    model.save_pretrained(folder)
    # Many checkpoints say `do_sample: false` beside a temperature: servers read that, and transformers refuses to write it.
    settings.to_json_file(folder / transformers.utils.GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    return artifacts.digest_folder(folder)
