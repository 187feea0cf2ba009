"""What a user would train with instead of Ratchet, each in a process of its own: the guide's script and TRL.

`python -m benchmarks.contenders NAME JOB` reads a job of `benchmarks.training`, trains, writes the adapter and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from trainers import memory

if TYPE_CHECKING:
    from datasets import Dataset

BATCH, ACCUMULATION, LEARNING_RATE, WARMUP = 4, 4, 2e-4, 0.05
OWN_LENGTH = 2048


@dataclass(frozen=True)
class Job:
    """What to train: cases with `prompt` and `answer` as text, and as the tokens that our own trainer reads."""

    base: Path
    out: Path
    epochs: float
    seed: int
    cases: list[dict[str, Any]]
    held_out: list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(CONTENDERS))
    parser.add_argument("job", type=Path)
    asked = parser.parse_args()
    read = json.loads(asked.job.read_text())
    seconds = CONTENDERS[asked.name](Job(**{**read, "base": Path(read["base"]), "out": Path(read["out"])}))
    print(json.dumps({"seconds": seconds, "peak_bytes": memory.read_peak("cuda" if torch.cuda.is_available() else "cpu")}))


class Clock(transformers.TrainerCallback):
    """Times the steps. On a card the first one, which loads the kernels, is not counted: ours tries its heaviest passes before its own."""

    def __init__(self) -> None:
        self.began, self.skipped = time.perf_counter(), 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  the library's own signature
        """Begin once more after the first step."""
        if torch.cuda.is_available() and state.global_step == 1:
            torch.cuda.synchronize()
            self.began, self.skipped = time.perf_counter(), 1

    def read(self, trainer: transformers.Trainer) -> float:
        """The seconds of all steps."""
        steps = trainer.state.global_step
        return (time.perf_counter() - self.began) * steps / max(1, steps - self.skipped)


def run_timed(trainer: transformers.Trainer) -> float:
    """Train; returns the seconds that the steps took."""
    clock = Clock()
    trainer.add_callback(clock)
    clock.began = time.perf_counter()
    trainer.train()
    return clock.read(trainer)


def write_as_in_the_guide(prompt: str, answer: str) -> str:
    """The guide's form of a case."""
    return f"### Instruction:\n{prompt}\n\n### Response:\n{answer}"


def train_as_in_the_guide(job: Job, length: int | None) -> float:
    """The guide's finetune_lora; its own length, or the next power of two above the longest case. Seconds of `trainer.train()`.

    What is marked `forced` the installed libraries ask for, `ours` the benchmark does; the rest is the guide's.
    """
    from datasets import load_dataset  # noqa: PLC0415  of the group bench alone

    data_file, adapter = str(job.out / "cases.jsonl"), str(job.out / "adapter")
    records = [{"instruction": case["prompt"], "output": case["answer"]} for case in job.cases]
    Path(data_file).write_text("".join(json.dumps(record) + "\n" for record in records))
    transformers.set_seed(job.seed)  # ours: each run has its seed
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.base,
        dtype=dtype,  # forced: renamed; fp32 on CPU
        device_map="auto" if torch.cuda.is_available() else None,  # forced: no card
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.base)
    lora_config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config)
    model.print_trainable_parameters()
    dataset = load_dataset("json", data_files=data_file, split="train", cache_dir=str(job.out / "cache"))  # ours: the cache
    texts = [write_as_in_the_guide(case["prompt"], case["answer"]) for case in job.cases]
    length = length or 1 << max(len(ids) for ids in tokenizer(texts)["input_ids"]).bit_length()  # ours

    def tokenize_function(examples: Any) -> Any:
        prompts = [write_as_in_the_guide(i, o) for i, o in zip(examples["instruction"], examples["output"], strict=True)]
        tokens = tokenizer(prompts, truncation=True, max_length=length, padding="max_length")
        tokens["labels"] = [list(ids) for ids in tokens["input_ids"]]  # forced: without labels the Trainer has no loss
        return tokens

    tokenized = dataset.map(tokenize_function, batched=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(job.out),
        num_train_epochs=job.epochs,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        fp16=torch.cuda.is_available(),  # forced: no fp16 on CPU
        logging_steps=10,
        save_strategy="epoch",
        eval_strategy="no",  # forced: renamed
        warmup_steps=100,
        lr_scheduler_type="cosine",
        report_to="tensorboard",
        seed=job.seed,  # ours
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=tokenized, processing_class=tokenizer)  # forced: renamed
    seconds = run_timed(trainer)
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return seconds


def train_with_trl(job: Job, *, attention: str = "sdpa", **options: Any) -> float:
    """TRL's SFTTrainer on our tokens, with our adapter, rate, schedule and batch; it evaluates as a cold job would. Seconds of training.

    `sdpa` is the libraries' default attention.
    """
    from trl import SFTConfig, SFTTrainer  # noqa: PLC0415  of the group bench alone

    rows_per_pass = options.pop("rows_per_pass", BATCH * ACCUMULATION)
    arguments = SFTConfig(
        output_dir=str(job.out),
        num_train_epochs=job.epochs,
        per_device_train_batch_size=rows_per_pass,
        learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=torch.cuda.is_available(),
        completion_only_loss=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
        model_init_kwargs={"dtype": "bfloat16" if torch.cuda.is_available() else "float32", "attn_implementation": attention},
        **({"max_length": None, "gradient_checkpointing": False} | options),
    )
    trainer = SFTTrainer(
        model=str(job.base),
        args=arguments,
        train_dataset=read_tokens(job.cases),
        eval_dataset=read_tokens(job.held_out),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"),
    )
    seconds = run_timed(trainer)
    trainer.save_model(str(job.out / "adapter"))
    trainer.evaluate()
    return seconds


def read_tokens(cases: list[dict[str, Any]]) -> Dataset:
    """Cases as TRL takes them when they are tokenised already."""
    from datasets import Dataset  # noqa: PLC0415  of the group bench alone

    return Dataset.from_list(
        [
            {
                "input_ids": case["read"] + case["graded"],
                "completion_mask": [0] * len(case["read"]) + [1] * len(case["graded"]),
            }
            for case in cases
        ]
    )


def train_with_trl_packed(job: Job, **options: Any) -> float:
    """TRL's packing, its pass as long as the mean of an effective batch: so a step has as many rows as everybody's."""
    tokens = [len(case["read"]) + len(case["graded"]) for case in job.cases]
    length = max(*tokens, round(BATCH * ACCUMULATION * sum(tokens) / len(tokens)))
    return train_with_trl(job, packing=True, max_length=length, rows_per_pass=1, **options)


CONTENDERS: dict[str, Callable[[Job], float]] = {
    "guide": lambda job: train_as_in_the_guide(job, None),
    "guide-2048": lambda job: train_as_in_the_guide(job, OWN_LENGTH),
    "trl": train_with_trl,
    "trl-padding-free": lambda job: train_with_trl(job, padding_free=True),
    "trl-packing": train_with_trl_packed,
    "trl-packing-flash": lambda job: train_with_trl_packed(job, attention="flash_attention_2"),
    "trl-packing-checkpointed": lambda job: train_with_trl(
        job, packing=True, max_length=1024, rows_per_pass=1, gradient_checkpointing=True
    ),
}


if __name__ == "__main__":
    main()
