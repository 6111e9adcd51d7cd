"""Puts streamed modules where the linears, the experts and the input embedding of an empty model
are, and reads the parameters that stay.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from flexinfer.formats.tensors import TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.kernels.ggml import GgmlKernel
from flexinfer.memory.buffer import Buffer
from flexinfer.model.experts import Experts, parameters_of
from flexinfer.model.linears import decoder_of
from flexinfer.model.skeleton import Skeleton
from flexinfer.modules.embedding import StreamedEmbedding
from flexinfer.modules.experts import StreamedExperts
from flexinfer.modules.linear import SameInput, StreamedLinear
from flexinfer.modules.placeholder import streamed_weight
from flexinfer.modules.routing import routed_next
from flexinfer.observe.trace import Trace
from flexinfer.streaming.reader import FileReader, padded_bytes
from flexinfer.streaming.store import WeightStore

CACHE_LINE_BYTES = 64


def install(
    skeleton: Skeleton, store: WeightStore, trace: Trace, *, look_ahead: bool, kept_rows: int
) -> list[StreamedExperts]:
    """Make the empty model of `skeleton` a streamed one. Returns the experts of each layer, if
    there are some.

    Args:
        skeleton: the model.
        store: where its weights will be.
        trace: what modules report to.
        look_ahead: whether the next layer's router hints at the experts to read.
        kept_rows: rows of the embedding that stay in memory.

    Raises:
        ReadError: a parameter that stays could not be read.
    """
    _read_parameters(skeleton, store.reader, trace)
    model, linears = skeleton.model, dict[str, StreamedLinear]()
    for weight in skeleton.weights:
        path = weight.name.removesuffix(".weight")
        linear = StreamedLinear(
            weight, model.get_submodule(path), store, trace, skeleton.row_orders.get(weight.name)
        )
        model.set_submodule(path, linear)
        linears[weight.name] = linear
    for names in skeleton.together:
        _group([linears[name] for name in names], skeleton.kernels, store, trace)
    experts = []
    if skeleton.experts is not None:
        experts = _install_experts(skeleton, skeleton.experts, store, trace, look_ahead=look_ahead)
    if skeleton.weights:
        name = skeleton.embedding_name
        spec, stock = skeleton.specs[name + ".weight"], model.get_input_embeddings()
        assert isinstance(stock, nn.Embedding)
        rows = StreamedEmbedding(
            stock, spec, decoder_of(spec), skeleton.dtype, store, trace, kept_rows
        )
        model.set_submodule(name, rows)
    return experts


def _group(
    linears: list[StreamedLinear], kernels: Mapping[str, Kernel], store: WeightStore, trace: Trace
) -> None:
    """Have linears that get the same input computed in one call, where ggml can."""
    of_ggml = [
        kernel for one in linears if isinstance(kernel := kernels[one.spec.name], GgmlKernel)
    ]
    if len(of_ggml) == len(linears):
        group = SameInput(linears, of_ggml, store, trace)
        for linear in linears:
            linear.join(group)


def _install_experts(
    skeleton: Skeleton, experts: Experts, store: WeightStore, trace: Trace, *, look_ahead: bool
) -> list[StreamedExperts]:
    """Have the experts modules use what is streamed, with placeholders for their parameters."""
    installed: list[StreamedExperts] = []
    first = 0
    for layer in experts.mixture.layers:
        alternate = layer.name in experts.alternate
        streamed = StreamedExperts(
            layer, experts.kernels[layer.name], first, store, trace, alternate=alternate
        )
        module: Any = skeleton.model.get_submodule(layer.name)
        module.streamed = streamed
        router = experts.routers.get(layer.name)
        if look_ahead and router is not None and installed:
            chooses = skeleton.model.get_submodule(router.name)
            installed[-1].look_ahead(partial(routed_next, chooses, router.place, first))
        installed.append(streamed)
        first += len(layer.experts)
        for parameter in parameters_of(layer.name, module):
            leaf = parameter.rpartition(".")[2]
            placeholder = streamed_weight(parameter, getattr(module, leaf).shape, skeleton.dtype)
            module.register_parameter(leaf, placeholder)
    return installed


def _read_parameters(skeleton: Skeleton, reader: FileReader, trace: Trace) -> None:
    """Read norms, biases and whatever else is not streamed."""
    done_bytes, all_bytes = 0, sum(spec.nbytes for spec in skeleton.unstreamed.values())
    for name, spec in skeleton.unstreamed.items():
        owner, _, leaf = name.rpartition(".")
        holder = skeleton.model.get_submodule(owner)
        stock = getattr(holder, leaf)
        tensor = _read_tensor(reader, spec, stock.dtype)
        if isinstance(stock, nn.Parameter):
            holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            holder.register_buffer(leaf, tensor)
        done_bytes += spec.nbytes
        if trace.progress is not None:
            trace.progress("load", done_bytes, all_bytes)


def _read_tensor(reader: FileReader, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    if spec.alternate is not None:
        half = replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] // 2), alternate=None)
        both = (half, replace(spec.alternate, shape=half.shape))
        return torch.stack([_read_tensor(reader, one, dtype) for one in both], -1).flatten(-2)
    if spec.followed_by:
        return torch.cat([_read_tensor(reader, one, dtype) for one in spec.parts])
    buffer = Buffer(padded_bytes(spec.offset_bytes, spec.nbytes), lock=False)
    position = 0
    if spec.nbytes:
        memory = buffer.memory(0, buffer.nbytes)
        position = reader.read(spec.file, spec.offset_bytes, spec.nbytes, memory)
    tensor = buffer.tensor(position, spec.torch_dtype, spec.shape)
    if spec.added:
        return tensor.add(spec.added).to(dtype)
    return tensor.to(dtype) if tensor.dtype != dtype else _copy_as_mapped(tensor, spec.offset_bytes)


def _copy_as_mapped(tensor: torch.Tensor, offset_bytes: int) -> torch.Tensor:
    """A copy that begins at such an address as it does where transformers maps the file.

    MKL may add up the products of a single row of fp32 in another order at an address that is no
    multiple of 16.
    """
    memory = torch.empty(tensor.nbytes + CACHE_LINE_BYTES, dtype=torch.uint8)
    start = (offset_bytes - memory.data_ptr()) % CACHE_LINE_BYTES
    # transformers cannot map it either.
    if start % tensor.itemsize:
        return tensor.clone()
    copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
