"""What a run takes of its card: counted as a real model saves it, never less for more work, and never chosen where it does not fit."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as some

from daemon import cards, estimates, plan, shapes
from tests import model_fixtures
from trainers import attention, data, packing, spec, trees

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
RANK, ROW = 8, 96
GOALS = (("qlora", 64, 10 * cards.GB), ("qlora", 16, 10 * cards.GB), ("lora", 16, 20 * cards.GB))


def make_method(name: Any, rank: int = 16, row_tokens: int = 2048, max_tokens: int = 4096, **more: Any) -> plan.Method:
    trains: Any = {"full": "all", "score": "nothing"}.get(name, "adapter")
    return plan.Method(name, trains, rank, row_tokens, max_tokens, is_4bit=name == "qlora", **({"serves_4bit": name == "qlora"} | more))


METHODS = some.builds(
    make_method,
    some.sampled_from(("lora", "qlora", "full", "score")),
    some.integers(1, 256),
    some.integers(16, 8192),
    some.integers(16, 32768),
    checkpoint_every=some.integers(0, 5),
    optimizer=some.sampled_from(("adamw", "adamw_8bit", "paged_adamw_8bit")),
)
CONFIGS = some.builds(
    lambda layers, heads, keys, head, inner, words: {
        **LLAMA_8B,
        "num_hidden_layers": layers,
        "hidden_size": heads * head,
        "num_attention_heads": heads,
        "num_key_value_heads": min(keys, heads),
        "intermediate_size": inner,
        "vocab_size": words,
    },
    some.integers(1, 90),
    some.integers(1, 64),
    some.integers(1, 8),
    some.sampled_from((16, 64, 128)),
    some.integers(64, 32768),
    some.integers(300, 200_000),
)
CARDS = some.builds(
    cards.Card,
    name=some.just("card"),
    kind=some.sampled_from(("cuda", "cpu")),
    memory=some.integers(1, 200 * cards.GB),
    taken=some.integers(0, 50 * cards.GB),
)


def measure_saved(model: Any, packed: packing.Pack) -> int:
    """The bytes that a forward pass keeps for its backward pass."""
    with attention.packed(model), model_fixtures.counting_kept(model) as count:
        losses = packing.token_losses(model, packed)
    assert losses.requires_grad
    return count()


def make_pack() -> packing.Pack:
    example = data.Example(prompt=list(range(3, ROW - 1)), completion=[5, 6], weight=1.0)
    return packing.pack([example] * 4, 4096, "cpu", share_prefixes=False)[0]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_a_layer_saves_what_the_plan_counts(tmp_path: Path, architecture: str, method: Any) -> None:
    saved, pack = {}, make_pack()
    for layers in (2, 3):
        base = model_fixtures.tiny_base(
            tmp_path / f"{layers}", architecture, num_hidden_layers=layers, hidden_size=64, intermediate_size=160
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        if method == "lora":
            model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        saved[layers] = measure_saved(model, pack)
    shape = shapes.read_shape(json.loads((base / "config.json").read_bytes()))
    counted = plan.count_layer(shape, make_method(method, RANK, ROW, ROW), 4) * pack.tokens
    # Attention over packed rows gathers its result anew where no kernel for rows of different lengths is at hand: 6 % here.
    assert saved[3] - saved[2] == pytest.approx(counted, rel=0.07)


def test_the_plan_of_scoring_counts_as_a_pass_is_laid() -> None:
    assert (plan.ASKED, plan.GATHERED) == (1 / trees.ASKED, trees.CELLS)


def test_what_was_measured_for_llama_3_8b_is_what_is_counted() -> None:
    shape = shapes.read_shape(LLAMA_8B)
    lora, full = (make_method(name) for name in ("lora", "full"))
    kib = [plan.count_layer(shape, *one) / 1024 for one in ((lora, 2), (full, 2))]
    assert kib == pytest.approx([136.35, 136.13], abs=0.01)
    assert (shape.parameters, shape.count_adapter(16)) == (8_030_261_248, 41_943_040)


def test_qlora_and_lora_of_8b_take_what_was_set_as_goal_for_4096_tokens() -> None:
    plans = [plan.plan_memory(LLAMA_8B, make_method(name, rank, 4096), cards.Card("", "cuda", size)) for name, rank, size in GOALS]
    assert all(one.fits for one in plans)
    assert {one.settings.max_tokens for one in plans} == {4096}


def test_the_moments_of_an_adapter_are_in_8_bits_only_where_nothing_else_makes_it_fit() -> None:
    large = {**LLAMA_8B, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    large |= {"num_key_value_heads": 40, "vocab_size": 32000}
    plans = {size: plan.plan_memory(large, make_method("qlora", 64), cards.Card("", "cuda", size * cards.GB)) for size in (12, 24)}
    assert {size: (one.fits, one.settings.optimizer) for size, one in plans.items()} == {12: (True, "adamw_8bit"), 24: (True, "adamw")}
    on_cpu = plan.plan_memory(large, make_method("qlora", 64), cards.Card("", "cpu", 12 * cards.GB))
    assert on_cpu.settings.optimizer == "adamw"


@settings(max_examples=40, deadline=None)
@given(METHODS, CONFIGS, CARDS)
def test_what_does_not_fit_is_never_chosen(method: plan.Method, config: dict[str, Any], card: cards.Card) -> None:
    found = plan.plan_memory(config, method, card)
    assert found.parts.total == sum(dataclasses.astuple(found.parts))
    assert min(dataclasses.astuple(found.parts)) >= 0
    every = [plan.estimate(shapes.read_shape(config), method, one, card.kind).total for one in plan.list_settings(method, card)]
    assert found.fits == (min(every) <= card.free)
    assert found.fits or found.parts.total == min(every)
    bigger = dataclasses.replace(card, memory=card.memory + cards.GB)
    assert not found.fits or plan.plan_memory(config, method, bigger).fits


@settings(max_examples=40, deadline=None)
@given(METHODS, CONFIGS, some.sampled_from(("cuda", "cpu")), some.integers(1, 4096), some.integers(1, 64))
def test_more_tokens_a_higher_rank_and_more_layers_never_take_less(
    method: plan.Method, config: dict[str, Any], kind: Any, tokens: int, rank: int
) -> None:
    for chosen in plan.list_settings(method, cards.Card("", kind, 0)):

        def total(method: plan.Method = method, config: dict[str, Any] = config, chosen: plan.Settings = chosen) -> int:
            return plan.estimate(shapes.read_shape(config), method, chosen, kind).total

        assert total() < total(chosen=dataclasses.replace(chosen, max_tokens=max(chosen.max_tokens, method.row_tokens) + tokens))
        assert total() < total(config={**config, "num_hidden_layers": config["num_hidden_layers"] + 1})
        assert total() <= total(method=dataclasses.replace(method, rank=method.rank + rank))


@settings(max_examples=40, deadline=None)
@given(METHODS, CONFIGS)
def test_computing_more_layers_twice_never_takes_more(method: plan.Method, config: dict[str, Any]) -> None:
    shape = shapes.read_shape(config)
    chosen = next(plan.list_settings(method, cards.Card("", "cuda", 0)))
    totals = [plan.estimate(shape, method, dataclasses.replace(chosen, checkpoint_every=every), "cuda").activations for every in (1, 2, 4)]
    assert totals == sorted(totals)


RUNS = some.fixed_dictionaries(
    {"method": some.sampled_from(("lora", "qlora", "full"))},
    optional={
        "max_row_tokens": some.integers(16, 8192),
        "max_tokens": some.integers(16, 32768),
        "serve_in_4bit": some.booleans(),
        "recompute_layers": some.integers(0, 5),
        "optimizer": some.sampled_from(("adamw", "adamw_8bit", "paged_adamw_8bit")),
        "lora": some.fixed_dictionaries({"rank": some.integers(1, 256)}),
    },
)
REMEDY = re.compile(r"(?:use (?:a|one) card of (?P<size>\d+) GB)?(?: and )?(?:set (?P<options>.+?)(?: in the agent's configuration)?)?")


@settings(max_examples=100, deadline=None)
@given(RUNS, some.sampled_from(("lora", "score")), CONFIGS, CARDS, some.integers(1, 2))
def test_every_remedy_makes_the_run_fit(given: dict[str, Any], kind: Any, config: dict[str, Any], card: cards.Card, count: int) -> None:
    def make(options: dict[str, Any], card: cards.Card) -> plan.MemoryPlan:
        return plan.plan_memory(config, estimates.make_method(spec.Options.model_validate(options), kind, config), card)

    card = dataclasses.replace(card, count=count)
    found = make(given, card)
    assert bool(found.remedies) == (not found.fits)
    for remedy in found.remedies:
        if remedy.startswith("free"):
            assert make(given, dataclasses.replace(card, taken=0)).fits
        elif remedy.startswith("FSDP"):
            assert not any(make(given, cards.Card("", "cuda", size * cards.GB)).fits for size in cards.SIZES)
        else:
            told = REMEDY.fullmatch(remedy)
            assert told is not None, remedy
            larger = cards.Card("", "cuda", int(told["size"]) * cards.GB) if told["size"] else card
            changes = [one.split(" = ") for one in told["options"].split(" and ")] if told["options"] else []
            changed = spec.Options.model_validate(given).choices()
            for name, value in changes:
                changed = spec.merge(changed, functools.reduce(lambda inner, key: {key: inner}, reversed(name.split(".")), value))
            assert make(changed, larger).fits, remedy


@pytest.mark.parametrize("kind", ["train", "score"])
def test_a_base_that_is_stored_in_4_bits_is_counted_so_wherever_it_answers(kind: Any) -> None:
    stored = {**LLAMA_8B, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    options = spec.Options.model_validate({"method": "qlora", "serve_in_4bit": False})
    card = cards.Card("", "cuda", 12 * cards.GB)
    fits = [plan.plan_memory(config, estimates.make_method(options, kind, config), card).fits for config in (LLAMA_8B, stored)]
    assert fits == [False, True]


def test_what_fits_no_card_is_told_with_a_change_that_fits_one() -> None:
    card, in_4bit = cards.Card("", "cuda", 12 * cards.GB), "set serve_in_4bit = true in the agent's configuration"
    assert plan.plan_memory(LLAMA_70B, make_method("lora"), card).remedies[0] == (
        "use a card of 80 GB and set method = qlora in the agent's configuration"
    )
    assert plan.plan_memory(LLAMA_8B, make_method("score"), card).remedies == (in_4bit, "use a card of 24 GB")
    assert in_4bit in plan.plan_memory(LLAMA_70B, make_method("score"), cards.Card("", "cuda", 48 * cards.GB)).remedies
    pair = plan.plan_memory(LLAMA_8B, make_method("full"), cards.Card("", "cuda", 24 * cards.GB, count=2))
    assert pair.remedies[-1] == "use one card of 24 GB"


def test_what_does_not_fit_is_told_with_what_would() -> None:
    found = plan.plan_memory(LLAMA_8B, make_method("lora"), cards.Card("", "cuda", 12 * cards.GB))
    assert not found.fits
    assert found.remedies == ("set method = qlora in the agent's configuration", "use a card of 24 GB")
    shared = plan.plan_memory(LLAMA_8B, make_method("lora"), cards.Card("", "cuda", 24 * cards.GB, 8 * cards.GB))
    assert "free the 8.0 GB that others hold on this card" in shared.remedies
    apart = plan.plan_memory(LLAMA_8B, make_method("qlora", 64, serves_4bit=False), cards.Card("", "cuda", 12 * cards.GB))
    assert not apart.fits, "its exam reads the whole base, as its servers do"
    assert apart.remedies[0] == "set serve_in_4bit = true in the agent's configuration"
    huge = plan.plan_memory(LLAMA_70B, make_method("full"), cards.Card("", "cuda", 141 * cards.GB))
    assert huge.remedies[-1].startswith("FSDP")


def test_what_trains_all_weights_and_does_not_fit_may_train_an_adapter() -> None:
    card, host = cards.Card("", "cuda", 12 * cards.GB), cards.Card("", "cpu", 25 * cards.GB)
    quantised = "set method = qlora in the agent's configuration"
    assert plan.plan_memory(LLAMA_8B, make_method("full"), card).remedies[0] == quantised
    assert plan.plan_memory(LLAMA_8B, make_method("lora"), host).remedies[0] == quantised
    texts = plan.Method(name="pretrain", trains="all", rank=16, row_tokens=1024, max_tokens=1024, supervised=1.0)
    assert plan.plan_memory(LLAMA_8B, texts, cards.Card("", "cuda", 20 * cards.GB)).remedies[0] == "set pretrain.weights = adapter"


def test_several_cards_do_not_update_within_the_backward_pass() -> None:
    card = cards.Card("", "cuda", 24 * cards.GB)
    assert plan.plan_memory(LLAMA_8B, make_method("full"), card).settings.optimizer_in_backward
    pair = plan.plan_memory(LLAMA_8B, make_method("full"), dataclasses.replace(card, count=2))
    assert not pair.settings.optimizer_in_backward
    assert not pair.fits
    asked = make_method("full", in_backward=True)
    assert not any(one.optimizer_in_backward for one in plan.list_settings(asked, dataclasses.replace(card, count=2)))
