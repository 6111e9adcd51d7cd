"""How much memory a pass takes beside weights and KV cache, found by running it on the meta device.

Tensors on the meta device have shapes and no contents, so a pass over a model of any size takes a
fraction of a second and no memory. What the pass would have allocated is followed from operation to
operation, and given back when Python lets go of it, as it would be in earnest: attention that keeps
T x T matrices, logits of all positions, the masks of a padded batch and the layers of a sliding
window need no formula of their own, in any family. What the meta device does not show is added: the
output of one piece of a weight while it is joined to the others, a piece that the kernel copies,
and what sampling makes of the logits.

Attention by `scaled_dot_product_attention` runs block by block on a CPU and keeps no T x T matrix;
on the meta device it would, so it is replaced by its result. Not here: the KV cache of
full-attention layers, which is reserved (flexinfer.streaming.kv_cache).
"""

import copy
import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flexinfer.kernels import Kernel
from flexinfer.model.cache_form import CacheForm, tensors_of
from flexinfer.modules.linear import JOINED_OUTPUT_BYTES
from flexinfer.plan.plan import PassShape
from flexinfer.plan.weights import Weight
from flexinfer.streaming.kv_cache import ReservedLayer, full_layers

# A position and token: scores in float32, their log-softmax, sorted copies with their indices.
SAMPLING_BYTES = 32

# Most new tokens of a decoding pass: one, or the candidates of a draft.
FEW_TOKENS = 16

# A pair of positions: the boolean masks of padding, causality and their union, before the last
# one.
MASK_BYTES = 6


@dataclass(frozen=True, slots=True)
class PassMemory:
    """Bytes that a pass allocates beside weights and the reserved KV cache."""

    # Layers of the cache that transformers keeps itself, which exist before the pass.
    start_bytes: int
    # The most during the pass and the choice of the next tokens, start_bytes included.
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class ComputedLinear:
    """A linear of the model, as it is computed."""

    weight: Weight
    kernel: Kernel
    # Whether its output rows are reordered.
    reordered: bool


class PassMeter:
    """Says what passes of a model take.

    Builds it on the meta device when it is first asked, and keeps what it found.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        cache: CacheForm,
        products: Sequence[ComputedLinear],
        scale: int = 1,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self._kv_dtype = kv_dtype or dtype
        # Itemsize of the compute dtype over that of `dtype`.
        self._scale = scale
        self._config, self._dtype, self._cache, self._products = config, dtype, cache, products
        self._model: PreTrainedModel | None = None
        self._found: dict[PassShape, PassMemory] = {}

    def planned_bytes(self, context: int, logits_to_keep: int) -> int:
        """What any call takes at most that has up to `context` tokens and `logits_to_keep`
        positions over all its sequences.
        """
        batch = min(logits_to_keep, context)
        shapes = {
            PassShape(1, context, 0, logits_to_keep),
            PassShape(1, 1, context - 1),
            PassShape(batch, max(1, context // batch)),
        }
        peak_bytes = max(self._memory(shape).peak_bytes for shape in shapes)
        self._model = None
        return peak_bytes

    def extra_bytes(self, shape: PassShape, context: int) -> int:
        """What a pass of `shape` takes beyond what is in memory before it."""
        # The same answer for each token.
        if shape.new_tokens <= FEW_TOKENS and shape.total_tokens <= context:
            shape = replace(shape, past_tokens=context // shape.batch - shape.new_tokens)
        found = self._memory(replace(shape, cached=True))
        if shape.cached:
            return found.peak_bytes - found.start_bytes
        sizes = [
            layer.nbytes(shape.total_tokens, self._dtype.itemsize * self._scale)
            for layer in full_layers(self._cache.layers)
        ]
        grown = sum(sizes) * shape.new_tokens // (shape.new_tokens + shape.past_tokens)
        return found.peak_bytes - found.start_bytes + grown + max(sizes, default=0)

    def _memory(self, shape: PassShape) -> PassMemory:
        if shape not in self._found:
            if self._model is None:
                self._model = meta_model(self._config, self._dtype)
            found = pass_memory(self._model, self._cache, self._products, shape, self._kv_dtype)
            self._found[shape] = PassMemory(
                found.start_bytes * self._scale, found.peak_bytes * self._scale
            )
        return self._found[shape]


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: shapes alone. Passes over it compute nothing."""
    config = copy.deepcopy(config)
    # Else GPT-2 looks for padding among token ids that have no values here.
    config.pad_token_id = None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def pass_memory(
    model: PreTrainedModel,
    form: CacheForm,
    products: Sequence[ComputedLinear],
    shape: PassShape,
    kv_dtype: torch.dtype,
) -> PassMemory:
    """What a pass of `shape` through `model`, which is on the meta device, would allocate."""
    config = model.config.get_text_config(decoder=True)
    itemsize = model.dtype.itemsize
    rows = shape.batch * shape.new_tokens
    keys = shape.past_tokens + shape.new_tokens
    with torch.device("meta"), torch.no_grad():
        cache, reserved = form.filled(model, shape, kv_dtype)
        ids = torch.zeros(shape.batch, shape.new_tokens, dtype=torch.long)
        can_keep_fewer = "logits_to_keep" in inspect.signature(model.forward).parameters
        keep: dict[str, Any] = {"logits_to_keep": shape.kept} if can_keep_fewer else {}
        meter = _Meter([*model.parameters(), *model.buffers(), ids, *reserved])
        own = [layer for layer in cache.layers if not isinstance(layer, ReservedLayer)]
        start_bytes = meter.count([tensor for layer in own for tensor in tensors_of(layer)])
        with meter, _AttentionByBlocks():
            output = model(input_ids=ids, cache=cache, use_cache=True, **keep)
        # Logits and the cache.
        after_bytes = meter.live_bytes
        del output
    chosen = shape.batch * (shape.kept_tokens if 0 < shape.kept <= FEW_TOKENS else 1)
    sampling_bytes = after_bytes + chosen * config.vocab_size * SAMPLING_BYTES
    padding_bytes = rows * keys * (MASK_BYTES + itemsize) if shape.batch > 1 else 0
    full = full_layers(form.layers)
    moved_bytes = max((layer.nbytes(shape.total_tokens, itemsize) for layer in full), default=0)
    kept_rows = shape.batch * shape.kept_tokens if can_keep_fewer else rows
    copied_bytes = max(
        (
            _copied_bytes(one, kept_rows if one.weight.kind == "head" else rows, itemsize)
            for one in products
        ),
        default=0,
    )
    # The rows of the input embedding that were looked up.
    table_bytes = rows * config.hidden_size * itemsize
    peak_bytes = max(
        meter.peak_bytes + copied_bytes + table_bytes + padding_bytes,
        sampling_bytes
        # Beams are reordered in the cache.
        + (moved_bytes if shape.batch > 1 else 0),
    )
    return PassMemory(start_bytes, peak_bytes)


def _copied_bytes(product: ComputedLinear, rows: int, itemsize: int) -> int:
    """What `StreamedLinear` holds at most besides the output: one part of it, a piece as the kernel
    may copy it, what the kernel works in, and the output once more to put its rows in order.
    """
    weight = product.weight
    piece = max(weight.pieces, key=lambda piece: piece.nbytes)
    piece_rows = piece.row_stop - piece.row_start
    output_rows = weight.pieces[-1].row_stop
    output_bytes = rows * output_rows * itemsize
    part_bytes = min(output_bytes, max(JOINED_OUTPUT_BYTES, rows * piece_rows * itemsize))
    work_bytes = part_bytes + piece.copied_bytes + product.kernel.work_bytes(rows, output_rows)
    return max(work_bytes, output_bytes if product.reordered else 0)


class _Meter(TorchDispatchMode):
    """Follows the bytes of all storages that operations make, from their making until Python lets
    go of them.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: not wrapped in a way that would import the compiler, which is not used here."""
        return False

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def count(self, tensors: Sequence[torch.Tensor]) -> int:
        """Count storages that were there before. Returns the bytes that are live now."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, nbytes = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.live_bytes += nbytes
                weakref.finalize(storage, self._release, key, nbytes)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return self.live_bytes

    def _release(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= nbytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        self.count([one for one in outputs if isinstance(one, torch.Tensor)])
        return result


class _AttentionByBlocks(TorchFunctionMode):
    """scaled_dot_product_attention as the CPU's kernel does it: no matrix of all pairs, the output
    laid out by position.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            if query.shape[-1] == key.shape[-1] == value.shape[-1] and query.dim() == 4:
                batch, heads, tokens, width = query.shape
                return query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        return func(*args, **(kwargs or {}))
