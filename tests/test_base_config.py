"""Which bases a run refuses before it loads their weights, by what their files say, and that none of their code is ever run."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from tokenizers.trainers import BpeTrainer

from tests import training_fixtures as runs
from tests.model_fixtures import LLAMA_3, LLAMA_3_MARKS, PROMPT, tiny_base, tiny_tokenizer
from trainers import base_config, bases, score, spec

TEXTS = {"method": "pretrain", "epochs": 1}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base that is stored in bitsandbytes' 4 bits."""
    folder = tmp_path_factory.mktemp("small")
    for part in bases.load_base(tiny_base(folder / "base"), "cpu", in_4bit=True):
        part.save_pretrained(folder / "small")
    return folder / "small"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("The patient was seen on Monday. " * 40)
    return path


def set_keys(path, **settings):
    """Change a JSON file of a base."""
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"method": "lora"}, "and method lora trains on whole weights: use method qlora"),
        ({"method": "full"}, "and method full trains on whole weights: name the same model in 16 bits as base"),
        (TEXTS, "and method pretrain trains on whole weights: name the same model in 16 bits as base"),
        (TEXTS | {"pretrain": {"weights": "all"}}, "and method pretrain trains on whole weights: name the same model in 16 bits as base"),
    ],
)
def test_a_base_that_is_stored_in_4_bits_is_refused_by_methods_that_need_whole_weights(tmp_path, small, data, texts, options, remedy):
    reason = runs.refuse(tmp_path, runs.make_spec(small, data, options, texts=texts))
    assert "small is stored in 4 bits" in reason
    assert remedy in reason


@pytest.mark.parametrize("serve_in_4bit", [False, True])
def test_a_base_that_is_stored_in_4_bits_is_trained_by_qlora_and_examined_as_it_is_stored(tmp_path, small, data, serve_in_4bit):
    options = {"method": "qlora", "lora": {"rank": 8, "alpha": 16}, "learning_rate": 1e-2, "epochs": 6, "serve_in_4bit": serve_in_4bit}
    claims = runs.score_set(tmp_path / "recent.parquet", range(100, 120))
    asked = runs.make_spec(small, data, options, others=(runs.model("bare"),), score_sets=(claims,))
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert runs.result(tmp_path)["training"]["dev_accuracy"] > 0.8
    answered = {one.model for one in score.read_scores(tmp_path / "attempts" / "1" / "scores.parquet")}
    assert answered == {"toy-v1.0", "bare"}


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "bitsandbytes in 8 bits"),
        ("gptq", "an unknown method"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_that_is_quantised_in_another_way_is_refused_before_weights_are_loaded(tmp_path, data, stored, kind, method):
    base = tiny_base(tmp_path / "base")
    set_keys(base / "config.json", quantization_config=stored)
    reason = runs.refuse(tmp_path / "run", runs.make_spec(base, data, {"method": method}))
    assert f"is quantised by {kind} (quantization_config of its config.json): take the same model in 16 bits" in reason
    with pytest.raises(spec.SpecRefusedError, match=kind):
        bases.load_base(base, "cpu")


@pytest.mark.parametrize("is_written", [True, False])
def test_a_base_that_mixes_kinds_of_attention_is_refused_before_weights_are_loaded(tmp_path, data, is_written):
    base = tiny_base(tmp_path / "base", "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1)
    config = json.loads((base / "config.json").read_text())
    assert set(config["layer_types"]) == {"full_attention", "sliding_attention"}
    if not is_written:  # as in a file that an earlier transformers wrote
        del config["layer_types"]
        (base / "config.json").write_text(json.dumps(config))
    reason = runs.refuse(tmp_path / "run", runs.make_spec(base, data))
    assert "mixes kinds of attention (qwen2: full_attention, sliding_attention): take a Llama- or Mistral-type base" in reason
    with pytest.raises(spec.SpecRefusedError, match="mixes kinds"):
        bases.load_base(base, "cpu")


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        ({"bos_token_id": 900, "eos_token_id": 901}, "the tokens [900, 901], which the tokenizer has no tokens [900, 901] for"),
        ({"bos_token_id": 0, "eos_token_id": [1, 900]}, "the tokens [0, 1, 900], which the tokenizer has no tokens [900] for"),
        ({"bos_token_id": 100, "eos_token_id": 101}, "the tokens [100, 101], which are ordinary words in the tokenizer"),
        ({"bos_token_id": None, "eos_token_id": [101, 102]}, "the tokens [101, 102], which are ordinary words in the tokenizer"),
    ],
)
def test_a_tokenizer_that_is_not_that_of_the_weights_is_refused_though_it_is_smaller(tmp_path, data, named, problem):
    base = tiny_base(tmp_path / "base", vocab_size=1000)
    set_keys(base / "config.json", **named)
    reason = runs.refuse(tmp_path / "run", runs.make_spec(base, data))
    assert f"{problem}: put the checkpoint's own tokenizer there" in reason


@pytest.mark.parametrize(
    ("named", "own"),
    [
        ({"bos_token_id": 0, "eos_token_id": [1, 4, 5]}, {"eos_token": "<|eot_id|>"}),  # Llama 3 Instruct
        ({"bos_token_id": 0, "eos_token_id": 1}, {"eos_token": "<|eot_id|>"}),  # a fine-tuned model that ends otherwise than its base
        ({"bos_token_id": 1, "eos_token_id": 5}, {"bos_token": None, "eos_token": "<|eot_id|>"}),  # Qwen2.5 Instruct
        ({"bos_token_id": 100, "eos_token_id": 1}, {}),  # a first token that the architecture has by default
        ({"bos_token_id": None, "eos_token_id": None}, {}),
    ],
)
def test_a_tokenizer_may_begin_and_end_otherwise_than_the_config_says(tmp_path, named, own):
    tokenizer = tiny_tokenizer(LLAMA_3, LLAMA_3_MARKS)
    for name, token in own.items():
        setattr(tokenizer, name, token)
    base = tiny_base(tmp_path / "base", tokenizer=tokenizer)
    set_keys(base / "config.json", **named)
    loaded = bases.Bases().tokenizer(runs.base_of(base))
    assert {name: getattr(loaded, name) for name in own} == own


def test_tokens_that_nobody_chose_tell_nothing_of_the_tokenizer(tmp_path):
    words = Tokenizer(models.BPE())
    words.train_from_iterator(["Claim: approved or denied"], BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    base = tiny_base(tmp_path / "base", tokenizer=tokenizer, vocab_size=100)
    usual = transformers.LlamaConfig()
    assert (usual.bos_token_id, usual.eos_token_id) == (1, 2)
    set_keys(base / "config.json", bos_token_id=1, eos_token_id=2)
    assert bases.Bases().tokenizer(runs.base_of(base)).eos_token_id == len(tokenizer) - 1
    set_keys(base / "config.json", bos_token_id=1, eos_token_id=3)
    with pytest.raises(spec.SpecRefusedError, match="which are ordinary words"):
        bases.Bases().tokenizer(runs.base_of(base))


def test_an_inner_part_of_the_config_that_is_none_names_no_tokens(tmp_path):
    base = tiny_base(tmp_path / "base")
    set_keys(base / "config.json", text_config="abc", bos_token_id=None, eos_token_id=None)
    assert base_config.read_ends(base) == set()


CHAT = spec.Prompt(text=PROMPT, form="chat")


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (TEXTS, {"candidate": None, "dataset": None}),
        (TEXTS, {}),
        (TEXTS | {"pretrain": {"weights": "all"}}, {}),
        ({"method": "lora"}, {}),
    ],
)
def test_texts_are_read_only_by_a_tokenizer_that_can_end_them(tmp_path, data, texts, options, changes):
    tokenizer = tiny_tokenizer(LLAMA_3, LLAMA_3_MARKS)
    tokenizer.eos_token = None
    base = tiny_base(tmp_path / "base", tokenizer=tokenizer)
    read = {"general_texts": texts} if options["method"] == "lora" else {"texts": texts}
    asked = runs.make_spec(base, data, options, **({"candidate": runs.model(prompt=CHAT)} | read | changes))
    reason = runs.refuse(tmp_path / "run", asked)
    assert (
        f"the tokenizer in {base} has no end-of-sequence token, with which every text ends: name one in its tokenizer_config.json" in reason
    )


CODE = """
open({marker!r}, "w").close()
import transformers


class Config(transformers.LlamaConfig):
    model_type = "own"


class Model(transformers.LlamaForCausalLM):
    config_class = Config


class Tokenizer(transformers.PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "config.json": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    "tokenizer_config.json": {"AutoTokenizer": [None, "own.Tokenizer"]},
}


def base_with_code(folder, names):
    """A base with code of its own, which leaves a marker beside the folder when it runs."""
    base = tiny_base(folder / "base")
    (base / "own.py").write_text(CODE.format(marker=str(folder / "marker")))
    for name in names:
        set_keys(base / name, auto_map=CLASSES[name])
    return base


@pytest.mark.parametrize("name", CLASSES)
def test_the_code_of_a_base_is_never_run_where_transformers_has_its_own(tmp_path, data, name):
    base = base_with_code(tmp_path, [name])
    assert runs.perform(tmp_path / "run", runs.make_spec(base, data, {"epochs": 1})) == spec.EXIT_DONE
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("config.json", {"model_type": "own"}), ("tokenizer_config.json", {"tokenizer_class": "Tokenizer"})],
)
def test_a_base_that_needs_code_of_its_own_is_refused_and_its_code_is_not_run(tmp_path, data, name, settings):
    base = base_with_code(tmp_path, CLASSES)
    set_keys(base / name, **settings)
    reason = runs.refuse(tmp_path / "run", runs.make_spec(base, data))
    assert "needs code of its own (auto_map), and no code from a model folder is ever run: take a base" in reason
    assert "trust_remote_code" not in reason
    assert not (tmp_path / "marker").exists()
