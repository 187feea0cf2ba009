"""Training: our examples per second against the script of the user's own guide, same tiny model, same cases, same epochs and batch.

The guide's script is run as it stands, with only the edits that a machine without a card and the installed libraries force; each is
marked `forced`. Its padding is the next power of two above the longest case, not its own 2,048, which would only flatter us.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from rich.console import Console

from benchmarks.figures import Figure, finish
from daemon import imr
from storage import artifacts, snapshots
from trainers import bases, train
from trainers.spec import Base, LoraOptions, Model, Options, Prompt, Spec, write_spec
from trainers.stopping import Stop

LABELS = ("APPROVED", "DENIED")
PROMPT = "{% for name, value in input.items() %}{{ name }}: {{ value }}\n{% endfor %}decision:\n"
EPOCHS, BATCH, ACCUMULATION, LEARNING_RATE = 3, 4, 4, 2e-4
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    cases = list(imr.read_decisions(2001, 2005))[: asked.cases]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = make_base(work, cases)
        theirs, ours = [], []
        for run in range(asked.runs):
            theirs.append(train_as_in_the_guide(base, cases, work / f"guide-{run}"))
            ours.append(train_here(base, cases, work / f"ours-{run}"))
            console.print(f"run {run + 1}/{asked.runs}: guide {theirs[-1]:.0f}, ours {ours[-1]:.0f} examples/s")
    finish("training", [Figure("training, examples/s (best of the runs)", max(ours), max(theirs), at_least=3)])


def make_base(work: Path, cases: Sequence[dict[str, Any]]) -> Path:
    """A tiny base made from the prompts."""
    texts = work / "texts.jsonl"
    prompt = Prompt(text=PROMPT)
    texts.write_text("".join(json.dumps({"text": prompt.render(case["input"])}) + "\n" for case in cases))
    console.print("making the tiny base")
    command = [sys.executable, "-m", "trainers.tiny", "--texts", str(texts), "--out", str(work / "base"), "--epochs", "1"]
    subprocess.run(command, check=True, capture_output=True)
    return work / "base"


def train_here(base: Path, cases: Sequence[dict[str, Any]], run_dir: Path) -> float:
    """Examples per second of our loop, from the first step to the last."""
    rows = [
        snapshots.Row(case["claim_id"], hashlib.sha256(case["group"].encode()).hexdigest(), "train", "import", case["claim_id"],
                      json.dumps(case["input"]), "{}", case["answer"], None, case["occurred_at"])
        for case in cases
    ]  # fmt: skip
    manifest = snapshots.write(run_dir / "snapshot", rows, {})
    spec = Spec(
        run_id=run_dir.name,
        kind="train",
        agent="adjudication",
        base=Base(path=base, digest=artifacts.digest_folder(base)),
        dataset=run_dir / "snapshot",
        dataset_digest=manifest["root"],
        candidate=Model(name="candidate", prompt=Prompt(text=PROMPT), labels=LABELS),
        options=Options(learning_rate=LEARNING_RATE, epochs=EPOCHS, batch_rows=BATCH * ACCUMULATION, lora=LoraOptions(rank=16, alpha=32)),
    )
    write_spec(run_dir, spec)
    status, sentence = train.run(run_dir, None, bases.Bases(), Stop())
    if status:
        raise SystemExit(sentence)
    result = json.loads((run_dir / "attempts" / "1" / "result.json").read_text())
    return float(result["training"]["rows_per_second"])


def train_as_in_the_guide(base: Path, cases: Sequence[dict[str, Any]], output_dir: Path) -> float:
    """The guide's finetune_lora: examples per second of `trainer.train()`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)  # forced: fp32 on CPU, `dtype`, no device map
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    lora_config = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "k_proj", "o_proj"], lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config)
    prompt = Prompt(text=PROMPT)
    records = [{"instruction": prompt.render(case["input"]), "output": case["answer"]} for case in cases]
    texts = [f"### Instruction:\n{record['instruction']}\n\n### Response:\n{record['output']}" for record in records]
    longest = max(len(ids) for ids in tokenizer(texts)["input_ids"])
    length = 1 << longest.bit_length()

    def tokenize_function(examples: Any) -> Any:
        prompts = [f"### Instruction:\n{i}\n\n### Response:\n{o}" for i, o in zip(examples["instruction"], examples["output"], strict=True)]
        tokens = tokenizer(prompts, truncation=True, max_length=length, padding="max_length")
        tokens["labels"] = [list(ids) for ids in tokens["input_ids"]]  # forced: without labels the Trainer has no loss
        return tokens

    tokenized = datasets.Dataset.from_list(records).map(tokenize_function, batched=True, remove_columns=["instruction", "output"])
    arguments = transformers.TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=LEARNING_RATE,
        use_cpu=True,  # forced: no card, so no fp16
        logging_steps=10,
        save_strategy="epoch",
        eval_strategy="no",  # forced: renamed
        warmup_steps=100,
        lr_scheduler_type="cosine",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=tokenized, processing_class=tokenizer)  # forced: renamed
    began = time.perf_counter()
    trainer.train()
    return len(cases) * EPOCHS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
