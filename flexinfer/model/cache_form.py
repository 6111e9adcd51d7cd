"""What a model keeps between tokens, as its first passes on the meta device show it.

transformers makes a cache of layers of many kinds: keys and values of all tokens, of a window, the
states of linear attention and of convolutions, the keys of an indexer. Layers of full attention get
memory that is set aside (flexinfer.streaming.kv_cache). What the others hold for a number of tokens
is found here without their contents: the layer of a first token, its states once for each sequence,
and the keys of the tokens after it put in by the layer's own methods. Where that is not how a layer
grows, the model runs over so many tokens.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from flexinfer.plan.plan import PassShape
from flexinfer.streaming.kv_cache import LayerShape, LayerShapes, ReservedLayer

Layer = CacheLayerMixin | LinearAttentionCacheLayerMixin | DummyLayer


@dataclass(frozen=True, slots=True)
class CacheForm:
    """The cache of a model, on the meta device."""

    config: PretrainedConfig
    # Of one sequence, after its first token.
    first: DynamicCache
    # Whether it is known how all of its layers grow.
    known: bool

    @property
    def layers(self) -> LayerShapes:
        """What a token keeps in each layer that memory is set aside for."""
        return [shape_of(layer) for layer in self.first.layers]

    @property
    def can_forget(self) -> bool:
        """Whether the last tokens can be taken back, as a draft needs it."""
        return self.known and all(isinstance(layer, DynamicLayer) for layer in self.first.layers)

    def filled(
        self, model: PreTrainedModel, shape: PassShape, kv_dtype: torch.dtype
    ) -> tuple[DynamicCache, list[torch.Tensor]]:
        """A cache that holds the past of `shape`, and the memory of its reserved layers.

        On the meta device, as are `model` and what calls it.
        """
        dtype = model.dtype
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        if not self.known and shape.past_tokens:
            past = torch.zeros(shape.batch, shape.past_tokens, dtype=torch.long)
            model(input_ids=past, cache=cache, use_cache=True)
        if not cache.layers:
            cache.layers = [DynamicLayer() for _ in self.first.layers]
        memory: list[torch.Tensor] = []
        for i, first in enumerate(self.first.layers):
            kept = shape_of(first)
            if kept is None:
                if shape.past_tokens and self.known:
                    cache.layers[i] = _grown(first, shape.batch, shape.past_tokens)
                continue

            def states(tokens: int, of: tuple[int, int]) -> torch.Tensor:
                return torch.empty(shape.batch, of[0], tokens, of[1], dtype=dtype)

            length = shape.past_tokens + shape.new_tokens
            room = states(length, kept.value).to(kv_dtype), states(length, kept.key).to(kv_dtype)
            memory.extend(room)
            layer = ReservedLayer(partial(_of_pair, room), torch.empty(0, dtype=dtype))
            cache.layers[i] = layer
            if shape.past_tokens:
                layer.update(
                    states(shape.past_tokens, kept.key), states(shape.past_tokens, kept.value)
                )
        return cache, memory


def shape_of(layer: Layer) -> LayerShape | None:
    """Of a layer after a token of one sequence; None for one that transformers keeps itself."""
    if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
        return None
    keys, values = layer.keys, layer.values
    return LayerShape((keys.shape[1], keys.shape[3]), (values.shape[1], values.shape[3]))


def tensors_of(layer: Layer) -> Iterator[torch.Tensor]:
    """All that a layer of the cache keeps."""
    for value in vars(layer).values():
        for one in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(one, torch.Tensor):
                yield one


def _grown(first: Layer, batch: int, tokens: int) -> Layer:
    """A layer of one sequence and one token, for `batch` sequences of `tokens`."""
    layer = copy.deepcopy(first)
    if batch > 1:
        layer.reorder_cache(torch.zeros(batch, dtype=torch.long))  # type: ignore[arg-type]
    if isinstance(layer, DynamicLayer) and layer.keys is not None and tokens > 1:
        assert layer.values is not None
        layer.update(_tokens(layer.keys, 2, tokens - 1), _tokens(layer.values, 2, tokens - 1))
    if isinstance(layer, DynamicIndexedLayer) and layer.indexer_keys is not None and tokens > 1:
        layer.update_indexer(_tokens(layer.indexer_keys, 1, tokens - 1))
    return layer


def _tokens(kept: torch.Tensor, dim: int, count: int) -> torch.Tensor:
    shape = list(kept.shape)
    shape[dim] = count
    return kept.new_empty(shape)


def _of_pair(
    room: tuple[torch.Tensor, torch.Tensor], states: torch.Tensor, is_key: bool
) -> torch.Tensor:
    return room[is_key]


def growth_is_known(one: DynamicCache, two: DynamicCache) -> bool:
    """Whether the cache of one token, grown as it is here, is like that of two."""
    grown = [_grown(first, 1, 2) for first in one.layers]
    sizes = [
        [sum(tensor.numel() for tensor in tensors_of(layer)) for layer in layers]
        for layers in (grown, two.layers)
    ]
    return sizes[0] == sizes[1]
