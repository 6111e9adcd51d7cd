"""Linears whose weight is elsewhere: its first pieces locked in memory, the rest passing through the window.

A `StreamedLinear` stands where the model had an `nn.Linear` (or GPT-2's `Conv1D`). It computes each piece with the very
kernel the stock module would use on the whole weight and joins the outputs: output rows do not depend on one another, so
the bits are the same. Packed 4- and 8-bit weights differ in the kernel alone (flexinfer.kernels.packed).

It knows neither files nor budgets: it is handed buffers (flexinfer.streaming.memory) and asks the window (flexinfer.streaming.prefetch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NoReturn

import torch
from torch import nn

from flexinfer.formats.checkpoint import TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.plan import Piece, Weight
from flexinfer.streaming.memory import PAGE_BYTES, Buffer
from flexinfer.streaming.prefetch import Prefetcher
from flexinfer.streaming.reader import FileReader, padded_bytes
from flexinfer.trace import Trace


@dataclass(frozen=True, slots=True)
class LockedRows:
    """Output rows that stay in memory, ready to be multiplied."""

    row_start: int
    row_stop: int
    nbytes: int
    view: torch.Tensor


def lock_rows(weight: Weight, count: int, kernel: Kernel, reader: FileReader) -> list[LockedRows]:
    """Read the first `count` pieces of `weight` into memory of their own and lock it there."""
    pieces = weight.pieces[:count]
    if not pieces:
        return []
    first, nbytes = pieces[0], sum(piece.nbytes for piece in pieces)
    buffer = Buffer(padded_bytes(first.offset_bytes, nbytes), lock=True)
    position = reader.read(first.file, first.offset_bytes, nbytes, buffer.memory(0, buffer.nbytes))
    if kernel.joins:
        rows = pieces[-1].row_stop - first.row_start
        return [LockedRows(first.row_start, pieces[-1].row_stop, nbytes, kernel.view(buffer, position, rows))]
    return [
        LockedRows(
            piece.row_start,
            piece.row_stop,
            piece.nbytes,
            kernel.view(
                buffer, position + piece.offset_bytes - first.offset_bytes, piece.row_stop - piece.row_start
            ),
        )
        for piece in pieces
    ]


class StreamedLinear(nn.Module):
    """A linear whose weight is locked in part and streamed for the rest; `attach` says which."""

    def __init__(
        self,
        weight: Weight,
        kernel: Kernel,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        trace: Trace,
    ) -> None:
        super().__init__()
        self.spec = weight
        self.kernel = kernel
        # Has the shape, dtype and device that other code asks a weight for, and takes the memory of one number.
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(shape), requires_grad=False)
        self.bias = bias
        self._trace = trace
        self.detach("not attached to its weights yet")
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def attach(
        self, locked: list[LockedRows], streamed: list[tuple[int, Piece]], prefetcher: Prefetcher | None
    ) -> None:
        """Take the leading rows from `locked` and the others, at their places in the schedule, from `prefetcher`."""
        assert prefetcher is not None or not streamed
        self._locked, self._streamed, self._prefetcher = locked, streamed, prefetcher
        self._detached: str | None = None

    def detach(self, why: str) -> None:
        """Let go of all memory; a forward pass raises RuntimeError saying `why`."""
        self._locked, self._streamed, self._prefetcher, self._detached = [], [], None, why

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self._detached is not None:
            raise RuntimeError(f"{self.spec.name}: {self._detached}")
        outputs = [
            self._multiply(x, rows.view, rows.row_start, rows.row_stop, rows.nbytes) for rows in self._locked
        ]
        for place, piece in self._streamed:
            assert self._prefetcher is not None
            buffer, position, release = self._prefetcher.acquire(place)
            try:
                view = self.kernel.view(buffer, position, piece.row_stop - piece.row_start)
                outputs.append(self._multiply(x, view, piece.row_start, piece.row_stop, piece.nbytes))
            finally:
                release()
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _multiply(
        self, x: torch.Tensor, view: torch.Tensor, row_start: int, row_stop: int, nbytes: int
    ) -> torch.Tensor:
        start_s = perf_counter()
        bias = None if self.bias is None else self.bias[row_start:row_stop]
        y = self.kernel.multiply(x, view, row_stop - row_start, bias)
        self._trace.add("compute", self.spec.name, self.spec.layer, start_s, nbytes)
        return y

    def extra_repr(self) -> str:
        locked_bytes = sum(rows.nbytes for rows in self._locked)
        return f"{tuple(self.weight.shape)}, bias={self.bias is not None}, locked={locked_bytes} of {self.spec.nbytes} bytes"


class StreamedEmbedding(nn.Module):
    """The input embedding, its rows read from disk as they are looked up (a few KB a token).

    `stock` is the module it replaces: it looks the rows up, scaled or not, in a table of just those that are asked for.
    """

    def __init__(
        self,
        stock: nn.Embedding,
        read_row: Callable[[int, memoryview], int],
        spec: TensorSpec,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx
        stock.padding_idx = None  # matters for gradients alone, and is no row of the small table
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype).expand(spec.shape), requires_grad=False)
        self._stock = [
            stock
        ]  # in a list, so that it is no submodule and its weight no parameter of the model
        self._read_row = read_row
        self._file_dtype, self._dtype = spec.torch_dtype, dtype
        self._row = Buffer(self.embedding_dim * spec.torch_dtype.itemsize + 2 * PAGE_BYTES, lock=False)
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [...] -> [..., embedding_dim]. Raises IndexError for an id outside the table."""
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= self.num_embeddings):
            raise IndexError(
                f"token id outside the embedding table of {self.num_embeddings} rows: {unique[0]} to {unique[-1]}"
            )
        table = torch.empty(len(unique), self.embedding_dim, dtype=self._dtype)
        memory = self._row.memory(0, self._row.nbytes)
        for i, token in enumerate(unique.tolist()):
            position = self._read_row(token, memory)
            table[i] = self._row.tensor(position, self._file_dtype, (self.embedding_dim,))
        stock = self._stock[0]
        stock.weight = nn.Parameter(table, requires_grad=False)
        return stock(inverse)


def _refuse_state_dict(module: nn.Module, prefix: str, keep_vars: bool) -> NoReturn:
    raise RuntimeError(
        f"{prefix}weight is streamed from disk and not part of a state dict; the checkpoint on disk is unchanged, copy that instead "
        "(to save another precision, load it with transformers)"
    )
