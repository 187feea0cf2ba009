"""daemon.shapes: a decoder's sizes are those of the model that its `config.json` makes."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from daemon import shapes

LLAMA = transformers.LlamaConfig().to_dict()


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_weights_are_counted_as_they_are(architecture: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(architecture, **sizes, vocab_size=1000)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = shapes.read_shape(config.to_dict())
    assert shape.parameters == pytest.approx(model.num_parameters(), rel=0.005)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert shape.count_adapter(16) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({}, "model_type is None"),
        ({"model_type": "mixtral"}, "'mixtral'"),
        ({"model_type": "llama"}, "hidden_size is missing"),
        ({"text_config": None}, "text_config in config.json is None"),
        ({**LLAMA, "num_hidden_layers": None}, "num_hidden_layers in config.json is None"),
        ({**LLAMA, "hidden_size": "4096"}, "hidden_size in config.json is '4096', and is to be a whole number above 0"),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads in config.json is 0"),
    ],
)
def test_a_shape_that_is_not_known_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(shapes.ShapeUnknownError, match=told):
        shapes.read_shape(config)


def test_a_language_model_inside_another_is_found() -> None:
    config = transformers.LlamaConfig().to_dict()
    assert shapes.read_shape({"model_type": "llava", "text_config": config}) == shapes.read_shape(config)
