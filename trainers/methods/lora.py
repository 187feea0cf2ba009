"""Plain LoRA on every linear layer: begin fresh or warm, save what ships. On a base in 4 bits it is QLoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import safe_open
from safetensors.torch import save

from storage import artifacts
from trainers import checkpoints
from trainers.spec import Options, SpecRefusedError

WEIGHTS = "adapter_model.safetensors"


def begin(base: Any, options: Options, init_adapter: Path | None) -> Any:
    """The base with a trainable adapter on it: the one to continue from, or a new one drawn from torch's random state.

    On a base in 4 bits the adapter is in bf16, as what it is added to, and where the options say so.
    Raises `SpecRefusedError`, with the base as it was, when the one to continue from lacks tensors.
    """
    if init_adapter:
        model = continue_from(base, init_adapter)
    else:
        config = peft.LoraConfig(
            r=options.lora.rank,
            lora_alpha=options.lora.alpha,
            target_modules="all-linear",
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(base, config)
    if options.lora.dtype == "bfloat16":
        for parameter in checkpoints.trained_parameters(model).values():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()  # PEFT's own modules begin otherwise; nothing drops out


def continue_from(base: Any, folder: Path) -> Any:
    """The base with the adapter of the folder, which would be drawn at random where tensors are missing: then it is refused."""
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = set(file.keys())
    model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    if missing := sorted(list_weights(model).keys() - found):
        end(model)
        raise SpecRefusedError(
            f"adapter {folder} is not whole, {len(missing)} tensors are missing, such as {missing[0]}: copy it completely again"
        )
    return model


def list_weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's matrices by the names that they have in its file."""
    weights: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return weights


def end(model: Any) -> Any:
    """The base as it was before `begin`."""
    return model.unload()


def merge(model: Any) -> Any:
    """The base with the adapter in its weights. Raises `ValueError` when the sum is not finite."""
    return model.merge_and_unload(safe_merge=True)


def save_adapter(model: Any, folder: Path, base_digest: str) -> str:
    """Write the adapter in PEFT's format and return its digest, the same for the same weights on every machine.

    PEFT's own `save_pretrained` adds a model card with the base's path and writes layer names in an order that changes with every run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in list_weights(model).items()}
    artifacts.write_atomically(folder / WEIGHTS, save(weights))
    config = model.peft_config["default"].to_dict()
    config |= {"inference_mode": True, "target_modules": sorted(config["target_modules"])}
    artifacts.write_atomically(folder / artifacts.ADAPTER_CONFIG, json.dumps(config).encode())
    artifacts.pin_base(folder, base_digest)
    return artifacts.digest_folder(folder)
