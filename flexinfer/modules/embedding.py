"""TODO"""

import threading
from collections.abc import Callable

import torch
from torch import nn

from flexinfer.formats.tensors import TensorSpec
from flexinfer.memory.buffer import PAGE_BYTES, Buffer
from flexinfer.modules.placeholder import _refuse_state_dict, streamed_weight


class StreamedEmbedding(nn.Module):
    """The input embedding, its rows read from disk as they are looked up (a few KB a token).

    `stock` is the module it replaces: it looks the rows up, scaled or not, in a table of just those that are asked for.
    `decode` makes numbers of the bytes of a row, which begin at a position of a buffer. The last `kept_rows` that were read stay in memory:
    a candidate is looked up by the draft and again by the pass that verifies it.
    """

    def __init__(
        self,
        stock: nn.Embedding,
        read_row: Callable[[int, memoryview], int],
        decode: Callable[[Buffer, int], torch.Tensor],
        spec: TensorSpec,
        dtype: torch.dtype,
        lock: threading.RLock,
        kept_rows: int = 0,
    ) -> None:
        super().__init__()
        self._kept_rows, self._kept = kept_rows, dict[int, torch.Tensor]()
        self.num_embeddings, self.embedding_dim = stock.num_embeddings, stock.embedding_dim
        self.padding_idx = stock.padding_idx
        stock.padding_idx = None  # matters for gradients alone, and is no row of the small table
        self.weight = streamed_weight(spec.name, spec.shape, dtype)
        self._stock = [
            stock
        ]  # in a list, so that it is no submodule and its weight no parameter of the model
        self._lock = lock
        self._read_row, self._decode = read_row, decode
        self._dtype = dtype
        self._row = Buffer(spec.row_bytes + 2 * PAGE_BYTES, lock=False)
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [...] -> [..., embedding_dim]. Raises IndexError for an id outside the table."""
        unique, inverse = torch.unique(input_ids, return_inverse=True)
        if len(unique) and (unique[0] < 0 or unique[-1] >= self.num_embeddings):
            raise IndexError(
                f"token id outside the embedding table of {self.num_embeddings} rows: {unique[0]} to {unique[-1]}"
            )
        table = torch.empty(len(unique), self.embedding_dim, dtype=self._dtype)
        with self._lock:
            memory = self._row.memory(0, self._row.nbytes)
            for i, token in enumerate(unique.tolist()):
                if token in self._kept:
                    table[i] = self._kept[token]
                    continue
                try:
                    position = self._read_row(token, memory)
                except BaseException:  # a read that was given up may come back and write
                    self._row = Buffer(self._row.nbytes, lock=False)
                    raise
                table[i] = self._decode(self._row, position)
                if self._kept_rows:
                    self._kept[token] = table[i].clone()
                    if len(self._kept) > self._kept_rows:
                        del self._kept[next(iter(self._kept))]  # the one that came first
            stock = self._stock[0]
            stock.weight = nn.Parameter(table, requires_grad=False)
            output = stock(inverse)
            stock.weight = nn.Parameter(table.new_empty(0, self.embedding_dim), requires_grad=False)
            return output
