"""Linears whose weight is elsewhere: its first pieces locked in memory, the rest passing through the window.

A `StreamedLinear` stands where the model had an `nn.Linear` (or GPT-2's `Conv1D`). It computes each piece with the very
kernel the stock module would use on the whole weight and joins the outputs: output rows do not depend on one another, so
the bits are the same. Weights in ggml's blocks differ in the kernel alone (flexinfer.kernels.ggml).

It knows neither files nor budgets: it is handed buffers (flexinfer.streaming.memory) and asks the window (flexinfer.streaming.prefetch).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol, cast

import torch
from torch import nn

from flexinfer.kernels import Kernel
from flexinfer.kernels.ggml import FEW_ROWS, GgmlKernel, multiply_each
from flexinfer.kernels.gradients import Sum, multiply
from flexinfer.modules.placeholder import _refuse_state_dict, streamed_weight
from flexinfer.observe.trace import Trace
from flexinfer.plan.weights import Piece, Weight
from flexinfer.streaming.locked import Filler, LockedPieces, LockedRows
from flexinfer.streaming.prefetch import Prefetcher

NOT_READ = "its weights have not been read yet"

JOINED_OUTPUT_BYTES = 8 << 20  # outputs of locked rows are made at once up to so much


@dataclass(slots=True)
class Drafting:
    """Whether candidates are drafted now, for all linears of a model: then rows that are streamed are computed from their substitute."""

    now: bool = False


class Draft(Protocol):
    """Streamed rows in few bits, from which candidates are drafted."""

    rows: LockedRows

    def add(self, piece: Piece, view: torch.Tensor) -> None:
        """A pass has the true rows of `piece` in memory."""
        ...


class StreamedLinear(nn.Module):
    """A linear whose weight is locked in part and streamed for the rest; `attach` says which.

    It may be called from several threads; `lock`, which all linears of a model share, lets one at a time use the window.
    """

    def __init__(
        self,
        weight: Weight,
        kernel: Kernel,
        stock: nn.Module,
        dtype: torch.dtype,
        trace: Trace,
        lock: threading.RLock,
        see_to_memory: Callable[[], None],
        row_order: torch.Tensor | None = None,
        drafting: Drafting | None = None,
        substitute_kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        self._row_order = row_order  # [out_features]: row i of the output is row row_order[i] of the file
        self._see_to_memory = see_to_memory  # called before each use: it may attach other memory
        self.spec = weight
        self.kernel = kernel
        assert isinstance(stock.weight, torch.Tensor)
        self.weight = streamed_weight(weight.name, stock.weight.shape, dtype)
        self.bias = cast(nn.Parameter | None, stock.bias)
        self._out_features = weight.pieces[-1].row_stop
        self._trace = trace
        self._lock = lock
        self._drafting, self._substitute_kernel = drafting or Drafting(), substitute_kernel
        self._together: Sequence[StreamedLinear] = ()
        self.detach(NOT_READ)
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def lead(self, others: Sequence["StreamedLinear"]) -> None:
        """Compute `others` too, which are given the same input next, where all are in memory and there are few rows: one call of a
        kernel for all. Only for weights in ggml's blocks."""
        self._together = (self, *others)

    def attach(
        self,
        locked: list[LockedPieces],
        streamed: list[tuple[int, Piece]],
        prefetcher: Prefetcher | None,
        filler: Filler | None = None,
        substitute: Draft | None = None,
    ) -> None:
        """Take the leading rows from `locked`, which `filler` fills, and the others, at their places in the schedule, from
        `prefetcher`, or while a draft is made from their `substitute`, which passes fill."""
        assert prefetcher is not None or not streamed
        self._substitute: Draft | None = substitute
        self._blocks, self._filler = locked, filler
        self._locked = [block.rows() for block in locked if block.filled]
        self._streamed, self._prefetcher = streamed, prefetcher
        self._detached: str | None = None

    def detach(self, why: str) -> None:
        """Let go of all memory; a forward pass raises RuntimeError saying `why`."""
        self._blocks, self._locked, self._streamed = [], [], []
        self._filler = self._prefetcher = None
        self._substitute, self._detached = None, why
        self._ahead: tuple[torch.Tensor, int, torch.Tensor] | None = (
            None  # an input, its version, and its output
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        y = multiply(x, self.bias, self._in_file_order, self._input_gradient)
        return y if self._row_order is None else y.gather(-1, self._row_order.expand(y.shape))

    def _in_file_order(self, x: torch.Tensor) -> torch.Tensor:
        with self._lock:
            self._see_to_weights()
            if self._ahead is not None:
                (seen, version, y), self._ahead = self._ahead, None
                if seen is x and x._version == version:
                    return y
            as_one_matrix = folds(x)
            if as_one_matrix and self._is_locked:
                if self._together and x.numel() <= FEW_ROWS * x.shape[-1] and not x.is_inference():
                    return self._multiply_together(x)
                return self._multiply(x, self._locked[0].view, 0, self._out_features, self.spec.nbytes)
            substitute = self._substitute.rows if self._substitute and self._drafting.now else None
            if substitute is not None and not self._locked:
                return self._from_substitute(x, substitute)
            y = x.new_empty(*x.shape[:-1], self._out_features)
            row_bytes = x.numel() // x.shape[-1] * x.element_size()  # of one output row, all positions
            for rows in self._locked:
                at_once = as_one_matrix and rows.count * row_bytes <= JOINED_OUTPUT_BYTES
                step = rows.count if at_once else rows.step
                for first in range(0, rows.count, step):
                    count = min(step, rows.count - first)
                    view = rows.view if count == rows.count else rows.view[first : first + count]
                    start, nbytes = rows.row_start + first, rows.nbytes * count // rows.count
                    y[..., start : start + count] = self._multiply(x, view, start, start + count, nbytes)
            if substitute is not None:
                y[..., substitute.row_start :] = self._from_substitute(x, substitute)
                return y
            for piece, view in self._stream():
                part = self._multiply(x, view, piece.row_start, piece.row_stop, piece.nbytes)
                if self._substitute is not None:
                    self._substitute.add(piece, view)
                y[..., piece.row_start : piece.row_stop] = part
            return y

    def _input_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """gradient [..., out_features] of the output, in the file's order -> [..., in_features]."""
        with self._lock:
            self._see_to_weights()
            total = Sum(gradient)
            for rows in self._locked:
                in_steps = isinstance(self.kernel, GgmlKernel)  # others need no copy of the whole
                views = rows.view.split(rows.step) if in_steps else (rows.view,)
                for i, view in enumerate(views):
                    total.add(rows.row_start + i * rows.step, self.kernel.matrix(view))
            for piece, view in self._stream():
                total.add(piece.row_start, self.kernel.matrix(view))
            return total.value

    def _see_to_weights(self) -> None:
        """Called with the lock, before each use."""
        self._see_to_memory()
        if self._detached is not None:
            raise RuntimeError(f"{self.spec.name}: {self._detached}")
        if len(self._locked) < len(self._blocks):
            self._fill()

    def _stream(self) -> Iterator[tuple[Piece, torch.Tensor]]:
        """The pieces that are not locked, as they come. A view is good until the next is asked for."""
        for place, piece in self._streamed:
            assert self._prefetcher is not None
            buffer, position, release = self._prefetcher.acquire(place)
            try:
                yield piece, self.kernel.view(buffer, position, piece.row_stop - piece.row_start)
            finally:
                release()

    def _fill(self) -> None:
        """Wait until all that stays has been read."""
        assert self._filler is not None
        for block in self._blocks:
            if not block.filled:
                self._filler.wait_for(block)
        self._locked = [block.rows() for block in self._blocks]

    @property
    def _is_locked(self) -> bool:
        return len(self._locked) == len(self._blocks) == 1 and not self._streamed

    def _multiply_together(self, x: torch.Tensor) -> torch.Tensor:
        """The output for `x`, those of the others kept until they are asked for the same."""
        linears = [linear for linear in self._together if linear._is_locked]
        start_s = perf_counter()
        parts = [
            (
                cast(GgmlKernel, linear.kernel),
                linear._locked[0].view.data_ptr(),
                linear._out_features,
                linear.bias,
            )
            for linear in linears
        ]
        first, *others = multiply_each(x, parts)
        for linear, y in zip(linears[1:], others, strict=True):
            linear._ahead = x, x._version, y
        nbytes = sum(linear.spec.nbytes for linear in linears)
        self._trace.add("compute", self.spec.name, self.spec.layer, start_s, nbytes)
        return first

    def _from_substitute(self, x: torch.Tensor, rows: LockedRows) -> torch.Tensor:
        return self._multiply(
            x, rows.view, rows.row_start, self._out_features, rows.nbytes, self._substitute_kernel
        )

    def _multiply(
        self,
        x: torch.Tensor,
        view: torch.Tensor,
        row_start: int,
        row_stop: int,
        nbytes: int,
        kernel: Kernel | None = None,
    ) -> torch.Tensor:
        start_s = perf_counter()
        bias = None if self.bias is None else self.bias[row_start:row_stop]
        y = (kernel or self.kernel).multiply(x, view, row_stop - row_start, bias)
        self._trace.add("compute", self.spec.name, self.spec.layer, start_s, nbytes)
        return y

    def extra_repr(self) -> str:
        locked_bytes = sum(block.nbytes for block in self._blocks)
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, locked={locked_bytes} of {self.spec.nbytes} bytes"


def folds(x: torch.Tensor) -> bool:
    """Whether torch multiplies `x` [..., in_features] as one matrix.

    Where it does not, as with the last position of a longer tensor (`x[:, -1:, :]`), its batched product may lay the whole weight out
    anew: 1 GiB for a large vocabulary. Then weights are multiplied a piece at a time, and so the copy is one of a piece.
    """
    return all(x.stride(i) == x.stride(i + 1) * x.size(i + 1) for i in range(x.dim() - 2))
