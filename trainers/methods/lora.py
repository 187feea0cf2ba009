"""Plain LoRA on every linear layer: begin fresh or warm, save what ships."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save

from storage import artifacts
from trainers.spec import LoraOptions

WEIGHTS = "adapter_model.safetensors"


def begin(base: Any, options: LoraOptions, init_adapter: Path | None) -> Any:
    """The base with a trainable adapter on it: the one to continue from, or a new one drawn from torch's random state."""
    if init_adapter:
        return peft.PeftModel.from_pretrained(base, str(init_adapter), is_trainable=True)
    config = peft.LoraConfig(
        r=options.rank, lora_alpha=options.alpha, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(base, config)


def end(model: Any) -> Any:
    """The base as it was before `begin`."""
    return model.unload()


def save_adapter(model: Any, folder: Path, base_digest: str) -> str:
    """Write the adapter in PEFT's format and return its digest, the same for the same weights on every machine.

    PEFT's own `save_pretrained` adds a model card with the base's path and writes layer names in an order that changes with every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    artifacts.write_atomically(folder / WEIGHTS, save({name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}))
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])}
    artifacts.write_atomically(folder / artifacts.ADAPTER_CONFIG, json.dumps(config).encode())
    artifacts.pin_base(folder, base_digest)
    return artifacts.digest_folder(folder)
