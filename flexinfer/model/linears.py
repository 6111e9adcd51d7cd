"""The linears that can be streamed, cut into pieces of a few MiB, and the kernels that multiply
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexinfer.formats.tensors import FLOAT_NAMES, CheckpointError, Packed, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import Conv1DKernel, DenseKernel
from flexinfer.kernels.input_rows import InputRowsKernel, Layout
from flexinfer.kernels.packed import PackedKernel, Side
from flexinfer.memory.buffer import Buffer
from flexinfer.model import pieces
from flexinfer.plan.weights import Kind, Weight


def row_orders_of(
    specs: dict[str, TensorSpec], weights: Sequence[Weight]
) -> dict[str, torch.Tensor]:
    """An index of rows for each weight that wants one. Layers share them."""
    orders = {weight.name: specs[weight.name].row_order for weight in weights}
    indices = {order: torch.tensor(order) for order in set(orders.values()) if order is not None}
    return {name: indices[order] for name, order in orders.items() if order is not None}


def decoder_of(spec: TensorSpec) -> Callable[[Buffer, int], torch.Tensor]:
    """What makes numbers [in_features] of the bytes of one row of `spec`, which begin at a position
    of a buffer.
    """
    width = spec.shape[-1]
    if spec.encoding.torch_name is not None:
        return lambda buffer, position: buffer.tensor(position, spec.torch_dtype, (width,))
    # This import loads a shared library.
    from flexinfer.kernels.ggml import TYPES, dequantize_rows

    def decode(buffer: Buffer, position: int) -> torch.Tensor:
        row = buffer.tensor(position, torch.uint8, (1, spec.row_bytes))
        return dequantize_rows(TYPES[spec.encoding.name], row, width)[0]

    return decode


def kernel_for(spec: TensorSpec, in_features: int, dtype: torch.dtype) -> Kernel:
    """What multiplies rows of `spec`."""
    if spec.packed is not None:
        return packed_kernel(spec, spec.packed, in_features, dtype)
    if spec.encoding.is_float:
        return DenseKernel(in_features, spec.torch_dtype, dtype)
    if spec.encoding.torch_name is not None:
        raise CheckpointError(
            f"{spec.file}: {spec.name!r} has dtype {spec.dtype}; the weight of a linear can be "
            f"{', '.join(sorted(FLOAT_NAMES))}"
        )
    # This import loads a shared library.
    from flexinfer.kernels.ggml import TYPES, GgmlKernel

    return GgmlKernel(in_features, TYPES[spec.encoding.name], dtype)


def packed_kernel(spec: TensorSpec, packed: Packed, in_features: int, dtype: torch.dtype) -> Kernel:
    """What multiplies rows of `spec`, which are packed so."""
    if packed.by_inputs:
        beside = tuple((one.spec.torch_dtype, one.spec.shape) for one in packed.beside)
        bits = 4 if spec.encoding.block_elements == 2 else 8
        layout = Layout(bits, packed.scheme == "awq", int(packed.scheme == "gptq"))
        return InputRowsKernel(in_features, spec.shape[0], layout, beside, dtype)
    sides = tuple(
        Side(one.spec.torch_dtype, one.rows, one.columns, one.spec.shape[-1])
        for one in packed.beside
    )
    made_in = sides[0].dtype if packed.in_scale_dtype else torch.float32
    return PackedKernel(
        in_features, spec.row_bytes, packed.scheme, sides, dtype, made_in, spec.transposed
    )


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear that can be streamed, and its place in the model."""

    # Name of the module.
    name: str
    module: nn.Module
    # Name within a layer.
    role: str
    # Index of its layer; the number of layers for the output head.
    layer: int
    kind: Kind

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        assert isinstance(self.module, nn.Linear)
        return self.module.out_features, self.module.in_features


def find_linears(model: PreTrainedModel) -> list[Linear]:
    """The linears that can be streamed: those of the decoder stack, and the output head.

    Subclasses of `nn.Linear` may compute something else, so
    only `nn.Linear` itself, `Conv1D` and what is known to be the same are taken.
    """
    stack_name, stack = decoder_stack(model)
    found: list[Linear] = []
    # By several layers, as in Zamba: streamed by the first's name.
    shared: set[nn.Module] = set()
    for layer, decoder_layer in enumerate(stack):
        for role, module in decoder_layer.named_modules():
            if module in shared:
                continue
            shared.add(module)
            if type(module) in {nn.Linear, Conv1D} or _multiplies_alike(module):
                kind: Kind = "attention" if "attn" in role or "attention" in role else "ffn"
                found.append(Linear(f"{stack_name}.{layer}.{role}", module, role, layer, kind))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        name = next(name for name, module in model.named_modules() if module is head)
        found.append(Linear(name, head, name, len(stack), "head"))
    return found


def decoder_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The `nn.ModuleList` with the most parameters, and its name."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__}: no stack of decoder layers found; this architecture cannot "
            "be streamed"
        )
    return max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _multiplies_alike(module: nn.Module) -> bool:
    """Whether a linear of another class is an `nn.Linear` in all but name:

    Falcon's is, without a bias.
    """
    return type(module).__name__ == "FalconLinear" and module.bias is None


def weight_of(linear: Linear, specs: dict[str, TensorSpec]) -> tuple[Weight, Kernel]:
    """The weight of `linear` as pieces, and what multiplies it in the dtype of its parameter: some
    models have a few in float32.
    """
    name = linear.name + ".weight"
    spec = specs[name]
    rows, in_features = linear.features
    assert isinstance(linear.module.weight, torch.Tensor)
    dtype = linear.module.weight.dtype
    piece_bytes: int | None = pieces.PIECE_BYTES
    if isinstance(linear.module, Conv1D) and not spec.transposed and spec.packed is None:
        # Its rows in the file are inputs: a cut would change the order of sums.
        kernel: Kernel = Conv1DKernel(in_features, spec.torch_dtype, dtype)
        piece_bytes = None
    else:
        kernel = kernel_for(spec, in_features, dtype)
    cuts = pieces.cut(spec, rows, kernel, piece_bytes, name=name, layer=linear.layer)
    return Weight(name, linear.role, linear.layer, linear.kind, cuts), kernel
