"""Every method on one path: learns, ships what it says, goes on after SIGKILL as if nothing had happened, and begins warm."""

import json
import os
import signal
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from daemon import training
from daemon.agents import Agent
from daemon.prompts import PromptFile
from storage import artifacts
from tests import training_fixtures as runs
from tests.model_fixtures import PROMPT, chat_tokenizer, claim, tiny_base
from trainers import adapters, bases, loop, score, spec

TEMPLATE = spec.Prompt(text=PROMPT)
METHODS = {
    "qlora": {"method": "qlora", "lora": {"rank": 8, "alpha": 16}, "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 2e-3, "accumulation": 2, "optimizer": "adamw_8bit"},
    "backward": {"method": "full", "learning_rate": 2e-3, "optimizer_in_backward": True, "optimizer": "adamw"},
    "pretrain": {"method": "pretrain", "learning_rate": 5e-3, "pretrain": {"weights": "adapter", "general_share": 0.2}},
    "pretrain-all": {"method": "pretrain", "learning_rate": 2e-3, "pretrain": {"weights": "all"}},
}
KILLED = {"epochs": 7, "checkpoint_steps": 4}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, a dataset, texts and general texts."""
    folder = tmp_path_factory.mktemp("methods")
    tiny_base(folder / "base")
    runs.dataset(folder / "set")
    for name, count in (("texts", 48), ("general", 20)):
        lines = [json.dumps({"text": f"{name} {TEMPLATE.render(claim(number))}"}) + "\n" for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def make(place, method, options=None, **changes):
    """A run by this method with the claims to score."""
    texts = {"texts": place / "texts.jsonl", "general_texts": place / "general.jsonl"} if "pretrain" in method else {}
    claims = runs.score_set(place / "recent.parquet", range(100, 120))
    others = (runs.model("bare"),)
    wanted = runs.OPTIONS | METHODS[method] | (options or {})
    asked = runs.make_spec(place / "base", place / "set", wanted, others=others, score_sets=(claims,), **texts)
    return asked.model_copy(update=changes)


def weights(run_dir, attempt=1):
    """What the run trained, by name."""
    result = runs.result(run_dir, attempt)
    folder = run_dir / "attempts" / str(attempt) / (result.get("adapter") or result["model"])["path"]
    return load_file(next(folder.glob("*.safetensors")))


@pytest.fixture(scope="module")
def finish(place, tmp_path_factory):
    """The folder of an uninterrupted run by a method; each is done once."""
    folders = {}

    def do(method):
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            assert runs.perform(folders[method], make(place, method, KILLED)) == spec.EXIT_DONE
        return folders[method]

    return do


every_method = pytest.mark.parametrize("method", METHODS)


@every_method
def test_a_method_learns_and_ships_what_its_result_names(method, finish, place):
    run_dir = finish(method)
    result = runs.result(run_dir)
    kind = "adapter" if method == "qlora" else "model"
    folder = run_dir / "attempts" / "1" / result[kind]["path"]
    assert artifacts.digest_folder(folder) == result[kind]["digest"] != artifacts.digest_folder(place / "base")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    lines = [json.loads(line) for line in (run_dir / "attempts" / "1" / "progress.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if line["phase"] == "training")
    assert result["training"]["final_loss"] < first - 0.5
    answered = score.read_scores(run_dir / "attempts" / "1" / "scores.parquet")
    assert {one.model for one in answered} == {"toy-v1.0", "bare"}
    if method in ("qlora", "full", "backward"):
        assert result["training"]["dev_accuracy"] > 0.8


@pytest.mark.parametrize("method", ["full", "pretrain"])
def test_the_scores_of_a_new_base_are_those_of_the_files_that_ship(method, finish):
    run_dir = finish(method)
    model, tokenizer = bases.load_base(run_dir / "attempts" / "1" / "model", "cpu")
    logprobs = score.score_prompts(
        model, tokenizer, [TEMPLATE.render(claim(number)) for number in range(100, 120)], runs.LABELS, max_tokens=999
    )
    answered = [one for one in score.read_scores(run_dir / "attempts" / "1" / "scores.parquet") if one.model == "toy-v1.0"]
    np.testing.assert_allclose([one.logprobs for one in answered], logprobs, rtol=1e-5)


@pytest.mark.parametrize("method", ["full", "pretrain"])
def test_a_new_base_keeps_the_generation_settings_and_the_chat_template_of_its_base(method, place, tmp_path):
    source = tiny_base(tmp_path / "whole", tokenizer=chat_tokenizer("llama"), tie_word_embeddings=True)
    model, tokenizer = bases.load_base(source, "cpu")
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    contradictory = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 5]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(contradictory))
    asked = make(place, method, {"epochs": 1}, base=runs.base_of(tmp_path / "base"))
    assert runs.perform(tmp_path / "run", asked) == spec.EXIT_DONE
    folder = tmp_path / "run" / "attempts" / "1" / "model"
    trained, loaded = bases.load_base(folder, "cpu")
    assert contradictory.items() <= trained.generation_config.to_dict().items()
    assert contradictory.items() <= json.loads((folder / "generation_config.json").read_text()).items()
    assert loaded.chat_template == tokenizer.chat_template
    assert trained.lm_head.weight is trained.model.embed_tokens.weight


@every_method
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(method, finish, place, tmp_path):
    reference = finish(method)
    asked = make(place, method, KILLED)
    spec.write_spec(tmp_path, asked)
    process = runs.start("trainers.train", tmp_path, said=tmp_path / "said")
    runs.wait_for(lambda: runs.last_step(tmp_path) >= 4, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert 4 <= runs.last_step(tmp_path) < 42
    (tmp_path / "attempts" / "2").mkdir()
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert runs.result(tmp_path, 2)["training"]["final_loss"] == pytest.approx(runs.result(reference)["training"]["final_loss"], rel=1e-6)
    for name, weight in weights(reference).items():
        torch.testing.assert_close(weights(tmp_path, 2)[name], weight, rtol=1e-6, atol=1e-9)


@every_method
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(method, finish):
    run_dir = finish(method)
    kept = load_file(max(run_dir.glob("attempts/1/checkpoints/*/weights.safetensors")))
    is_adapter = method in ("qlora", "pretrain")
    assert {("lora_" in name) for name in kept} == {is_adapter}
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16 if method == "qlora" else torch.float32}


@pytest.mark.parametrize("method", ["qlora", "full", "pretrain"])
def test_a_method_begins_warm(method, finish, place, tmp_path):
    run_dir = finish(method)
    result = runs.result(run_dir)
    folder = run_dir / "attempts" / "1" / (result.get("adapter") or result["model"])["path"]
    if "adapter" in result:
        begin = {"init_adapter": folder, "init_adapter_digest": result["adapter"]["digest"]}
    else:
        begin = {"base": runs.base_of(folder)}
    assert runs.perform(tmp_path, make(place, method, {"epochs": 1, "learning_rate": 1e-9}, **begin)) == spec.EXIT_DONE
    assert runs.result(tmp_path)["training"]["final_loss"] < 0.9 * loss_from_scratch(place, method, tmp_path / "cold")


def loss_from_scratch(place, method, run_dir):
    assert runs.perform(run_dir, make(place, method, {"epochs": 1, "learning_rate": 1e-9}, others=(), score_sets=())) == spec.EXIT_DONE
    return runs.result(run_dir)["training"]["final_loss"]


def test_an_adapter_trained_in_4_bits_answers_on_the_whole_base_too(place, finish):
    run_dir = finish("qlora")
    folder = run_dir / "attempts" / "1" / runs.result(run_dir)["adapter"]["path"]
    model, tokenizer = bases.load_base(place / "base", "cpu")
    worn = adapters.load_adapter(model, "q", folder)
    logprobs = score.score_prompts(
        worn, tokenizer, [TEMPLATE.render(claim(number)) for number in range(100, 120)], runs.LABELS, max_tokens=999
    )
    right = [runs.LABELS[row.argmax()] == runs.truth(number) for number, row in zip(range(100, 120), logprobs, strict=True)]
    assert sum(right) / len(right) > 0.8


@pytest.mark.parametrize("in_4bit", [True, False])
def test_what_was_trained_in_4_bits_is_scored_on_the_base_as_servers_hold_it(in_4bit, place, finish, tmp_path):
    run_dir = finish("qlora")
    trained = runs.result(run_dir)["adapter"]
    folder = run_dir / "attempts" / "1" / trained["path"]
    asked = make(place, "qlora", {"epochs": 1, "serve_in_4bit": in_4bit}, init_adapter=folder, init_adapter_digest=trained["digest"])
    held = CountingBases()
    assert runs.perform(tmp_path, asked, held) == spec.EXIT_DONE
    assert held.loads == (1 if in_4bit else 2)
    assert runs.result(tmp_path)["training"]["examined_in_4bit"] == in_4bit
    model, tokenizer = bases.load_base(place / "base", "cpu", in_4bit=in_4bit)
    worn = adapters.load_adapter(model, "q", tmp_path / "attempts" / "1" / runs.result(tmp_path)["adapter"]["path"])
    prompts = [TEMPLATE.render(claim(number)) for number in range(100, 120)]
    by_hand = score.score_prompts(worn, tokenizer, prompts, runs.LABELS, max_tokens=512)
    answered = [one.logprobs for one in read_scores(tmp_path) if one.model == asked.candidate.name]
    assert answered == [pytest.approx(row.tolist(), abs=1e-4) for row in by_hand]


def test_an_adapter_in_bf16_learns_with_moments_in_8_bits(place, tmp_path):
    losses = []
    for optimizer in ("adamw", "adamw_8bit"):
        wanted = {"optimizer": optimizer, "lora": {"rank": 64, "alpha": 64}, "learning_rate": 2e-3}
        assert runs.perform(tmp_path / optimizer, make(place, "qlora", wanted, others=(), score_sets=())) == spec.EXIT_DONE
        losses.append(runs.result(tmp_path / optimizer)["training"]["final_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_a_pretraining_without_a_candidate_makes_a_base_and_scores_nothing(place, tmp_path):
    asked = make(place, "pretrain", {"epochs": 1}, candidate=None, dataset=None, others=(), score_sets=(), general_texts=None)
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    assert "scores" not in runs.result(tmp_path)
    assert not (tmp_path / "attempts" / "1" / "scores.parquet").exists()


@pytest.mark.parametrize("method", ["full", "backward", "pretrain"])
def test_what_was_trained_has_left_the_memory_before_a_base_is_read_to_score(method, place, tmp_path, monkeypatch):
    begun, score_base = [], bases.load_base

    def load_base(*arguments, **options):
        assert all(model() is None for model in begun)
        loaded = score_base(*arguments, **options)
        begun.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(bases, "load_base", load_base)
    assert runs.perform(tmp_path, make(place, method, {"epochs": 1})) == spec.EXIT_DONE
    assert len(begun) >= 3, "the base to train, what came of it, and the bare base beside it"


def test_the_share_of_general_text_is_told(finish):
    assert runs.result(finish("pretrain"))["training"]["general_share"] == pytest.approx(0.2, abs=0.03)


def test_forgetting_is_measured_on_general_text_that_the_run_does_not_learn(place, tmp_path, monkeypatch):
    learned, measured, begin, measure = [], [], loop.Loop, loop.mean_loss
    monkeypatch.setattr(loop, "Loop", lambda model, examples, *rest: learned.extend(examples) or begin(model, examples, *rest))
    monkeypatch.setattr(
        loop, "mean_loss", lambda model, some, *rest, **named: measured.extend(some) or measure(model, some, *rest, **named)
    )
    asked = make(place, "pretrain", {"epochs": 1, "pretrain": {"general_share": 0.9}}, candidate=runs.model(), dataset=None)
    assert runs.perform(tmp_path, asked) == spec.EXIT_DONE
    learned, measured = ({(*one.prompt, *one.completion) for one in some} for some in (learned, measured))
    assert (len(learned), len(measured), len(learned & measured)) == (48 + 10, 10, 0)


def test_recomputing_layers_changes_nothing_but_the_memory(place, tmp_path):
    losses = []
    for layers in (0, 1, 2):
        asked = make(place, "full", {"epochs": 1, "recompute_layers": layers, "optimizer": "adamw"}, others=(), score_sets=())
        assert runs.perform(tmp_path / str(layers), asked) == spec.EXIT_DONE
        losses.append(runs.result(tmp_path / str(layers))["training"]["final_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_in_the_backward_pass_an_update_is_that_of_its_pass_alone(place, tmp_path):
    finals = []
    for options in ({"optimizer_in_backward": True}, {"optimizer_in_backward": False, "accumulation": 1, "clip": 0}):
        run_dir = tmp_path / str(len(finals))
        wanted = {"epochs": 2, "max_tokens": 4096, **options}
        assert runs.perform(run_dir, make(place, "backward", wanted, others=(), score_sets=())) == spec.EXIT_DONE
        finals.append(weights(run_dir))
    for name, weight in finals[1].items():
        torch.testing.assert_close(finals[0][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (
            {},
            {
                "method": "lora",
                "epochs": 4,
                "learning_rate": 2e-4,
                "load_in_4bit": False,
                "lora": {"rank": 16, "alpha": 32, "dtype": "float32"},
            },
        ),
        ({"method": "qlora"}, {"load_in_4bit": True, "epochs": 3, "lora": {"rank": 64, "alpha": 128, "dtype": "bfloat16"}}),
        ({"method": "qlora", "lora": {"rank": 8}}, {"lora": {"rank": 8, "alpha": 128, "dtype": "bfloat16"}}),
        ({"method": "full"}, {"learning_rate": 1e-5, "accumulation": 8, "recompute_layers": 1, "optimizer": "paged_adamw_8bit"}),
        ({"method": "full", "epochs": 1}, {"epochs": 1, "learning_rate": 1e-5}),
        ({"method": "full", "optimizer_in_backward": True}, {"accumulation": 1, "clip": 0}),
        ({"method": "pretrain"}, {"epochs": 1, "learning_rate": 2e-4, "recompute_layers": 0}),
        ({"method": "pretrain", "pretrain": {"weights": "all"}}, {"epochs": 1, "learning_rate": 1e-5, "accumulation": 8}),
    ],
)
def test_what_is_not_given_comes_from_the_methods_preset(given, chosen):
    options = spec.Options.model_validate(given)
    assert {name: options.model_dump()[name] for name in chosen} == chosen
    assert spec.Options.model_validate(options.model_dump()) == options, "written and read again it is the same"
    assert spec.Options.model_validate(options.choices()) == options
    assert set(options.choices()) <= {*given, *spec.DECIDING}


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize(
    "given",
    [
        {"lora": {"rank": 8}},
        {"method": "qlora", "lora": {"rank": 32}, "epochs": 7},
        {"method": "full", "batch_rows": 4},
        {"method": "full", "optimizer_in_backward": True},
    ],
)
def test_of_another_method_only_what_was_chosen_is_kept(given, method):
    agent = Agent(name="a", labels=("A", "B"), prompt=PromptFile(text="x"), base_model=Path("base"), training=given)
    options, _ = training.read_options(agent, {"method": method})
    own = given if method == given.get("method", "lora") else {name: value for name, value in given.items() if "backward" not in name}
    assert options == spec.Options.model_validate(own | {"method": method, "serve_in_4bit": agent.training.serve_in_4bit})


def test_pre_training_an_adapter_in_place_of_all_weights_asks_for_no_update_in_the_backward_pass(tmp_path):
    given = {"method": "pretrain", "pretrain": {"weights": "all"}, "optimizer_in_backward": True}
    prompt = PromptFile(text="x")
    agent = Agent(name="a", labels=("A", "B"), prompt=prompt, base_model=Path("base"), training=given, texts=tmp_path)
    options, _ = training.read_options(agent, {"pretrain.weights": "adapter"})
    assert options == spec.Options(method="pretrain")


def test_a_score_run_answers_with_models_on_different_bases(finish, place, tmp_path):
    run_dir = finish("full")
    asked = make(place, "full")
    new = runs.model("new", base=runs.base_of(run_dir / "attempts" / "1" / "model"))
    old = runs.model("old", base=runs.base_of(place / "base"))
    asked = asked.model_copy(update={"kind": "score", "candidate": None, "others": (old, new, runs.model("again", base=old.base))})
    held = CountingBases()
    assert runs.perform(tmp_path, asked, held) == spec.EXIT_DONE
    assert held.loads == 2
    answers = {name: [one.logprobs for one in read_scores(tmp_path) if one.model == name] for name in ("old", "new", "again")}
    assert answers["old"] == answers["again"] != answers["new"]


def read_scores(run_dir):
    return score.read_scores(run_dir / "attempts" / "1" / "scores.parquet")


class CountingBases(bases.Bases):
    """Counts how often weights are read."""

    loads = 0

    def release(self):
        self.loads += 1
        super().release()


def test_a_gradient_that_is_no_number_is_not_applied(place):
    model, _ = bases.load_base(place / "base", "cpu")
    parameters = [next(model.parameters())]
    before = parameters[0].detach().clone()
    updates = loop.optimizers.choose(parameters, spec.Options(method="full", optimizer_in_backward=True, optimizer="adamw"))
    (parameters[0] * float("nan")).sum().backward()
    assert updates.update() != updates.update()
    assert torch.equal(parameters[0], before)
