"""Plain LoRA adapters on a base in memory: checked, put on, in force or not, taken off again."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from storage import artifacts
from trainers.spec import SpecRefusedError

# At its import bitsandbytes asks some CPUs' owners for a package that speeds up what `bases.load_base` switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

from peft import LoraConfig, PeftModel  # noqa: E402  it imports bitsandbytes

ADAPTER_WEIGHTS = "adapter_model.safetensors"
# What a plain LoRA adapter may choose; anything else would change the base's own weights or get lost in an export.
ADAPTER_CHOICES = {
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "peft_version",
    "r",
    "target_modules",
    "task_type",
}


def load_adapter(model: Any, name: str, folder: Path) -> PeftModel:
    """Put a plain LoRA adapter onto the base under `name` (no dots), beside those that are there; returns the model to use from now on.

    The adapter that was active stays so. Raises `SpecRefusedError`, with the model as it was, when the folder doesn't fit.
    """
    config = read_adapter_config(folder)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = PeftModel(model, config, name, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise SpecRefusedError(f"adapter {folder} doesn't fit the base: {error}") from error
    problem = fill_adapter(model, name, folder)
    if problem:
        drop_adapter(model, name)
        raise SpecRefusedError(f"adapter {folder} doesn't fit the base: {problem}")
    return model.eval()


def fill_adapter(model: PeftModel, name: str, folder: Path) -> str | None:
    """Read the folder's weights into the adapter's empty matrices; returns what is wrong with them."""
    try:
        result = model.load_adapter(str(folder), name, torch_device=str(model.device), low_cpu_mem_usage=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        return str(error)
    strays = [*result.missing_keys, *result.unexpected_keys]
    return f"{len(strays)} tensors are missing or unknown, e.g. {strays[0]}" if strays else None


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a plain LoRA adapter in safetensors. Raises `SpecRefusedError` for any other."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise SpecRefusedError(f"{folder} holds no {ADAPTER_WEIGHTS}: name the folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads((folder / artifacts.ADAPTER_CONFIG).read_text())
        plain = LoraConfig().to_dict()
        odd = {key: value for key, value in config.items() if key not in ADAPTER_CHOICES and value != plain.get(key)}
        chosen = LoraConfig(**{key: config[key] for key in ADAPTER_CHOICES & config.keys()})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise SpecRefusedError(f"{folder / artifacts.ADAPTER_CONFIG} can't be read: {error}") from error
    if odd:
        raise SpecRefusedError(f"{folder} is no plain LoRA adapter, it sets {odd}: train it without these options")
    chosen.inference_mode = True
    return chosen


def drop_adapter(model: PeftModel, name: str) -> Any:
    """Take the adapter off again; returns the model to use from now on, which is the bare base after the last one."""
    others = [other for other in model.peft_config if other != name]
    if not others:
        return model.unload()
    if model.active_adapter == name:
        model.set_adapter(others[0], inference_mode=True)
    model.delete_adapter(name)
    return model


@contextmanager
def answering_with(model: Any, name: str | None) -> Iterator[Any]:
    """The model with the named adapter in force, or with none; what was in force before is so again afterwards."""
    if name is None:
        if not isinstance(model, PeftModel):
            yield model
            return
        with model.disable_adapter():
            yield model
        return
    before = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield model
    finally:
        model.set_adapter(before, inference_mode=model.peft_config[before].inference_mode)
