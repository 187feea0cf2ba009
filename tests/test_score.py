import json
import types
from pathlib import Path

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from peft.tuners import tuners_utils
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from storage import artifacts
from tests.model_fixtures import LABELS, PROMPT, claim, random_adapter, tiny_base
from trainers import adapters, attention, bases, encoding, last_layer, lean_layers, score, trees
from trainers.spec import Base, Prompt, SpecRefusedError


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def base(base_folder):
    return bases.load_base(base_folder, "cpu")


@pytest.fixture(scope="module")
def prompts():
    template = Prompt(text=PROMPT)
    return [template.render(claim(number)) + "x" * (number % 7) for number in range(40)]


def separate_forwards(model, tokenizer, prompts, labels):
    """The definition: one forward pass for each prompt and label, all logits, no padding and no mask of ours."""
    rows = []
    for prompt in prompts:
        read = encoding.encode_prompt(tokenizer, prompt)
        row = []
        for label in labels:
            tokens = encoding.label_tokens(tokenizer, label)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([read + tokens])).logits[0].double().log_softmax(-1)
            row.append(sum(float(logits[len(read) - 1 + step, token]) for step, token in enumerate(tokens)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("labels", [LABELS, ("DENIED", "APPROVED"), ("A", "AB", "ABC and more")])
@pytest.mark.parametrize("max_tokens", [1, 200, 4096])
def test_one_pass_equals_a_separate_pass_for_each_label(tmp_path, prompts, architecture, labels, max_tokens):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base", architecture), "cpu")

    scores = score.score_prompts(model, tokenizer, prompts[:9], labels, max_tokens=max_tokens)

    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, separate_forwards(model, tokenizer, prompts[:9], labels), atol=1e-4, rtol=0)


def test_a_sliding_window_shorter_than_the_prompt_is_kept(tmp_path, prompts):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base", "mistral", sliding_window=6), "cpu")

    scores = score.score_prompts(model, tokenizer, prompts[:9], LABELS, max_tokens=4096)

    np.testing.assert_allclose(scores, separate_forwards(model, tokenizer, prompts[:9], LABELS), atol=1e-4, rtol=0)


def count_beginnings(prompts):
    """How many tokens a tree of the prompts has."""
    return len({tuple(prompt[:end]) for prompt in prompts for end in range(1, len(prompt) + 1)})


POLICY = "Coverage follows the plan. Surgery needs a referral, imaging a diagnosis, and dialysis neither of them.\n" * 2


@pytest.mark.parametrize("window", [None, 6, 80])
@pytest.mark.parametrize("max_tokens", [1, 200, 4096])
def test_a_policy_that_all_prompts_begin_with_is_read_once_and_changes_no_score(tmp_path, prompts, window, max_tokens):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base", "mistral", sliding_window=window), "cpu")
    asked = [POLICY + prompt for prompt in prompts[:12]]
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].numel()))
    try:
        scores = score.score_prompts(model, tokenizer, asked, LABELS, max_tokens=max_tokens)
    finally:
        hook.remove()

    encoded = [encoding.encode_prompt(tokenizer, prompt) for prompt in asked]
    branches = len(trees.build_branches([encoding.label_tokens(tokenizer, label) for label in LABELS]).tokens)
    assert sum(read) == count_beginnings(encoded) + len(encoded) * branches < sum(map(len, encoded))
    np.testing.assert_allclose(scores, separate_forwards(model, tokenizer, asked, LABELS), atol=1e-4, rtol=0)


def test_scores_come_in_the_order_of_the_prompts_with_repetitions(base, prompts):
    once = score.score_prompts(*base, prompts, LABELS, max_tokens=300)
    order = [3, 0, 3, 39, 7, 3]

    again = score.score_prompts(*base, [prompts[row] for row in order], LABELS, max_tokens=4096)

    np.testing.assert_allclose(again, once[order], atol=1e-5)
    assert (again[0] == again[2]).all()


def test_no_prompts_give_no_scores(base):
    assert score.score_prompts(*base, [], LABELS, max_tokens=100).shape == (0, 3)


def test_labels_with_the_same_tokens_are_refused(base):
    with pytest.raises(SpecRefusedError, match="same tokens"):
        score.score_prompts(*base, ["x"], ("DENIED", "DENIED"), max_tokens=100)


def test_damaged_weights_are_reported_and_not_scored(tmp_path):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan

    with pytest.raises(score.LogitsNotFiniteError, match="NaN"):
        score.score_prompts(model, tokenizer, ["a claim"], LABELS, max_tokens=100)


def test_scoring_leaves_a_model_in_training_mode_as_it_was(base):
    model, tokenizer = base
    model.train()
    score.score_prompts(model, tokenizer, ["a claim"], LABELS, max_tokens=100)
    assert model.training
    model.eval()


def test_a_base_is_loaded_from_safetensors_in_a_local_folder_only(tmp_path, base_folder):
    with pytest.raises(SpecRefusedError, match="holds no config"):
        bases.load_base(Path("gpt2"), "cpu")
    pickled = tiny_base(tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(SpecRefusedError, match="safetensors"):
        bases.load_base(pickled, "cpu")
    damaged = tiny_base(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(SpecRefusedError, match="damaged"):
        bases.load_base(damaged, "cpu")


def rewrite(folder, name, keep=lambda tensor: True, **settings):
    """Leave some tensors of a checkpoint out of its file, and put other settings into its `config.json`."""
    kept = {tensor: value for tensor, value in load_file(folder / name).items() if keep(tensor)}
    save_file(kept, folder / name, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_base_that_lacks_tensors_is_refused_and_not_filled_up_at_random(tmp_path, in_4bit):
    folder = rewrite(tiny_base(tmp_path / "half"), "model.safetensors", keep=lambda tensor: ".layers.1." not in tensor)
    with pytest.raises(
        SpecRefusedError, match=r"half is not whole, 9 tensors .* model\.layers\.1\.input_layernorm.*copy the base completely"
    ):
        bases.load_base(folder, "cpu", in_4bit=in_4bit)


def test_a_base_whose_head_is_its_embedding_is_whole_without_a_head_of_its_own(tmp_path):
    folder = tiny_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    for in_4bit in (False, True):
        bases.load_base(folder, "cpu", in_4bit=in_4bit)
    rewrite(folder, "model.safetensors", keep=lambda tensor: "embed_tokens" not in tensor)
    with pytest.raises(SpecRefusedError, match="embed_tokens"):
        bases.load_base(folder, "cpu")


@pytest.mark.parametrize("in_4bit", [False, True])
def test_a_base_that_is_stored_in_4_bits_answers_as_it_did_before_it_was_stored(tmp_path, prompts, in_4bit):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base"), "cpu", in_4bit=True)
    before = score.score_prompts(model, tokenizer, prompts, LABELS, max_tokens=512)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "small")
    model, _ = bases.load_base(tmp_path / "small", "cpu", in_4bit=in_4bit)
    assert (score.score_prompts(model, tokenizer, prompts, LABELS, max_tokens=512) == before).all()
    rewrite(tmp_path / "small", "model.safetensors", keep=lambda tensor: ".layers.1." not in tensor)
    with pytest.raises(SpecRefusedError, match="small"):
        bases.load_base(tmp_path / "small", "cpu", in_4bit=in_4bit)


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"hidden_size": 64}, r"is not that of the weights, lm_head\.weight is \[353, 32\] and not \[353, 64\]"),
        ({"vocab_size": 9999}, r"is not that of the weights, lm_head\.weight is \[353, 32\] and not \[9999, 32\]"),
        ({"num_key_value_heads": 4}, r"is not that of the weights, model\.layers\.0\.self_attn\.k_proj\.weight is \[16, 32\] and not"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"pad_token_id": 9999}, "Padding_idx"),
    ],
)
def test_a_base_with_a_config_that_is_not_its_own_is_refused(tmp_path, settings, told, in_4bit):
    folder = rewrite(tiny_base(tmp_path / "base"), "model.safetensors", **settings)
    with pytest.raises(SpecRefusedError, match=f"{told}.*copy the base completely again"):
        bases.load_base(folder, "cpu", in_4bit=in_4bit)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_base_with_a_file_that_holds_no_settings_is_refused_before_its_weights_are_loaded(tmp_path, name):
    folder = tiny_base(tmp_path / "base")
    (folder / name).write_text("[]")
    with pytest.raises(SpecRefusedError, match=r"has no tokenizer that can be loaded.*copy the base completely again"):
        bases.Bases().tokenizer(Base(path=folder, digest="sha256:0"))


def test_a_config_without_settings_names_no_context(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SpecRefusedError, match="names no max_position_embeddings"):
        bases.read_context(Base(path=tmp_path, digest="sha256:0"))


@pytest.mark.parametrize("fault", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_device_that_fails_while_a_base_is_loaded_is_not_the_bases_fault(base_folder, monkeypatch, fault):
    def fail(*_, **__):
        raise fault("the card is full")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(fault):
        bases.load_base(base_folder, "cpu")


def test_adapters_are_switched_without_touching_the_base(tmp_path, prompts):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    first, second = (random_adapter(tmp_path / "base", tmp_path / name, seed) for seed, name in enumerate(("first", "second")))

    def ask(model, name):
        with adapters.answering_with(model, name) as answering:
            return score.score_prompts(answering, tokenizer, prompts[:5], LABELS, max_tokens=1000)

    bare = ask(model, None)
    model = adapters.load_adapter(model, "first", first)
    model = adapters.load_adapter(model, "second", second)
    by_first, by_second = ask(model, "first"), ask(model, "second")

    assert abs(by_first - bare).max() > 0.01
    assert abs(by_first - by_second).max() > 0.01
    assert (ask(model, None) == bare).all()
    assert (ask(model, "first") == by_first).all()
    model = adapters.drop_adapter(model, "first")
    assert (ask(model, "second") == by_second).all()
    model = adapters.drop_adapter(model, "second")
    assert not isinstance(model, peft.PeftModel)
    assert (ask(model, None) == bare).all()
    fresh = peft.PeftModel.from_pretrained(bases.load_base(tmp_path / "base", "cpu")[0], first)
    np.testing.assert_allclose(separate_forwards(fresh, tokenizer, prompts[:5], LABELS), by_first, atol=1e-4)


@pytest.mark.parametrize("first_with_a_window", [0, 2])
def test_layers_see_as_far_back_as_the_base_says(tmp_path, prompts, first_with_a_window):
    windowed = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": first_with_a_window, "vocab_size": 400}
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base", "qwen2", **windowed), "cpu")
    actual = score.score_prompts(model, tokenizer, prompts[:6], LABELS, max_tokens=4096)
    np.testing.assert_allclose(actual, separate_forwards(model, tokenizer, prompts[:6], LABELS), atol=1e-4, rtol=0)


def test_many_tokens_are_read_by_a_merged_matrix_and_the_base_stays_as_it_was(tmp_path, prompts, monkeypatch):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    worn = adapters.load_adapter(model, "worn", random_adapter(tmp_path / "base", tmp_path / "adapter", 1))
    apart, add = [], lean_layers.AddAdapter.apply
    monkeypatch.setattr(lean_layers.AddAdapter, "apply", lambda *parts: apart.append(1) or add(*parts))

    few = score.score_prompts(worn, tokenizer, ["a"], LABELS[:2], max_tokens=4096)
    assert apart
    apart.clear()
    many = score.score_prompts(worn, tokenizer, prompts, LABELS, max_tokens=4096)

    assert not apart
    np.testing.assert_allclose(many, separate_forwards(worn, tokenizer, prompts, LABELS), atol=1e-4, rtol=0)
    np.testing.assert_allclose(few, separate_forwards(worn, tokenizer, ["a"], LABELS[:2]), atol=1e-4, rtol=0)
    bare = adapters.drop_adapter(worn, "worn").state_dict()
    assert all((bare[name] == weight).all() for name, weight in before.items())


def test_what_was_in_force_is_so_again_afterwards(tmp_path):
    model, _ = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"), "candidate")
    adapters.load_adapter(tuned, "champion", random_adapter(tmp_path / "base", tmp_path / "champion", 1))
    trainable = {name for name, weight in tuned.named_parameters() if weight.requires_grad}

    with adapters.answering_with(tuned, "champion"):
        assert tuned.active_adapter == "champion"
    with adapters.answering_with(tuned, None):
        pass

    assert tuned.active_adapter == "candidate"
    assert trainable
    assert {name for name, weight in tuned.named_parameters() if weight.requires_grad} == trainable


def test_many_swaps_leave_nothing_behind(tmp_path):
    model, _ = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    folder = random_adapter(tmp_path / "base", tmp_path / "adapter", 0)
    model = adapters.load_adapter(model, "kept", folder)
    before = sum(weight.numel() for weight in model.parameters()), sum(1 for _ in model.modules())

    for number in range(20):
        adapters.load_adapter(model, f"swap_{number}", folder)
        adapters.drop_adapter(model, f"swap_{number}")

    assert before == (sum(weight.numel() for weight in model.parameters()), sum(1 for _ in model.modules()))
    assert list(model.peft_config) == ["kept"]


def refused_adapters(folder: Path):
    """Ways in which an adapter folder can be wrong, each with a word of the refusal."""

    def edit(**changes):
        config = folder / artifacts.ADAPTER_CONFIG
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    return {
        "no plain LoRA": lambda: edit(use_dora=True),
        "init_lora_weights": lambda: edit(init_lora_weights="pissa"),
        "peft_type": lambda: edit(peft_type="IA3"),
        "size mismatch": lambda: edit(r=3),
        "r` should": lambda: edit(r=0),
        "arget modules": lambda: edit(target_modules=["nothing_like_it"]),
        "missing or unknown": lambda: edit(target_modules=["q_proj"]),
        "can't be read": lambda: (folder / artifacts.ADAPTER_CONFIG).write_text("[1, 2"),
        "doesn't fit": lambda: (folder / adapters.ADAPTER_WEIGHTS).write_bytes(b"half a file"),
        "holds no": lambda: (folder / adapters.ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin"),
    }


@pytest.mark.parametrize("reason", refused_adapters(Path()))
@pytest.mark.parametrize("occupied", [True, False])
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model_as_it_was(tmp_path, base_folder, prompts, reason, occupied):
    model, tokenizer = bases.load_base(base_folder, "cpu")
    if occupied:
        model = adapters.load_adapter(model, "good", random_adapter(base_folder, tmp_path / "good", 1))
    before = score.score_prompts(model, tokenizer, prompts[:2], LABELS, max_tokens=1000)
    folder = random_adapter(base_folder, tmp_path / "bad", 2)
    refused_adapters(folder)[reason]()

    with pytest.raises(SpecRefusedError, match=reason):
        adapters.load_adapter(model, "bad", folder)

    assert (score.score_prompts(model, tokenizer, prompts[:2], LABELS, max_tokens=1000) == before).all()
    assert not any("bad" in name for name, _ in model.named_modules())
    assert hasattr(model, "peft_config") == occupied


def test_the_temperature_that_made_the_answers_is_found_again():
    random = np.random.default_rng(1)
    logprobs = random.normal(size=(4000, 3)) * 4
    truth = score.probabilities(logprobs, 2.5)
    answers = np.array([random.choice(3, p=row) for row in truth])

    assert score.fit_temperature(logprobs, answers) == pytest.approx(2.5, rel=0.1)
    np.testing.assert_allclose(truth.sum(axis=1), 1)


@pytest.mark.parametrize("answers", [[], [0], [1, 1, 1]])
def test_a_temperature_without_evidence_is_one(answers):
    assert score.fit_temperature(np.zeros((len(answers), 3)), answers) == 1.0


def test_two_lucky_answers_do_not_give_certainty():
    assert score.fit_temperature(np.log([[0.9, 0.1], [0.1, 0.9]]), [0, 1]) > 0.3


def test_scores_survive_their_file(tmp_path):
    logprobs = np.log([[0.5, 0.3, 0.1], [0.2, 0.2, 0.5]])
    rows = score.judge("gold", ["a", "b"], "v1.1", LABELS, logprobs, 1.0)

    score.write_scores(tmp_path / "scores.parquet", rows)

    assert score.read_scores(tmp_path / "scores.parquet") == rows
    assert [row.decision for row in rows] == ["APPROVED", "PENDING"]
    assert rows[0].confidence == pytest.approx(0.5 / 0.9)
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.column_names == ["set", "row_id", "model", "decision", "confidence", "probabilities", "logprobs"]
    assert table["probabilities"][1].as_py() == pytest.approx([2 / 9, 2 / 9, 5 / 9])
    assert [path.name for path in tmp_path.iterdir()] == ["scores.parquet"]


def test_no_scores_make_a_file_with_the_same_columns(tmp_path):
    score.write_scores(tmp_path / "scores.parquet", [])
    assert score.read_scores(tmp_path / "scores.parquet") == []


def test_scoring_leaves_each_module_in_the_mode_that_it_was_in(tmp_path, prompts):
    model, tokenizer = bases.load_base(tiny_base(tmp_path / "base"), "cpu")
    worn = adapters.load_adapter(model, "worn", random_adapter(tmp_path / "base", tmp_path / "adapter", 1))
    assert not any(module.training for module in worn.modules())
    worn.training = worn.get_decoder().layers[0].training = True
    before = [module.training for module in worn.modules()]
    score.score_prompts(worn, tokenizer, prompts[:2], LABELS, max_tokens=4096)
    assert [module.training for module in worn.modules()] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_a_pass_mixes_no_devices(dtype, monkeypatch):
    """Tensors that say that they lie on a card, and hold nothing: to mix them with others raises, as it would there."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)  # one of such tensors can't be moved, and is there
    monkeypatch.setattr(tuners_utils.BaseTunerLayer, "_move_adapter_to_device_of_base_layer", lambda *_: None)
    monkeypatch.setattr(score, "np", types.SimpleNamespace(asarray=lambda sums: sums))
    branches, trunk = trees.build_branches([[5, 6, 7], [8, 9]]), trees.Trunk()
    prompts = [[1, 2, 3, *range(10, 10 + length)] for length in (1, 5, 20, 25, 31)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            shape = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            }
            base = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(vocab_size=300, **shape), dtype=torch.bfloat16)
            lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
            model = peft.get_peft_model(base, lora, autocast_adapter_dtype=dtype == torch.float32).eval()
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
        with attention.implemented(model, trees.NAME), last_layer.narrowed(model), lean_layers.used(model):
            passes = list(trees.grow(prompts, branches, 60, 8, "cuda"))
            answers = [score.score_tree(model, tree, branches, trunk) for tree in passes]
    assert [answer.shape for answer in answers] == [(len(tree.rows), 2) for tree in passes]
