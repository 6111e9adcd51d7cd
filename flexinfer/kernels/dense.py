"""Weights as they lie in a stock checkpoint: bf16, fp16 or fp32, multiplied by the kernels that
torch uses for them.
"""

import os
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F

from flexinfer.memory.buffer import Buffer

# Each keeps up to 1,024 otherwise. A pass has some thirty shapes of pieces.
KEPT_KERNELS = 48
# Of what MKL multiplies a single row of fp32 with: at another address it may add in another
# order.
ALIGNMENT_BYTES = 16
KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def bound_kernel_caches() -> None:
    """Have torch and oneDNN keep few of the kernels that they compile for bf16 and fp16, one for
    each number of rows and shape.

    Half a megabyte each: prompts of 300 different lengths left 570 MB behind (docs/log.md). Both
    read their bounds from the environment when the first such product runs, so this comes before;
    what the user has set stays.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS))


def fill_kernel_caches(dtype: torch.dtype) -> None:
    """Have as many kernels compiled as are kept, so that the memory they take is there to be
    measured.
    """
    if dtype != torch.float32:
        weight = torch.ones(1024, 1024, dtype=dtype)
        for rows in range(2, 2 + KEPT_KERNELS):
            F.linear(weight[:rows], weight)


@dataclass(frozen=True, slots=True)
class DenseKernel:
    """Rows [rows, in_features] of bf16, fp16 or fp32, as they lie in a stock checkpoint."""

    in_features: int
    file_dtype: torch.dtype
    # Compute dtype.
    dtype: torch.dtype
    # Whether transformers would have copied them to memory of their own, and not mapped the
    # file.
    aligned: bool = False

    @property
    def locked(self) -> Self:
        return self if self.file_dtype == self.dtype else replace(self, file_dtype=self.dtype)

    def locked_bytes(self, nbytes: int) -> int:
        return nbytes // self.file_dtype.itemsize * self.dtype.itemsize

    def copied_bytes(self, nbytes: int) -> int:
        """In another dtype than the file's one copy; and one more where torch lays the weight out
        anew (see StreamedLinear).
        """
        copies = 1 if self.file_dtype == self.dtype and not self._realigns else 2
        return copies * self.locked_bytes(nbytes)

    @property
    def _realigns(self) -> bool:
        return self.aligned and self.file_dtype == self.dtype == torch.float32

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """torch's own, small and of any size: in the margin."""
        return 0

    def view(self, buffer: Buffer, position: int, rows: int) -> torch.Tensor:
        return buffer.tensor(position, self.file_dtype, (rows, self.in_features))

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if self._realigns and view.data_ptr() % ALIGNMENT_BYTES:
            view = view.clone()
        return F.linear(x, view.to(self.dtype), bias)

    def matrix(self, view: torch.Tensor) -> torch.Tensor:
        return view.to(self.dtype)


@dataclass(frozen=True, slots=True)
class ColumnsKernel(DenseKernel):
    """A weight whose rows in the file are inputs, [in_features, rows], as gpt-oss has its experts;
    never cut.
    """

    def view(self, buffer: Buffer, position: int, rows: int) -> torch.Tensor:
        return buffer.tensor(position, self.file_dtype, (self.in_features, rows))

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = x @ view.to(self.dtype)
        return y if bias is None else y + bias

    def matrix(self, view: torch.Tensor) -> torch.Tensor:
        return view.to(self.dtype).T


@dataclass(frozen=True, slots=True)
class Conv1DKernel(ColumnsKernel):
    """GPT-2's transposed weight, multiplied as transformers' module does."""

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert bias is not None
        # [batch x positions, rows].
        y = torch.addmm(bias, x.view(-1, x.size(-1)), view.to(self.dtype))
        return y.view(*x.shape[:-1], rows)
