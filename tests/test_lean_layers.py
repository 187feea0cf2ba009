"""The layers as we compute them make what the libraries' own make, learn the same, and keep less."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from tests import model_fixtures
from trainers import lean_layers

RANK, ALPHA, TOKENS = 4, 6, 24
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


def make_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, *names: str) -> Any:
    """A random model of two layers with adapters in fp32 that change something, the first of them in force."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model(architecture, num_hidden_layers=2, vocab_size=50, pad_token_id=0, **sizes)
    base = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    adapter = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, adapter)
    for name in names:
        model.add_adapter(name, adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    return model


def ask() -> torch.Tensor:
    """Two sequences of tokens."""
    return torch.randint(50, (2, TOKENS), generator=torch.Generator().manual_seed(4))


def learn(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The logits, what each trained matrix learns of them, and the bytes that were kept for it."""
    model.zero_grad()
    with model_fixtures.counting_kept(model) as count:
        logits = model(input_ids=ask(), use_cache=False).logits
    logits.float().logsumexp(-1).square().mean().backward()
    learned = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return logits.detach(), learned, count()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_they_make_and_learn_the_same(architecture: str, dtype: torch.dtype, near: float) -> None:
    model = make_model(architecture, dtype)
    logits, learned, _ = learn(model)
    with lean_layers.used(model):
        assert {"adapt", "gate", "norm"} == {module.forward.func.__name__ for module in model.modules() if "forward" in vars(module)}
        ours, taught, _ = learn(model)
    assert (ours - logits).norm() <= near * logits.norm()
    assert taught.keys() == learned.keys()
    for name, gradient in learned.items():
        assert taught[name].dtype == torch.float32
        assert (taught[name] - gradient).norm() <= near * gradient.norm(), name


def test_weights_of_norms_and_matrices_learn_the_same_without_adapters() -> None:
    model = make_model().unload().requires_grad_()
    logits, learned, _ = learn(model)
    with lean_layers.used(model):
        ours, taught, _ = learn(model)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-5)
    for name, gradient in learned.items():
        assert (taught[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_adapters_in_fp32_on_a_base_in_bf16_keep_no_copy_of_what_they_read() -> None:
    model = make_model(dtype=torch.bfloat16)
    theirs = learn(model)[2]
    with lean_layers.used(model):
        ours = learn(model)[2]
    assert ours < 0.75 * theirs  # The norms keep more on a CPU than on a card.


def test_the_adapters_in_force_answer_and_no_other() -> None:
    model = make_model("llama", torch.float32, "second")
    for in_force in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(in_force)
        plain = model(input_ids=ask()).logits
        with lean_layers.used(model):
            torch.testing.assert_close(model(input_ids=ask()).logits, plain, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        bare = model(input_ids=ask()).logits
        with lean_layers.used(model):
            torch.testing.assert_close(model(input_ids=ask()).logits, bare, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(bare, plain, atol=1e-3)


def test_another_kind_of_decoder_keeps_its_own_norms_and_mlp() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.AutoConfig.for_model("gemma", num_hidden_layers=1, vocab_size=50, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with lean_layers.used(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_used_within_used_leaves_what_was_before() -> None:
    model = make_model()
    with lean_layers.used(model):
        logits = model(input_ids=ask()).logits
        with lean_layers.used(model):
            pass
        assert any("forward" in vars(module) for module in model.modules())
        torch.testing.assert_close(model(input_ids=ask()).logits, logits)


def test_the_libraries_own_layers_are_back_afterwards() -> None:
    model = make_model()
    with pytest.raises(ZeroDivisionError), lean_layers.used(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())
