"""A decoder by its sizes, as the `config.json` of its checkpoint tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DECODERS = ("llama", "mistral", "qwen2", "qwen3")


class ShapeUnknownError(ValueError):
    """The `config.json` is of no decoder that can be counted."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder by its sizes: `keys` is the width of all key heads together, `inner` that of the MLP."""

    layers: int
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocabulary: int
    is_tied: bool
    context: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Input and output width of each matrix in a layer."""
        narrow, wide = (self.width, self.keys), (self.width, self.inner)
        return ((self.width, self.queries), narrow, narrow, (self.queries, self.width), wide, wide, (self.inner, self.width))

    @property
    def in_layers(self) -> int:
        """Weights of the layers' matrices: what is quantised, and what adapters lie on."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linears)

    @property
    def embedded(self) -> int:
        """Weights of the embedding and, unless it is the same, the language-model head."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        """All weights."""
        return self.in_layers + self.embedded + (2 * self.layers + 1) * self.width

    def count_adapter(self, rank: int) -> int:
        """Weights of an adapter on every matrix of every layer."""
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in self.linears)


def read_shape(model_config: Mapping[str, Any]) -> Shape:
    """The sizes that a `config.json` tells. Raises `ShapeUnknownError`."""
    config = model_config.get("text_config", model_config)
    if config.get("model_type") not in DECODERS:
        raise ShapeUnknownError(f"model_type is {config.get('model_type')!r}: memory can be planned for {', '.join(DECODERS)}")
    try:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        head = config.get("head_dim") or width // heads
        return Shape(
            layers=config["num_hidden_layers"],
            width=width,
            inner=config["intermediate_size"],
            queries=heads * head,
            keys=(config.get("num_key_value_heads") or heads) * head,
            heads=heads,
            vocabulary=config["vocab_size"],
            is_tied=bool(config.get("tie_word_embeddings", False)),
            context=config["max_position_embeddings"],
        )
    except KeyError as error:
        raise ShapeUnknownError(f"{error.args[0]} is missing in config.json: is this a whole checkpoint?") from error
