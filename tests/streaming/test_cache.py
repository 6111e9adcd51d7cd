"""The reserved KV layer is transformers' DynamicLayer in other memory: the same values after any
sequence of operations.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import DynamicLayer

from flexinfer.streaming.kv_cache import ContextError, KVReserve, LayerShape, ReservedLayer

HEADS, KEY_DIM, VALUE_DIM, CONTEXT = 2, 8, 4, 48
SHAPES = [LayerShape((HEADS, KEY_DIM), (HEADS, VALUE_DIM)) for _ in range(3)]


def states(batch: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, HEADS, tokens, dim, generator=generator) for dim in (KEY_DIM, VALUE_DIM)
    )


def reserved() -> tuple[KVReserve, DynamicCache]:
    reserve, cache = KVReserve(SHAPES, CONTEXT, torch.float32), DynamicCache()
    reserve.allocate()
    reserve.adopt(cache)
    return reserve, cache


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 5)),
        st.tuples(st.just("crop"), st.integers(-4, -1)),
        st.tuples(st.just("reorder"), st.integers(0, 99)),
        st.tuples(st.just("repeat"), st.just(2)),
        st.tuples(st.just("select"), st.integers(0, 99)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    min_size=1,
    max_size=12,
)


@given(OPERATIONS, st.integers(1, 3))
def test_any_operations_give_what_a_stock_layer_gives(
    operations: list[tuple[str, int]], batch: int
) -> None:
    _, cache = reserved()
    ours: Any = cache.layers[0]
    theirs: Any = DynamicLayer()
    assert isinstance(ours, ReservedLayer)
    for step, (name, argument) in enumerate([("update", 2), *operations]):
        length = theirs.get_seq_length()
        if name == "update":
            if batch * (length + argument) > CONTEXT // batch * batch:
                continue
            a, b = (layer.update(*states(batch, argument, step)) for layer in (ours, theirs))
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
        elif name == "crop":
            if length < -argument:
                continue
            for layer in (ours, theirs):
                layer.crop(argument)
        elif name == "reorder" and length:
            index = torch.randint(
                0, batch, (batch,), generator=torch.Generator().manual_seed(argument)
            )
            for layer in (ours, theirs):
                layer.reorder_cache(index)
        elif name == "repeat" and length and 2 * batch * length <= CONTEXT and batch < 5:
            batch *= 2
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
        elif name == "select" and length:
            index = torch.tensor(sorted({argument % batch, 0}))
            batch = len(index)
            for layer in (ours, theirs):
                layer.batch_select_indices(index)
        elif name == "reset":
            ours.crop(-ours.get_seq_length()) if argument else ours.reset()
            theirs = DynamicLayer()
            theirs.update(*states(batch, 1, 0))
            theirs.crop(-1)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)


def test_layers_and_keys_and_values_do_not_overlap() -> None:
    _, cache = reserved()
    full = [states(1, CONTEXT, seed) for seed in range(3)]
    for layer, (keys, values) in enumerate(full):
        cache.update(keys, values, layer)
    for layer, (keys, values) in enumerate(full):
        assert torch.equal(cache.layers[layer].keys, keys)
        assert torch.equal(cache.layers[layer].values, values)


def test_appending_takes_no_new_memory() -> None:
    _, cache = reserved()
    places = set()
    for step in range(10):
        cache.update(*states(1, 1, step), 0)
        places.add(cache.layers[0].keys.data_ptr())
    assert len(places) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_reserved_bytes_are_those_of_the_context_over_all_sequences(batch: int) -> None:
    reserve, cache = reserved()
    assert reserve.nbytes == sum(shape.nbytes(CONTEXT, 4) for shape in SHAPES)
    cache.update(*states(batch, CONTEXT // batch, 0), 0)
    with pytest.raises(
        ContextError, match=rf"context={CONTEXT} tokens in all \({batch} x {CONTEXT // batch}\)"
    ):
        cache.update(*states(batch, 1, 1), 0)
    assert cache.get_seq_length() == CONTEXT // batch


def test_one_cache_at_a_time_has_the_memory_and_the_next_one_gets_it() -> None:
    reserve, first = reserved()
    second = DynamicCache()
    reserve.adopt(second)
    assert isinstance(first.layers[0], ReservedLayer)
    assert not any(isinstance(layer, ReservedLayer) for layer in second.layers)
    del first
    third = DynamicCache()
    reserve.adopt(third)
    assert isinstance(third.layers[0], ReservedLayer)


def test_a_cache_that_nobody_asked_for_makes_way_for_the_next() -> None:
    reserve = KVReserve(SHAPES, CONTEXT, torch.float32)
    reserve.allocate()
    config = LlamaConfig(num_hidden_layers=len(SHAPES))
    first = reserve.new_cache(config)
    first.update(*states(1, 3, 0), 0)
    second = reserve.new_cache(config)
    assert not reserve.holds(first)
    assert reserve.holds(second)
    with pytest.raises(RuntimeError, match="make a transformers DynamicCache for each"):
        first.update(*states(1, 1, 1), 0)
    second.update(*states(1, 3, 0), 0)
    assert second.get_seq_length() == 3


def test_a_cache_that_was_asked_for_keeps_its_memory() -> None:
    reserve, mine = reserved()
    mine.update(*states(1, 3, 0), 0)
    other = reserve.new_cache(LlamaConfig(num_hidden_layers=len(SHAPES)))
    assert reserve.holds(mine)
    assert not any(isinstance(layer, ReservedLayer) for layer in other.layers)


def test_a_cache_in_use_or_of_another_kind_is_left_alone() -> None:
    class OtherCache(DynamicCache):
        pass

    reserve = KVReserve(SHAPES, CONTEXT, torch.float32)
    reserve.allocate()
    filled, other = DynamicCache(), OtherCache()
    filled.update(*states(1, 3, 0), 0)
    for cache in (filled, other):
        reserve.adopt(cache)
        assert not any(isinstance(layer, ReservedLayer) for layer in cache.layers)


def test_no_memory_is_set_aside_for_layers_that_transformers_keeps() -> None:
    """The activations count them."""
    per_token = HEADS * (KEY_DIM + VALUE_DIM) * 4
    assert KVReserve([None, SHAPES[0]], CONTEXT, torch.float32).nbytes == CONTEXT * per_token


def test_states_of_a_third_dtype_come_back_in_it() -> None:
    reserve, cache = KVReserve(SHAPES, CONTEXT, torch.float16, torch.bfloat16), DynamicCache()
    reserve.allocate()
    reserve.adopt(cache)
    key, value = states(1, 3, 0)  # float32, where bfloat16 is computed in
    kept = cache.layers[0].update(key, value)
    assert [type(one) for one in kept] == [torch.Tensor, torch.Tensor]
    assert torch.equal(kept[0], key.half().float())
    assert torch.equal(kept[1], value.half().float())
