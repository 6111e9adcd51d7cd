"""The input embedding, its rows read from disk as they are looked up: a few KB a token."""

from collections.abc import Callable

import torch
from torch import nn

from flexinfer.formats.tensors import TensorSpec
from flexinfer.memory.buffer import PAGE_BYTES, Buffer
from flexinfer.modules.placeholder import streamed_weight
from flexinfer.observe.trace import Trace
from flexinfer.streaming.reader import padded_bytes
from flexinfer.streaming.store import WeightStore


class StreamedEmbedding(nn.Module):
    """An embedding that reads the rows it looks up.

    Args:
        stock: the module that it replaces: it looks the rows up, scaled or not, in a table of just
            those that are needed.
        spec: where the table lies.
        decode: makes numbers of the bytes of a row, which begin at a position of a buffer.
        dtype: what the model computes in.
        kept_rows: how many of the last rows stay in memory: a candidate is looked up by the draft
            and again by the pass that verifies it.
    """

    def __init__(
        self,
        stock: nn.Embedding,
        spec: TensorSpec,
        decode: Callable[[Buffer, int], torch.Tensor],
        dtype: torch.dtype,
        store: WeightStore,
        trace: Trace,
        kept_rows: int = 0,
    ) -> None:
        super().__init__()
        self._kept_rows, self._kept = kept_rows, dict[int, torch.Tensor]()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx
        # Matters for gradients alone, and is no row of the small table.
        stock.padding_idx = None
        self.weight = streamed_weight(spec.name, spec.shape, dtype)
        # In a list, so that it is no submodule and its weight no parameter of the model.
        self._stock = [stock]
        self._spec, self._decode, self._dtype = spec, decode, dtype
        self._store, self._trace = store, trace
        self._row = Buffer(spec.row_bytes + 2 * PAGE_BYTES, lock=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [...] -> [..., embedding_dim].

        Raises IndexError for an id outside the table.
        """
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= self.num_embeddings):
            raise IndexError(
                f"token id outside the embedding table of {self.num_embeddings} rows: {unique[0]} "
                f"to {unique[-1]}"
            )
        table = torch.empty(len(unique), self.embedding_dim, dtype=self._dtype)
        with self._store.lock:
            for i, token in enumerate(unique.tolist()):
                table[i] = self._row_of(token)
            stock = self._stock[0]
            stock.weight = nn.Parameter(table, requires_grad=False)
            output = stock(inverse)
            stock.weight = nn.Parameter(table.new_empty(0, self.embedding_dim), requires_grad=False)
            return output

    def _row_of(self, token: int) -> torch.Tensor:
        """[embedding_dim] of one token."""
        if token in self._kept:
            return self._kept[token]
        spec, memory = self._spec, self._row.memory(0, self._row.nbytes)
        offset_bytes = spec.offset_bytes + token * spec.row_bytes
        self._trace.bytes_read += padded_bytes(offset_bytes, spec.row_bytes)
        try:
            position = self._store.reader.read(spec.file, offset_bytes, spec.row_bytes, memory)
        except BaseException:
            # A read that timed out may end later and write.
            self._row = Buffer(self._row.nbytes, lock=False)
            raise
        row = self._decode(self._row, position)
        if self._kept_rows:
            self._kept[token] = row = row.to(self._dtype, copy=True)
            if len(self._kept) > self._kept_rows:
                del self._kept[next(iter(self._kept))]
        return row
