"""What a base's `config.json` says of it, and which bases that rules out before their weights are loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from trainers.spec import SpecRefusedError, is_stored_in_4bit

CONFIG = "config.json"
LOCAL: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""How every file of a base is read: nothing downloaded, no code from the folder."""
UNREADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError)
DEVICE_FAULTS = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)
"""What the folder is not to blame for."""
NEEDS_CODE = (
    "it needs code of its own (auto_map), and no code from a model folder is ever run: "
    "take a base whose architecture is a part of transformers, such as Llama, Mistral or Qwen"
)


@contextmanager
def refusing(said: str) -> Iterator[None]:
    """Turn what transformers raises at a base that it can't read into `SpecRefusedError`, `said` and the reason."""
    try:
        yield
    except DEVICE_FAULTS:
        raise
    except UNREADABLE as error:
        reason = NEEDS_CODE if "trust_remote_code" in str(error) else error
        raise SpecRefusedError(f"{said}: {reason}") from error
    except Exception as error:  # A wrong file may break transformers and tokenizers in any way.
        raise SpecRefusedError(f"{said}: {tell_fault(error)}") from error


def tell_fault(error: Exception) -> str:
    """An error that names no file, in one line with the remedy."""
    said = " ".join(str(error).split())
    return f"its config.json or another file is wrong ({type(error).__name__}: {said}): copy the base completely again"


def check(folder: Path) -> None:
    """Raise `SpecRefusedError` when `config.json` tells that the base can neither be trained nor scored here."""
    is_in_4bit(folder)
    with refusing(f"{folder} can't be loaded as a causal language model"):
        config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
        kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    if len(kinds) > 1:
        raise SpecRefusedError(
            f"{folder} mixes kinds of attention ({config.model_type}: {', '.join(sorted(kinds))}): take a Llama- or Mistral-type base"
        )


def is_in_4bit(folder: Path) -> bool:
    """Whether the weights are stored in bitsandbytes' 4 bits. Raises `SpecRefusedError` when they are quantised in another way."""
    settings = read_settings(folder)
    stored = settings.get("quantization_config")
    if not stored:
        return False
    if is_stored_in_4bit(settings):
        return True
    stored = stored if isinstance(stored, Mapping) else {}
    method = stored.get("quant_method", "bitsandbytes" if "load_in_4bit" in stored else "an unknown method")
    kind = "bitsandbytes in 8 bits" if stored.get("load_in_8bit") else method
    raise SpecRefusedError(
        f"{folder} is quantised by {kind} (quantization_config of its config.json): "
        "take the same model in 16 bits, or in bitsandbytes' 4 bits with method qlora"
    )


def read_number(folder: Path, name: str) -> int:
    """A number of the base's `config.json`."""
    settings = read_settings(folder)
    try:
        return int(settings.get(name) or settings["text_config"][name])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise SpecRefusedError(f"{folder / CONFIG} names no {name}: is this a language model?") from error


def read_ends(folder: Path) -> set[int]:
    """The tokens that `config.json` begins and ends texts with (`bos_token_id`, `eos_token_id`): of each none, one or several."""
    settings = read_settings(folder)
    inner = settings["text_config"] if isinstance(settings.get("text_config"), Mapping) else {}
    named = [settings.get(name, inner.get(name)) for name in ("bos_token_id", "eos_token_id")]
    return {token for given in named for token in (given if isinstance(given, list) else [given]) if type(token) is int}


def has_usual_ends(folder: Path) -> bool:
    """Whether `config.json` names the tokens that transformers writes there where nobody chose any."""
    with refusing(f"{folder} can't be loaded as a causal language model"):
        usual = type(transformers.AutoConfig.from_pretrained(folder, **LOCAL))()
    return read_ends(folder) == {usual.bos_token_id, usual.eos_token_id}


def read_settings(folder: Path) -> Mapping[str, Any]:
    """What `config.json` holds. Raises `SpecRefusedError` when there is none, or it is no JSON."""
    try:
        settings = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError as error:
        raise SpecRefusedError(f"{folder} holds no config.json: name the folder of a Hugging Face checkpoint") from error
    except (OSError, ValueError) as error:
        raise SpecRefusedError(f"{folder / CONFIG} can't be read ({error}): copy the base completely again") from error
    return settings if isinstance(settings, Mapping) else {}
