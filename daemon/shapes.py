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
    if not isinstance(config, Mapping):
        raise ShapeUnknownError(f"text_config in config.json is {config!r}: is this a whole checkpoint?")
    if config.get("model_type") not in DECODERS:
        raise ShapeUnknownError(f"model_type is {config.get('model_type')!r}: memory can be planned for {', '.join(DECODERS)}")
    width, heads = _read_size(config, "hidden_size"), _read_size(config, "num_attention_heads")
    head = _read_size(config, "head_dim", width // heads)
    return Shape(
        layers=_read_size(config, "num_hidden_layers"),
        width=width,
        inner=_read_size(config, "intermediate_size"),
        queries=heads * head,
        keys=_read_size(config, "num_key_value_heads", heads) * head,
        heads=heads,
        vocabulary=_read_size(config, "vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        context=_read_size(config, "max_position_embeddings"),
    )


def _read_size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """A number above 0; `default` where it may be left out, and is or is null."""
    size = config.get(name)
    if size is None and default is not None:
        return default
    if name not in config:
        raise ShapeUnknownError(f"{name} is missing in config.json: is this a whole checkpoint?")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ShapeUnknownError(f"{name} in config.json is {size!r}, and is to be a whole number above 0: is this a whole checkpoint?")
    return size
