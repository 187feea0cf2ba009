"""A tiny random language model as an ordinary checkpoint folder, made in about a second and the same every time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from storage import artifacts

LABELS = ("APPROVED", "DENIED", "PENDING")
PROMPT = "Claim for {{ input.treatment }} at age {{ input.age }}, {{ input.plan }} plan.\nDecision: "
TREATMENTS = ("surgery", "speech therapy", "imaging of the spine", "an antibiotic", "pain management", "dialysis")


def claim(number: int) -> dict[str, str]:
    """The input fields of one made-up claim; the first few hundred are all different."""
    return {"treatment": TREATMENTS[number % 6], "age": str(number // 6), "plan": "HMO" if number % 2 else "PPO"}


def tiny_tokenizer(template: str | None = None, marks: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens with `<s>`, `</s>` and `<pad>`, a chat template if given and special tokens without a name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"Claim for {t} at age 41, HMO PPO plan.\nDecision: {label}\n" for t in TREATMENTS for label in LABELS[:2]]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>", *marks],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **names)


LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_3_MARKS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def chat_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer with the chat template of a known family."""
    return tiny_tokenizer(LLAMA_3, LLAMA_3_MARKS) if name == "llama" else tiny_tokenizer(MISTRAL)


def tiny_base(
    path: Path, architecture: str = "llama", tokenizer: transformers.PreTrainedTokenizerFast | None = None, **overrides: int
) -> Path:
    """Write a random 2-layer checkpoint of width 32 (`llama` or `mistral`) to `path` and return it."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = transformers.AutoConfig.for_model(
        architecture,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,
            **overrides,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def random_adapter(base: Path, folder: Path, seed: int) -> Path:
    """Write a random LoRA adapter (rank 4) for `base` to `folder`, pinned to the base's digest, and return the folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        tuned = peft.get_peft_model(model, config)
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(folder)
    artifacts.pin_base(folder, artifacts.digest_folder(base))
    return folder


@contextlib.contextmanager
def counting_kept(model: Any) -> Iterator[Callable[[], int]]:
    """Count the bytes that are kept for the backward pass, each storage once, the model's own and what is no float not counted."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given away twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in kept.values())
