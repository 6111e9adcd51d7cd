"""Linears whose weight is elsewhere: locked in memory in part, the rest passing through the window.

A `StreamedLinear` stands where the model had an `nn.Linear` (or GPT-2's `Conv1D`). It asks the
store for the rows of its weight, block by block, and multiplies each with the very kernel that the
stock module would use on the whole weight: output rows do not depend on one another, so the bits
are the same. Weights in ggml's blocks differ in the kernel alone (flexinfer.kernels.ggml). It knows
neither files nor budgets.
"""

from collections.abc import Sequence
from contextlib import closing
from time import perf_counter
from typing import cast

import torch
from torch import nn

from flexinfer.kernels.ggml import FEW_ROWS, GgmlKernel, multiply_each
from flexinfer.kernels.gradients import Sum, multiply_with_gradient
from flexinfer.kernels.input_rows import QuantisedKernel
from flexinfer.modules.placeholder import streamed_weight
from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Weight
from flexinfer.streaming.locked import Rows
from flexinfer.streaming.store import WeightStore

# Outputs of locked rows are made at once up to so much.
JOINED_OUTPUT_BYTES = 8 << 20
# Weights that are computed in one call.
MOST_TOGETHER = 8


class StreamedLinear(nn.Linear):
    """A linear that multiplies the rows of `weight` as the store has them. May be called from
    several threads. An `nn.Linear` to those who put adapters beside it.

    Args:
        weight: what the store calls it.
        stock: the module that it replaces.
        row_order: [out_features], where row i of the output is row row_order[i] of the file.
    """

    def __init__(
        self,
        weight: Weight,
        stock: nn.Module,
        store: WeightStore,
        trace: Trace,
        row_order: torch.Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)
        assert isinstance(stock.weight, torch.Tensor)
        self.spec = weight
        self.weight = streamed_weight(weight.name, stock.weight.shape, stock.weight.dtype)
        self.bias = cast(nn.Parameter, stock.bias)
        self.out_features = weight.pieces[-1].row_stop
        self.in_features = self.weight.numel() // self.out_features
        self._store, self._trace, self._row_order = store, trace, row_order
        self._group: SameInput | None = None

    def join(self, group: "SameInput") -> None:
        """Be computed with others that get the same input, where that pays."""
        self._group = group

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        y = multiply_with_gradient(x, self.bias, self._in_file_order, self._input_gradient)
        return y if self._row_order is None else y.gather(-1, self._row_order.expand(y.shape))

    def _in_file_order(self, x: torch.Tensor) -> torch.Tensor:
        """The output, its columns in the order of the file's rows."""
        with self._store.lock:
            self._store.before_use()
            y = self._group.output(self, x) if self._group is not None else None
            return self._multiply(x) if y is None else y

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """For each block of rows, multiply."""
        y: torch.Tensor | None = None
        with closing(self._store.rows(self.spec)) as blocks:
            for block in blocks:
                for rows in block.parts(self._rows_at_once(x, block)):
                    start_s = perf_counter()
                    bias = None if self.bias is None else self.bias[rows.row_start : rows.row_stop]
                    part = rows.kernel.multiply(x, rows.view, rows.count, bias)
                    self._trace.add(
                        "compute", self.spec.name, self.spec.layer, start_s, rows.nbytes
                    )
                    if rows.count == self.out_features:
                        return part
                    if y is None:
                        y = x.new_empty(*x.shape[:-1], self.out_features)
                    y[..., rows.row_start : rows.row_stop] = part
        assert y is not None
        return y

    def _input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [..., out_features] of the output, in the file's order -> [..., in_features]."""
        total = Sum(gradient)
        with self._store.lock, closing(self._store.rows(self.spec)) as blocks:
            for block in blocks:
                # Floats need no copy of the whole.
                copied = isinstance(block.kernel, GgmlKernel | QuantisedKernel)
                step = block.step if copied else block.count
                for rows in block.parts(step):
                    total.add(rows.row_start, rows.kernel.matrix(rows.view))
        return total.value

    def _rows_at_once(self, x: torch.Tensor, block: Rows) -> int:
        """How many rows of a block are multiplied in one call: all, unless that takes much memory
        for a copy or a part of the output.
        """
        if not folds(x) or isinstance(block.kernel, QuantisedKernel):
            return block.step
        output_bytes = block.count * (x.numel() // x.shape[-1]) * x.element_size()
        whole = block.count == self.out_features
        return block.count if whole or output_bytes <= JOINED_OUTPUT_BYTES else block.step

    def extra_repr(self) -> str:
        locked_bytes = self._store.locked_bytes(self.spec)
        return (
            f"{tuple(self.weight.shape)}, bias={self.bias is not None}, locked={locked_bytes} of "
            f"{self.spec.nbytes} bytes"
        )


class SameInput:
    """Linears that get the same input, one after another, their weights in ggml's blocks: while all
    rows are locked and activation rows are few, one call computes all of them, and threads are
    woken once.
    """

    def __init__(
        self,
        linears: Sequence[StreamedLinear],
        kernels: Sequence[GgmlKernel],
        store: WeightStore,
        trace: Trace,
    ) -> None:
        self._linears, self._kernels = linears[:MOST_TOGETHER], kernels
        self._store, self._trace = store, trace
        self._input: tuple[torch.Tensor, int] | None = None
        self._outputs: dict[StreamedLinear, torch.Tensor] = {}

    def output(self, linear: StreamedLinear, x: torch.Tensor) -> torch.Tensor | None:
        """What `linear` makes of x; None where it has to be computed by itself."""
        seen, y = self._input, self._outputs.pop(linear, None)
        if not self._outputs:
            self._input = None
        if y is not None and seen is not None and seen[0] is x and seen[1] == x._version:
            return y
        if (
            linear is self._linears[0]
            and folds(x)
            and x.numel() <= FEW_ROWS * x.shape[-1]
            and not x.is_inference()
        ):
            return self._compute(x)
        return None

    def _compute(self, x: torch.Tensor) -> torch.Tensor | None:
        """The output of the first, those of the others kept until they get the same input."""
        blocks = [self._store.locked_rows(linear.spec) for linear in self._linears]
        found = [
            (one, kernel, rows)
            for one, kernel, rows in zip(self._linears, self._kernels, blocks, strict=False)
            if rows
        ]
        if blocks[0] is None:
            return None
        start_s = perf_counter()
        parts = [
            (kernel, rows.view.data_ptr(), one.out_features, one.bias)
            for one, kernel, rows in found
        ]
        first, *others = multiply_each(x, parts)
        self._outputs = {one: y for (one, _, _), y in zip(found[1:], others, strict=True)}
        self._input = (x, x._version) if self._outputs else None
        weight, nbytes = self._linears[0].spec, sum(one.spec.nbytes for one, _, _ in found)
        self._trace.add("compute", weight.name, weight.layer, start_s, nbytes)
        return first


def folds(x: torch.Tensor) -> bool:
    """Whether torch multiplies `x` [..., in_features] as one matrix.

    Where it does not, as with the last position of a longer tensor (`x[:, -1:, :]`), its batched
    product may lay the whole weight out again: 1 GiB for a large vocabulary. Then weights are
    multiplied a piece at a time, so that the copy is of one piece.
    """
    return all(x.stride(i) == x.stride(i + 1) * x.size(i + 1) for i in range(x.dim() - 2))
