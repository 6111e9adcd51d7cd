"""The KV cache, allocated once for `context` tokens and used in place.

transformers' `DynamicLayer` grows by concatenation: each token copies the cache and holds both
copies for a moment. Here a layer is a view into memory that was set aside at load time, so a long
generation takes no more than a short one. The values and their order are the same, unless the
memory is of a smaller dtype: then they are rounded when they are kept, and made wide again for the
attention, some heads at a time (flexinfer.kernels.attention). All other layers stay transformers'
own: sliding windows and the states of linear attention, which do not grow with the text, and the
few that keep more than keys and values for each token.
"""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from flexinfer.kernels.attention import Rounded
from flexinfer.kernels.gradients import records_gradients
from flexinfer.memory.buffer import Buffer

# Heads of a whole context that are made wide at a time, so that each thread has some.
WIDE_HEADS = 4
# The least memory for wide copies.
WIDE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one token keeps in one layer of full attention."""

    # (heads, head_dim).
    key: tuple[int, int]
    value: tuple[int, int]

    def nbytes(self, context: int, itemsize: int) -> int:
        """Bytes to set aside for `context` tokens."""
        numbers = self.key[0] * self.key[1] + self.value[0] * self.value[1]
        return context * numbers * itemsize

    def wide_bytes(self, context: int, itemsize: int) -> int:
        """Bytes for some of the heads of `context` tokens in another dtype."""
        all_bytes = self.nbytes(context, itemsize)
        return min(all_bytes, max(WIDE_BYTES, -(-all_bytes * WIDE_HEADS // self.key[0])))


# For each layer of the cache; None for one that transformers keeps itself.
LayerShapes = Sequence[LayerShape | None]


def full_layers(layers: LayerShapes) -> list[LayerShape]:
    """Those that memory is set aside for."""
    return [layer for layer in layers if layer is not None]


def reserved_bytes(
    layers: LayerShapes, context: int, dtype: torch.dtype, compute_dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes to set aside for keys and values in `dtype`, and beside them for heads in
    `compute_dtype` if that is another.
    """
    full = full_layers(layers)
    kept_bytes = sum(layer.nbytes(context, dtype.itemsize) for layer in full)
    if dtype == compute_dtype:
        return kept_bytes, 0
    return kept_bytes, max(
        (layer.wide_bytes(context, compute_dtype.itemsize) for layer in full), default=0
    )


def tokens_in(cache: Cache) -> int:
    """Tokens of each sequence that `cache` holds; 0 where no layer counts them."""
    counted = any(isinstance(layer, CacheLayerMixin) for layer in cache.layers)
    return cache.get_seq_length() if counted else 0


class ContextError(ValueError):
    """A sequence is longer than the KV cache was sized for."""


def too_long(batch: int, room: int, needed: int) -> str:
    """What to say of a pass after which each of `batch` sequences would have `needed` tokens and
    not `room`.
    """
    return (
        f"the KV cache is sized for context={batch * room} tokens in all ({batch} x {room}) and "
        f"this pass needs {batch} x {needed}; nothing was run and the cache is as it was. Load the "
        f"model with a larger context, flexinfer.from_pretrained(..., context={batch * needed}), "
        "or crop the cache"
    )


class ReservedLayer(DynamicLayer):
    """A full-attention layer whose keys and values lie in reserved memory, perhaps in another dtype
    than is computed in.
    """

    def __init__(
        self,
        reserve: Callable[[torch.Tensor, bool], torch.Tensor],
        # Memory for copies of some heads in the compute dtype.
        scratch: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self._reserve, self._scratch = reserve, scratch
        self._length = 0
        self._revoked = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        # [batch, heads, context // batch, head_dim].
        self._key_memory = self._reserve(key_states, True)
        self._value_memory = self._reserve(value_states, False)
        self._show(0)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [batch, heads, new, head_dim] and return all that is kept.

        Raises ContextError past the reserved length.
        """
        if self._revoked:
            raise RuntimeError(
                "this KV cache came with the output of a call that was given none, and a later "
                "such call has taken its memory; to go on from several calls, make a transformers "
                "DynamicCache for each and pass it as cache"
            )
        if records_gradients(key_states, value_states):
            self._leave(key_states.dtype)
            return self.update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, stop = self._length, self._length + key_states.shape[-2]
        batch, room = self._key_memory.shape[0], self._key_memory.shape[-2]
        if stop > room:
            raise ContextError(too_long(batch, room, stop))
        self._show(stop)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        keys.narrow(2, start, stop - start).copy_(key_states)
        values.narrow(2, start, stop - start).copy_(value_states)
        scratch = self._scratch
        if (
            scratch is not None
            and keys.dtype != key_states.dtype == value_states.dtype == scratch.dtype
        ):
            return Rounded.of(keys, scratch), Rounded.of(values, scratch)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    @property
    def length(self) -> int:
        """Tokens of each sequence."""
        return self._length

    @property
    def room(self) -> int | None:
        """Tokens of each sequence that there is room for; None before the first."""
        return self._key_memory.shape[-2] if self.is_initialized else None

    def _leave(self, dtype: torch.dtype) -> None:
        """Become a layer of transformers' own, with copies of what is kept: a graph needs keys and
        values that nothing overwrites.
        """
        kept = [one.to(dtype, copy=True) for one in self._kept()] if self.is_initialized else None
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        if kept is not None:
            self.keys, self.values = kept

    def _kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        length = self._length
        return self._key_memory.narrow(2, 0, length), self._value_memory.narrow(2, 0, length)

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self._kept()

    def revoke(self) -> None:
        """Let go of the memory; the layer cannot be used any more."""
        self._revoked = True
        if self.is_initialized:
            del self.keys, self.values, self._key_memory, self._value_memory
            self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop({tokens_to_remove}): give the number of tokens to remove as a negative "
                "number"
            )
        if self.is_initialized:
            self._show(max(0, self._length + tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        if self.is_initialized:
            self._show(0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beam search: sequence i goes on from what sequence beam_idx[i] was."""
        if self._length:
            for kept in self._kept():
                kept.copy_(kept.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times: another batch size, so the reserved memory is laid out
        anew.
        """
        keys, values = self._kept()
        self._relayout(
            keys.repeat_interleave(repeats, dim=0), values.repeat_interleave(repeats, dim=0)
        )

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences at `indices`."""
        keys, values = self._kept()
        self._relayout(keys[indices, ...], values[indices, ...])

    def _relayout(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.is_initialized, self._length = False, 0
        self.update(keys, values)


class KVReserve:
    """Memory for the keys and values of one cache at a time, `context` tokens over all its
    sequences.
    """

    def __init__(
        self,
        layers: LayerShapes,
        context: int,
        dtype: torch.dtype,
        # None for the same as `dtype`.
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self._context, self._dtype, self.layers = context, dtype, layers
        self._starts = list(
            accumulate(
                (one.nbytes(context, dtype.itemsize) if one else 0 for one in layers), initial=0
            )
        )
        self._wide_dtype = compute_dtype or dtype
        self._kept_bytes, self._wide_bytes = reserved_bytes(
            layers, context, dtype, self._wide_dtype
        )
        self.nbytes = self._kept_bytes + self._wide_bytes
        self._buffer: Buffer | None = None
        self._user: weakref.ref[DynamicCache] | None = None
        # Whether a cache that transformers made has it; it makes way for the next.
        self._lent = False

    def allocate(self) -> None:
        """Set the memory aside, if it is not yet."""
        if self._buffer is None:
            self._buffer = Buffer(self.nbytes, lock=True)

    def new_cache(self, config: PretrainedConfig) -> DynamicCache:
        """A cache for a call that brought none, in the reserved memory if it is free.

        Such a cache is seldom used after its call; the next such call takes the memory back, and
        using the older one raises.
        """
        older = self._user() if self._user is not None else None
        if self._lent and older is not None:
            for layer in older.layers:
                if isinstance(layer, ReservedLayer):
                    layer.revoke()
            self._user = None
        cache = DynamicCache(config=config)
        self.adopt(cache)
        self._lent = self._user is not None and self._user() is cache
        return cache

    def holds(self, cache: object) -> bool:
        """Whether `cache` has the reserved memory."""
        return self._user is not None and self._user() is cache and cache is not None

    def room(self, cache: object | None, rows: int, takes_back: bool = False) -> int | None:
        """Tokens of each of `rows` sequences that `cache` has room for, or a new stock one (None);
        None for one with its own memory.

        takes_back: memory that is lent is free, as for `new_cache`.
        """
        for layer in cache.layers if isinstance(cache, DynamicCache) and self.holds(cache) else ():
            if isinstance(layer, ReservedLayer):
                return layer.room or self._context // rows
        free = self._user is None or self._user() is None or (takes_back and self._lent)
        return (
            self._context // rows
            if free and full_layers(self.layers) and (cache is None or self._may_adopt(cache))
            else None
        )

    def check(self, cache: object | None, rows: int, new_tokens: int) -> None:
        """See, before a pass, that `new_tokens` of each of `rows` sequences fit.

        Raises ContextError.
        """
        held = cache.layers if isinstance(cache, DynamicCache) and self.holds(cache) else []
        past = max((layer.length for layer in held if isinstance(layer, ReservedLayer)), default=0)
        room = self.room(cache, rows, takes_back=cache is None)
        if room is not None and past + new_tokens > room:
            raise ContextError(too_long(rows, room, past + new_tokens))

    def _may_adopt(self, cache: object) -> bool:
        """Whether `cache` is an empty stock cache, and no other live one has the memory."""
        if type(cache) is not DynamicCache or tokens_in(cache):
            return False
        if any(getattr(layer, "is_initialized", False) for layer in cache.layers):
            return False
        return self._user is None or self._user() is None

    def adopt(self, cache: DynamicCache) -> None:
        """Give an empty stock cache the reserved memory, unless another cache that is still alive
        has it.
        """
        if self._buffer is None or not self._may_adopt(cache):
            return
        if not cache.layers and None not in self.layers:
            cache.layers.extend(DynamicLayer() for _ in self.layers)
        if len(cache.layers) != len(self.layers):
            return
        adopted = False
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and self.layers[i] is not None:
                cache.layers[i] = ReservedLayer(self._reserver(i), self._scratch())
                adopted = True
        if adopted:
            self._user, self._lent = weakref.ref(cache), False

    def _scratch(self) -> torch.Tensor | None:
        if not self._wide_bytes:
            return None
        assert self._buffer is not None
        count = self._wide_bytes // self._wide_dtype.itemsize
        return self._buffer.tensor(self._kept_bytes, self._wide_dtype, (count,))

    def _reserver(self, layer: int) -> Callable[[torch.Tensor, bool], torch.Tensor]:
        def reserve(states: torch.Tensor, is_key: bool) -> torch.Tensor:
            assert self._buffer is not None
            batch, heads, _, head_dim = states.shape
            shape = self.layers[layer]
            assert shape is not None
            assert (heads, head_dim) == (shape.key if is_key else shape.value)
            start = self._starts[layer]
            if not is_key:
                start += self._context * shape.key[0] * shape.key[1] * self._dtype.itemsize
            return self._buffer.tensor(
                start, self._dtype, (batch, heads, self._context // batch, head_dim)
            )

        return reserve

    def stock_bytes(self, tokens: int) -> int:
        """What a cache of transformers' own takes that holds so many tokens, over all its
        sequences.
        """
        return sum(
            layer.nbytes(tokens, self._wide_dtype.itemsize) for layer in full_layers(self.layers)
        )

    def close(self) -> None:
        """Free the memory, once no cache refers to it."""
        self._buffer = None
