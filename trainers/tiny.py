"""A small Llama-type base made from nothing but texts, for laptops, tests and the demo: `python -m trainers.tiny --texts FILE --out DIR`.

Byte-level BPE of 2,048 tokens, 4 layers of width 128, 1.07 M parameters, pre-trained on the texts by the ordinary training path.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from storage import artifacts
from trainers import bases, train
from trainers import texts as corpora
from trainers.spec import EXIT_DONE, EXIT_REFUSED, SEEDS, Base, Options, PretrainOptions, Spec, SpecRefusedError, write_spec
from trainers.stopping import Stop

VOCABULARY = 2048
# A word keeps its punctuation and the space or line break before it, so `\nage_range:` is one token: two fifths of the tokens that
# GPT-2's rule makes of a claim, at the same accuracy. Whole lines would be fewer still but don't carry over to new combinations.
WORD = r"\s?\S+|\s"
# What it is asked stands as it is, for so it was in the texts.
CHAT = "{% for message in messages %}{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
START, END, PADDING = "<s>", "</s>", "<pad>"
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
CONTEXT = 2048
OPTIONS = Options(
    method="pretrain",
    pretrain=PretrainOptions(weights="all"),
    learning_rate=2e-3,
    epochs=3,
    batch_rows=32,
    max_tokens=4096,
    max_row_tokens=CONTEXT,
    accumulation=1,
    optimizer="adamw",
    recompute_layers=0,
    checkpoint_steps=50,
)


def main() -> int:
    """Make the base that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m trainers.tiny", description="Make a small base model from texts.")
    parser.add_argument("--texts", type=Path, required=True, help='JSON lines, each {"text": "…"}')
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint folder to write; it must not exist")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=OPTIONS.epochs)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; more help on idle cores only (default: 1)")
    arguments = parser.parse_args()
    stop = Stop()
    stop.listen()
    options = OPTIONS.model_copy(update={"epochs": arguments.epochs})
    try:
        status, sentence = make_tiny(arguments.texts, arguments.out, options, arguments.seed, arguments.device, arguments.threads, stop)
    except SpecRefusedError as error:
        status, sentence = EXIT_REFUSED, f"refused: {error}"
    sys.stderr.write(sentence + "\n")
    return status


def make_tiny(texts: Path, out: Path, options: Options, seed: int, device: str, threads: int, stop: Stop) -> tuple[int, str]:
    """Make the base at `out`, whole or not at all; returns the exit status and a sentence.

    The work lies in a folder beside `out`, named by it: a run that was stopped goes on there.
    """
    if out.exists():
        raise SpecRefusedError(f"{out} exists: name a new folder, or remove it")
    if seed not in SEEDS:
        raise SpecRefusedError(f"seed is {seed}: use a whole number from 0 to {SEEDS[-1]}")
    run_dir = out.with_name(f".{out.name}.making")
    start = run_dir / "base"
    if not start.exists():
        start_from_nothing(texts, start, seed)
    base = Base(path=start, digest=artifacts.digest_folder(start))
    write_spec(
        run_dir,
        Spec(
            run_id=f"tiny-{out.name}",
            kind="train",
            agent="tiny",
            base=base,
            texts=texts.absolute(),
            options=options,
            seed=seed,
            device=device,
            threads=threads,
        ),
    )
    status, sentence = train.run(run_dir, None, bases.Bases(), stop)
    if status == EXIT_DONE:
        (run_dir / "attempts" / "1" / "model").rename(out)
        shutil.rmtree(run_dir)
        return status, f"done: {out}"
    return status, sentence


def start_from_nothing(texts: Path, folder: Path, seed: int) -> None:
    """Write an untrained checkpoint whose vocabulary fits the texts."""
    if not texts.is_file():
        raise SpecRefusedError(f'texts {texts} is no file: give JSON lines, each {{"text": "…"}}')
    tokenizer = train_tokenizer(corpora.read_lines(texts))
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        model = transformers.LlamaForCausalLM(config)
        # The usual 0.02 leaves tokens that the texts lack so near to each other that no adapter could ever tell them apart.
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.hidden_size**-0.5)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.copytree(partial, folder.with_suffix(".partial"), dirs_exist_ok=True)
    os.rename(folder.with_suffix(".partial"), folder)  # noqa: PTH104


def train_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary: every text can be written in it, whatever its script."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[START, END, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PADDING, model_max_length=CONTEXT, chat_template=CHAT
    )


if __name__ == "__main__":
    sys.exit(main())
