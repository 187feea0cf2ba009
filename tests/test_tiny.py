import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import transformers

from daemon import cli
from tests import training_fixtures as runs
from tests.model_fixtures import PROMPT, claim
from trainers import attention, bases, encoding, loop, spec, stopping, tiny
from trainers import texts as corpora

TEMPLATE = spec.Prompt(text=PROMPT)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": TEMPLATE.render(claim(number))}) + "\n" for number in range(64)))
    return path


def make(texts, out, epochs=3):
    return tiny.make_tiny(texts, out, tiny.OPTIONS.model_copy(update={"epochs": epochs}), 1, "cpu", 1, stopping.Stop())


def mean_loss(folder, texts):
    model, tokenizer = bases.load_base(folder, "cpu")
    with attention.packed(model):
        corpus = corpora.tokenize(texts, tokenizer, 512, folder.parent / ".cache", str(folder))
        found = loop.mean_loss(model, list(corpus), 4096)
    shutil.rmtree(folder.parent / ".cache")
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory, texts):
    out = tmp_path_factory.mktemp("made") / "tiny"
    assert make(texts, out)[0] == spec.EXIT_DONE
    return out


def test_the_base_is_an_ordinary_checkpoint_of_about_a_million_parameters(base):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, use_safetensors=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (4, 128)
    assert 7e5 < model.num_parameters() < 1.1e6
    assert {path.suffix for path in base.iterdir()} == {".json", ".safetensors", ".jinja"}


def test_the_base_learned_its_texts(base, texts, tmp_path):
    tiny.start_from_nothing(texts, tmp_path / "untrained", seed=1)
    assert mean_loss(base, texts) < mean_loss(tmp_path / "untrained", texts) - 1


def test_nothing_but_the_base_is_left_behind(base):
    assert [path.name for path in base.parent.iterdir()] == ["tiny"]


def test_any_text_can_be_written_in_the_vocabulary(base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for text in ("Überweisung für Hüfte\n", "請求 APPROVED 🦴", "\x00\t "):
        tokens = encoding.encode_prompt(tokenizer, text)
        assert tokenizer.decode(tokens[1:], clean_up_tokenization_spaces=False) == text


def test_labels_that_the_texts_lack_can_be_learned(base, tmp_path):
    asked = runs.make_spec(base, runs.dataset(tmp_path / "set"), {"learning_rate": 2e-3, "epochs": 12})
    assert runs.perform(tmp_path / "run", asked) == spec.EXIT_DONE
    training = runs.result(tmp_path / "run")["training"]
    assert training["final_loss"] < 0.3
    assert training["dev_accuracy"] > 0.8


def test_making_the_base_goes_on_where_it_was_stopped(texts, tmp_path):
    out = tmp_path / "tiny"
    said = tmp_path / "said"
    process = runs.start("trainers.tiny", "--texts", texts, "--out", out, "--epochs", 20, "--threads", 1, said=said)
    progress = tmp_path / ".tiny.making" / "attempts" / "1" / "progress.jsonl"
    while not progress.exists() or '"training"' not in progress.read_text():
        assert process.is_alive(), said.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == spec.EXIT_RESUMABLE
    assert not out.exists()
    reached = max(int(path.name.removeprefix("step-")) for path in progress.parent.glob("checkpoints/step-*"))
    assert 0 < reached < 40
    stop = stopping.Stop()
    assert tiny.make_tiny(texts, out, tiny.OPTIONS.model_copy(update={"epochs": 20}), 1, "cpu", 1, stop) == (spec.EXIT_DONE, f"done: {out}")
    assert (out / "model.safetensors").exists()


def test_a_folder_that_is_there_is_not_written_over(texts, tmp_path):
    with pytest.raises(spec.SpecRefusedError, match="exists"):
        make(texts, tmp_path)


def test_the_command_looks_for_the_texts_before_it_loads_anything(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a trainer was started"))
    assert cli.main(["model", "tiny", "--texts", "/nofile", "--out", str(tmp_path / "out")]) == 2
    assert "'--texts': file '/nofile' does not exist" in capfd.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_a_seed_that_no_run_takes_is_refused_before_anything_is_written(texts, tmp_path, seed):
    with pytest.raises(spec.SpecRefusedError, match=f"seed is {seed}: use a whole number from 0 to 2147483647"):
        tiny.make_tiny(texts, tmp_path / "out", tiny.OPTIONS, seed, "cpu", 1, stopping.Stop())
    assert not list(tmp_path.iterdir())


def test_missing_texts_are_refused(tmp_path):
    with pytest.raises(spec.SpecRefusedError, match="no file"):
        make(tmp_path / "nothing.jsonl", tmp_path / "out")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
