import random

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.model_fixtures import tiny_base
from trainers import attention, bases, loop, packing, prefixes
from trainers.data import Example
from trainers.spec import SpecRefusedError

LENGTHS = [(5, 3), (30, 2), (6, 3), (90, 1), (1, 4), (31, 6), (29, 2)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tmp_path_factory):
    """A Llama type, and a Mistral type whose sliding window is shorter than some sequences."""
    window = {"sliding_window": 16} if request.param == "mistral" else {}
    base, _ = bases.load_base(tiny_base(tmp_path_factory.mktemp(request.param) / "tiny", request.param, **window), "cpu")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


@pytest.fixture(scope="module")
def examples():
    generator = torch.Generator().manual_seed(1)
    draw = lambda count: torch.randint(3, 300, (count,), generator=generator).tolist()  # noqa: E731
    return [Example(draw(prompt), draw(completion), weight=1.0 + index) for index, (prompt, completion) in enumerate(LENGTHS)]


def unpacked_loss(model, examples):
    """The definition: one forward pass for each example with the library's own attention, and a weighted mean over graded tokens."""
    total = weight = 0.0
    for example in examples:
        logits = model(input_ids=torch.tensor([example.prompt + example.completion])).logits[0]
        graded = logits[len(example.prompt) - 1 : -1]
        total = total + example.weight * functional.cross_entropy(graded, torch.tensor(example.completion), reduction="sum")
        weight += example.weight * len(example.completion)
    return total / weight


def packed_loss(model, examples, max_tokens, **options):
    packs = packing.pack(examples, max_tokens, "cpu", **options)
    weight = sum(packed.weights.sum() for packed in packs)
    with attention.packed(model):
        return sum((packing.token_losses(model, packed) * packed.weights).sum() for packed in packs) / weight


def gradients(model, loss):
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_lesson(model, examples, max_tokens, **options):
    """Losses agree to 1e-5 and gradients to 1e-4 of their size."""
    plain, packed = unpacked_loss(model, examples), packed_loss(model, examples, max_tokens, **options)
    assert packed.item() == pytest.approx(plain.item(), rel=1e-5)
    expected, actual = gradients(model, plain), gradients(model, packed)
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("max_tokens", [40, 100, 4096])
def test_packed_and_unpacked_losses_and_gradients_agree(model, examples, max_tokens):
    assert_same_lesson(model, examples, max_tokens)


@pytest.fixture(scope="module")
def relatives():
    """Claims under two policies, the second one's with the first one's opening, a stranger, and a prompt that is nothing but its policy."""
    draw = random.Random(2)
    tokens = lambda count: [draw.randrange(3, 300) for _ in range(count)]  # noqa: E731
    opening = tokens(40)
    policies = [opening + tokens(50), opening + tokens(35)]
    prompts = [policies[number % 2] + tokens(1 + 4 * number) for number in range(9)]
    prompts += [policies[0], tokens(20)]
    return [Example(prompt, tokens(1 + number % 4), weight=1.0 + number % 3) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("max_tokens", [120, 260, 4096])
def test_a_shared_prefix_changes_no_loss_and_no_gradient(model, relatives, max_tokens):
    assert_same_lesson(model, relatives, max_tokens)


def test_a_shared_prefix_is_read_once_in_a_pass(relatives):
    (shared,), (plain,) = packing.pack(relatives, 4096, "cpu"), packing.pack(relatives, 4096, "cpu", share_prefixes=False)
    assert shared.saved == 5 * 89 + 3 * 75
    assert shared.tokens == plain.tokens - shared.saved == sum(example.tokens for example in relatives) - shared.saved
    assert plain.saved == 0


def test_prompts_that_hardly_begin_alike_are_left_alone(examples):
    assert all(packed.saved == 0 for packed in packing.pack(examples, 4096, "cpu"))


def test_an_example_is_graded_the_same_whatever_lies_beside_it(model, examples):
    alone = packing.pack(examples[:1], 4096, "cpu")[0]
    beside = packing.pack(examples, 4096, "cpu")[0]
    with attention.packed(model):
        own = packing.token_losses(model, alone)
        all_losses = packing.token_losses(model, beside)
    of_first = all_losses[beside.weights == examples[0].weight]
    torch.testing.assert_close(of_first, own, rtol=1e-5, atol=1e-5)


def test_the_head_runs_on_graded_positions_only(model, examples):
    packed = packing.pack(examples, 4096, "cpu")[0]
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    try:
        with attention.packed(model):
            packing.token_losses(model, packed)
    finally:
        hook.remove()
    assert rows == [sum(len(example.completion) for example in examples)]


def test_the_last_layer_makes_of_graded_positions_only_what_nothing_else_reads(model, examples):
    packed = packing.pack(examples, 4096, "cpu")[0]
    read = {}
    layer = model.get_decoder().layers[-1]
    parts = {"keys": layer.self_attn.k_proj, "queries": layer.self_attn.q_proj.base_layer, "mlp": layer.mlp.down_proj.base_layer}
    hooks = [
        part.register_forward_hook(lambda _module, inputs, _output, name=name: read.update({name: inputs[0].shape[1]}))
        for name, part in parts.items()
    ]
    try:
        with attention.packed(model):
            packing.token_losses(model, packed)
    finally:
        for hook in hooks:
            hook.remove()
    assert read == {"keys": packed.tokens, "queries": len(packed.keep), "mlp": len(packed.keep)}


def test_layers_that_are_computed_again_teach_the_same(model, examples):
    plain = unpacked_loss(model, examples)
    (packed,) = packing.pack(examples, 4096, "cpu")
    with attention.packed(model), loop.recomputing(model, 1):
        actual = gradients(model, (packing.token_losses(model, packed) * packed.weights).sum() / packed.weights.sum())
    for name, gradient in gradients(model, plain).items():
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(
    ("architecture", "dropout"),
    [("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5}), ("opt", {"dropout": 0.5, "word_embed_proj_dim": 32, "ffn_dim": 64})],
)
def test_layers_that_are_computed_again_drop_nothing_out(examples, architecture, dropout):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=400, **sizes, **dropout)
    other = transformers.AutoModelForCausalLM.from_config(config).eval()
    (packed,) = packing.pack(examples, 4096, "cpu")
    with attention.packed(other):
        kept = packing.token_losses(other, packed)
        slopes = gradients(other, kept.sum())
        with loop.recomputing(other, 1):
            computed_again = packing.token_losses(other, packed)
            again = gradients(other, computed_again.sum())
    torch.testing.assert_close(computed_again, kept)
    for name, slope in slopes.items():
        torch.testing.assert_close(again[name], slope, msg=name)


def test_a_model_whose_layers_keep_the_pack_to_themselves_is_refused(examples):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    other = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("stablelm", vocab_size=400, **sizes)).eval()
    (packed,) = packing.pack(examples, 4096, "cpu")
    with attention.packed(other), pytest.raises(SpecRefusedError, match="use a base that follows transformers' AttentionInterface"):
        packing.token_losses(other, packed)


def test_a_model_whose_layers_have_other_names_is_packed_too(examples):
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2)).eval()
    torch.testing.assert_close(packed_loss(other, examples, 4096), unpacked_loss(other, examples), rtol=1e-5, atol=1e-5)


def test_the_models_own_attention_is_back_after_packing(model):
    with attention.packed(model):
        assert model.config._attn_implementation == attention.NAME
    assert model.config._attn_implementation == "sdpa"


@st.composite
def batches(draw):
    """Examples that begin alike in different lengths."""
    lengths = st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(1, 9))
    return [
        Example([1] * shared + [2] + [3] * own, [4] * graded) for shared, own, graded in draw(st.lists(lengths, min_size=1, max_size=30))
    ]


@settings(max_examples=60, deadline=None)
@given(examples=batches(), max_tokens=st.integers(16, 300))
def test_every_token_is_packed_within_the_budget_without_padding_and_nothing_is_cut(examples, max_tokens):
    packs = packing.pack(examples, max_tokens, "cpu")
    assert sum(packed.tokens + packed.saved for packed in packs) == sum(example.tokens for example in examples)
    assert sorted(packed_examples(packs)) == sorted(
        ([*example.prompt, *example.completion[:-1]], example.completion) for example in examples
    )
    assert all(packed.tokens <= max_tokens or len(packed.layout.spans) == 1 for packed in packs)


@pytest.mark.parametrize(("budget", "lengths"), [(14, (10, 6, 5, 3, 2, 2)), (17, (16, 12, 7, 6, 4, 3, 2)), (18, (13, 9, 9, 8, 6, 4, 3, 2))])
def test_best_fit_fills_passes_where_first_fit_would_need_one_more(budget, lengths):
    rows = [Example([number] * length, [2]) for number, length in enumerate(lengths)]
    passes = -(-sum(lengths) // budget)
    assert len(packing.pack(rows, budget, "cpu")) == passes < count_first_fit(lengths, budget)


@pytest.mark.parametrize(("rows", "passes"), [(16, 8), (3, 3)])
@pytest.mark.parametrize("shared", [0, 90])
def test_a_step_has_as_many_passes_as_asked_though_fewer_would_read_it(rows, passes, shared):
    examples = [Example([1] * shared + [number + 2] * (100 - shared), [2]) for number in range(rows)]
    packs = packing.pack(examples, 4096, "cpu", least_passes=8)
    assert len(packs) == passes
    assert sum(len(packed.examples) for packed in packs) == rows


def count_first_fit(lengths, budget):
    """How many passes there are when each row, the longest first, takes the first that has room."""
    filled = []
    for length in sorted(lengths, reverse=True):
        place = next((place for place, tokens in enumerate(filled) if tokens + length <= budget), len(filled))
        filled[place:] = [sum(filled[place : place + 1]) + length, *filled[place + 1 :]]
    return len(filled)


def packed_examples(packs):
    """What the model reads and is graded on, put together again from the passes."""
    for packed in packs:
        tokens, targets = packed.input_ids[0].tolist(), packed.targets.tolist()
        keep = dict(zip(packed.keep.tolist(), targets, strict=True))
        for start, length, after, shared in packed.layout.spans:
            graded = [keep[place] for place in range(start, start + length) if place in keep]
            if graded:
                yield tokens[after : after + shared] + tokens[start : start + length], graded
            assert packed.position_ids[0, start : start + length].tolist() == list(range(shared, shared + length))


@settings(max_examples=60, deadline=None)
@given(examples=batches())
def test_families_partition_the_prompts_and_pay_for_themselves(examples):
    prompts = [example.prompt for example in examples]
    families = prefixes.find_families(prompts)
    assert sorted(row for family in families for row in family.rows) == list(range(len(prompts)))
    for family in families:
        if not family.shared:
            assert family is families[-1]
            continue
        assert len({tuple(prompts[row][: family.shared]) for row in family.rows}) == 1
        assert family.shared < min(len(prompts[row]) for row in family.rows)
        assert family.saved > prefixes.COST


def test_attention_without_padding_reads_the_same_keys(model, relatives, monkeypatch):
    """What a card computes in one call, by its definition."""

    def attend_one_by_one(query, key, value, queries, keys, *_lengths, window_size, scale, enable_gqa):
        outputs = []
        for i in range(len(queries) - 1):
            q, k, v = (heads[begin[i] : begin[i + 1]].transpose(0, 1) for heads, begin in ((query, queries), (key, keys), (value, keys)))
            window = None if window_size[0] < 0 else window_size[0] + 1
            mask = attention.see(q.shape[1], k.shape[1] - q.shape[1], window, q.device)
            outputs.append(
                functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=enable_gqa)
            )
        return torch.cat(outputs, dim=1).transpose(0, 1)

    by_groups = packed_loss(model, relatives, 260)
    monkeypatch.setattr(attention.varlen, "varlen_attn", attend_one_by_one)
    monkeypatch.setattr(attention, "attend_groups", lambda q, k, v, _groups, *rest: attention.attend_ragged(q, k, v, layouts[0], *rest))
    weight = total = 0.0
    for packed in packing.pack(relatives, 260, "cpu"):
        layouts = [packed.layout.ragged]
        with attention.packed(model):
            total += (packing.token_losses(model, packed) * packed.weights).sum()
        weight += packed.weights.sum()
    assert (total / weight).item() == pytest.approx(by_groups.item(), rel=1e-5)


@pytest.mark.gpu
def test_a_card_attends_without_padding_as_groups_do(relatives):
    draw = torch.Generator("cuda").manual_seed(1)
    for packed in packing.pack(relatives, 260, "cuda"):
        query, key, value = (
            torch.randn(heads, packed.tokens, 64, generator=draw, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for heads in (8, 2, 2)
        )
        for window in (None, 16):
            options = {"scale": None, "enable_gqa": True}
            ragged = attention.attend_ragged(query, key, value, packed.layout.ragged, window, options)
            groups = attention.attend_groups(query, key, value, packed.layout.groups, window, options)
            torch.testing.assert_close(ragged, groups, rtol=2e-2, atol=2e-2)
            slopes = [torch.autograd.grad(output.float().square().sum(), (query, key, value)) for output in (ragged, groups)]
            for one, other in zip(*slopes, strict=True):
                torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)
