import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.model_fixtures import tiny_base
from trainers import packing, score
from trainers.data import Example

LENGTHS = [(5, 3), (30, 2), (6, 3), (90, 1), (1, 4), (31, 6), (29, 2)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tmp_path_factory):
    """A Llama type, and a Mistral type whose sliding window is shorter than some sequences."""
    window = {"sliding_window": 16} if request.param == "mistral" else {}
    base, _ = score.load_base(tiny_base(tmp_path_factory.mktemp(request.param) / "tiny", request.param, **window), "cpu")
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


def packed_loss(model, examples, max_tokens):
    packs = packing.pack(examples, max_tokens, "cpu")
    weight = sum(packed.weights.sum() for packed in packs)
    with packing.packed_attention(model):
        return sum((packing.token_losses(model, packed) * packed.weights).sum() for packed in packs) / weight


def gradients(model, loss):
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad], strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("max_tokens", [40, 100, 4096])
def test_packed_and_unpacked_losses_and_gradients_agree(model, examples, max_tokens):
    plain, packed = unpacked_loss(model, examples), packed_loss(model, examples, max_tokens)
    assert packed.item() == pytest.approx(plain.item(), rel=1e-5)
    expected, actual = gradients(model, plain), gradients(model, packed)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_an_example_is_graded_the_same_whatever_lies_beside_it(model, examples):
    alone = packing.pack(examples[:1], 4096, "cpu")[0]
    beside = packing.pack(examples, 4096, "cpu")[0]
    with packing.packed_attention(model):
        own = packing.token_losses(model, alone)
        all_losses = packing.token_losses(model, beside)
    of_first = all_losses[beside.weights == examples[0].weight]
    torch.testing.assert_close(of_first, own, rtol=1e-5, atol=1e-5)


def test_the_head_runs_on_graded_positions_only(model, examples):
    packed = packing.pack(examples, 4096, "cpu")[0]
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    try:
        with packing.packed_attention(model):
            packing.token_losses(model, packed)
    finally:
        hook.remove()
    assert rows == [sum(len(example.completion) for example in examples)]


def test_the_models_own_attention_is_back_after_packing(model):
    with packing.packed_attention(model):
        assert model.config._attn_implementation == packing.ATTENTION
    assert model.config._attn_implementation == "sdpa"


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=30), max_tokens=st.integers(16, 200))
def test_every_token_is_packed_once_without_padding_within_the_budget(lengths, max_tokens):
    examples = [Example([1] * prompt, [2] * completion) for prompt, completion in lengths]
    packs = packing.pack(examples, max_tokens, "cpu")
    assert sum(packed.tokens for packed in packs) == sum(example.tokens for example in examples)
    assert sum(len(packed.targets) for packed in packs) == sum(len(example.completion) for example in examples)
    for packed in packs:
        sequences = int((packed.position_ids == 0).sum())
        assert packed.tokens <= max_tokens or sequences == 1
        cells = torch.cat([group.places.flatten()[group.real] for group in packed.groups])
        assert torch.equal(cells, torch.arange(packed.tokens))
