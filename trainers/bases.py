"""The base model that a process holds: checked against its digest, loaded once, kept for the next run."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from storage import artifacts
from trainers import base_config, forms
from trainers.spec import Base, SpecRefusedError

Misfit = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor, its shape in the file, and the one that `config.json` gives it."""
TENSORS_NAMED = 3


class Bases:
    """One base in memory at a time, and the digests of those that were read before."""

    def __init__(self) -> None:
        self._loaded: tuple[str, str, bool] | None = None
        self._model: Any = None
        self._tokenizers: dict[str, Any] = {}
        self._checked: dict[str, artifacts.Fingerprint] = {}

    def check(self, base: Base) -> None:
        """Raise `SpecRefusedError` unless the folder's files are those that the digest names, of a base that can be used here.

        They are read again only when one of them changed.
        """
        fingerprint = artifacts.take_fingerprint(artifacts.list_files(base.path))
        if self._checked.get(base.digest) == fingerprint:
            return
        try:
            artifacts.check(base.path, base.digest)
        except (OSError, artifacts.DigestMismatchError) as error:
            raise SpecRefusedError(f"the base model: {error}") from error
        base_config.check(base.path)
        self._checked[base.digest] = fingerprint

    def tokenizer(self, base: Base) -> Any:
        """The base's tokenizer, without its weights; read once."""
        if base.digest not in self._tokenizers:
            self._tokenizers[base.digest] = read_tokenizer(base.path)
        return self._tokenizers[base.digest]

    def load(self, base: Base, device: str, *, in_4bit: bool = False) -> tuple[Any, Any]:
        """The model and the tokenizer, from memory when the last run used the same ones."""
        if self._loaded != (base.digest, device, in_4bit):
            self.release()  # The old one leaves before the new one comes: both may not fit.
            self._model, self._tokenizers[base.digest] = load_base(base.path, device, in_4bit=in_4bit)
            self._loaded = (base.digest, device, in_4bit)
        return self._model, self._tokenizers[base.digest]

    def release(self) -> None:
        """Let the base go, for it is needed no more or was changed by training."""
        if self._loaded:
            self._loaded = self._model = None
            gc.collect()  # What was trained may hang in a cycle with its optimizer.


def load_base(path: Path, device: str, *, in_4bit: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a local checkpoint, ready to score: safetensors only, no code from the folder, nothing downloaded.

    fp32 on CPU, bf16 elsewhere; `in_4bit` NF4 with double quantisation, computed in bf16 everywhere. A base that is stored in 4 bits
    is held as it is stored. Raises `SpecRefusedError` when the folder is no such checkpoint, or not the whole of it.
    """
    base_config.check(path)
    is_stored_so = base_config.is_in_4bit(path)
    in_4bit = in_4bit or is_stored_so
    tokenizer = read_tokenizer(path)
    with base_config.refusing(f"{path} can't be loaded as a causal language model in safetensors"):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32 if device == "cpu" and not in_4bit else torch.bfloat16,
            attn_implementation="sdpa",
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # They are refused below, by name.
            output_loading_info=True,
            **({"device_map": {"": device}} if in_4bit else {}),
            **({"quantization_config": quantize()} if in_4bit and not is_stored_so else {}),
            **base_config.LOCAL,
        )
    check_tensors(path, model, found)
    if not in_4bit:
        return model.to(device).eval(), tokenizer
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else some CPUs lay the weights out anew, a little rounded, at the first answer: what is learned would depend on it.
            module.support_avx512bf16_for_cpu = False
    return model.eval(), tokenizer


def read_tokenizer(path: Path) -> Any:
    """The tokenizer of a local checkpoint. Raises `SpecRefusedError` when there is none, or another checkpoint's."""
    with base_config.refusing(f"{path} has no tokenizer that can be loaded"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **base_config.LOCAL)
    check_vocabulary(tokenizer, path)
    check_ends(tokenizer, path)
    return tokenizer


def check_tensors(path: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Raise `SpecRefusedError` when tensors are missing or don't fit: transformers would draw them at random."""
    if missing := sorted(found["missing_keys"]):
        some = ", ".join(missing[:TENSORS_NAMED])
        raise SpecRefusedError(f"{path} is not whole, {len(missing)} tensors are missing, such as {some}: copy the base completely again")
    for name, shape, wanted in sorted([*found["mismatched_keys"], *find_misfits(model)]):
        misfit = f"{name} is {list(shape)} and not {list(wanted)}"
        raise SpecRefusedError(f"{path / 'config.json'} is not that of the weights, {misfit}: copy the base completely again")


def find_misfits(model: Any) -> Iterator[Misfit]:
    """The matrices that have another shape than their layer. On a base in 4 bits transformers compares none."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            wanted = (layer.out_features, layer.in_features)
        elif isinstance(layer, torch.nn.Embedding):
            wanted = (layer.num_embeddings, layer.embedding_dim)
        else:
            continue
        packed = getattr(layer.weight, "quant_state", None)
        shape = tuple((packed or layer.weight).shape)
        if shape != wanted and (packed or layer.weight.is_floating_point()):  # Other ways to quantise pack by rules of their own.
            yield f"{name}.weight", shape, wanted


def quantize() -> transformers.BitsAndBytesConfig:
    """How a base is loaded in 4 bits: Dettmers et al. 2023, "QLoRA: efficient finetuning of quantized LLMs"."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def read_context(base: Base) -> int:
    """How many tokens the base can read at once, from its `config.json`."""
    return base_config.read_number(base.path, "max_position_embeddings")


def check_vocabulary(tokenizer: Any, path: Path) -> None:
    """Raise `SpecRefusedError` when the tokenizer knows tokens that the weights have no row for: it is another checkpoint's."""
    size = base_config.read_number(path, "vocab_size")
    if len(tokenizer) > size:
        raise SpecRefusedError(
            f"the tokenizer in {path} has {len(tokenizer)} tokens, the weights know {size}: put the checkpoint's own tokenizer there"
        )


def check_ends(tokenizer: Any, path: Path) -> None:
    """Raise `SpecRefusedError` when the tokens that the weights begin and end texts with are no such tokens in the tokenizer.

    They need not be the tokenizer's own: an instruct model may end a turn with another token than `config.json` ends a text with. What
    transformers writes where nobody chose any counts for nothing.
    """
    named = base_config.read_ends(path)
    marks = forms.find_special(tokenizer).keys() | tokenizer.added_tokens_decoder.keys()
    if absent := sorted(named - set(tokenizer.get_vocab().values())):
        problem = f"which the tokenizer has no tokens {absent} for"
    elif named and not named & marks and not (tokenizer.eos_token and base_config.has_usual_ends(path)):
        problem = "which are ordinary words in the tokenizer"
    else:
        return
    raise SpecRefusedError(
        f"the tokenizer in {path} is not that of the weights: config.json begins and ends texts with the tokens {sorted(named)}, "
        f"{problem}: put the checkpoint's own tokenizer there"
    )


def check_device(device: str) -> None:
    """Raise `SpecRefusedError` when this machine has no such device."""
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise SpecRefusedError(f"device {device!r} is none: use cpu, cuda or cuda:N") from error
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise SpecRefusedError(
            f'device {device!r} is not here ({torch.cuda.device_count()} CUDA cards): set device = "cpu" or check the driver'
        )
