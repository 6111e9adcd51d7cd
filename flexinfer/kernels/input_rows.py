"""Weights of AWQ and GPTQ: rows in the file are inputs, groups of which share a scale and a zero.

So a weight is one piece. Floats are made of a strip of outputs at a time, as [outputs, inputs], and
torch multiplies them. A number is (code - zero) * scale, rounded to the dtype of the scales, as the
formats define it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flexinfer.kernels.packed import STEPS_BYTES, STRIP_NUMBERS, PackedKernel, tensors_behind
from flexinfer.memory.buffer import Buffer

# Outputs that are made at a time: a multiple of this.
STRIP_OUTPUTS = 64
# Where AWQ has the 8 outputs of an int32, from its low bits on.
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Layout:
    """How codes lie in int32s."""

    bits: int
    # Outputs that follow one another share an int32, in AWQ_ORDER; else inputs do.
    awq: bool
    # What stored zeros lack.
    zero_offset: int

    def numbers(self, words: torch.Tensor) -> torch.Tensor:
        """int32 [...] -> float32 [..., codes in each]."""
        found = words.contiguous().unsqueeze(-1).view(torch.uint8)
        if self.bits == 4:
            found = torch.stack((found & 15, found >> 4), -1).flatten(-2)
        return (found[..., AWQ_ORDER] if self.awq else found).float()


@dataclass(frozen=True, slots=True)
class InputRowsKernel:
    """A weight of `in_features` x `out_features` in codes."""

    in_features: int
    out_features: int
    layout: Layout
    # Dtype and shape of scales [groups, out_features], zeros [groups, int32s] and, where inputs of
    # a group do not follow one another, their group [in_features].
    beside: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    # Compute dtype.
    dtype: torch.dtype

    @property
    def locked(self) -> "InputRowsKernel":
        return self

    def locked_bytes(self, nbytes: int) -> int:
        return nbytes

    def copied_bytes(self, nbytes: int) -> int:
        """What floats of a strip are made with."""
        return STEPS_BYTES * self.in_features * self._strip_outputs

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """torch's own, small and of any size: in the margin."""
        return 0

    @property
    def _strip_outputs(self) -> int:
        most = STRIP_NUMBERS // self.in_features
        return max(STRIP_OUTPUTS, most // STRIP_OUTPUTS * STRIP_OUTPUTS)

    def view(self, buffer: Buffer, position: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Codes, and what lies beside them."""
        each = 32 // self.layout.bits
        shape = self.in_features, self.out_features // each
        if not self.layout.awq:
            shape = self.in_features // each, self.out_features
        codes = buffer.tensor(position, torch.int32, shape)
        return codes, *tensors_behind(buffer, position + codes.nbytes, self.beside)

    def multiply(
        self, x: torch.Tensor, view: tuple[torch.Tensor, ...], rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for outputs in self._strips():
            part = None if bias is None else bias[outputs]
            y[..., outputs] = F.linear(x, self._strip(view, outputs), part)
        return y

    def matrix(self, view: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return torch.cat([self._strip(view, outputs) for outputs in self._strips()])

    def _strips(self) -> list[slice]:
        """All outputs; the last strip has no fewer than the others (as flexinfer.model.pieces)."""
        step = self._strip_outputs
        starts = range(0, max(1, self.out_features - step + 1), step)
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], self.out_features], strict=True)]

    def _strip(self, view: tuple[torch.Tensor, ...], outputs: slice) -> torch.Tensor:
        """[outputs, in_features]."""
        codes, scales, zeros, *order = view
        each = 32 // self.layout.bits
        words = slice(outputs.start // each, outputs.stop // each)
        if self.layout.awq:
            floats = self.layout.numbers(codes[:, words]).flatten(1)
        else:
            floats = self.layout.numbers(codes[:, outputs]).transpose(1, 2).flatten(0, 1)
        zero = self.layout.numbers(zeros[:, words]).flatten(1) + self.layout.zero_offset
        scale = scales[:, outputs].float()
        if order:
            group = order[0].long()
            floats = (floats - zero[group]).mul_(scale[group])
        else:
            grouped = floats.view(len(scale), -1, floats.shape[1])
            grouped.sub_(zero[:, None]).mul_(scale[:, None])
        return floats.to(scales.dtype).T.to(self.dtype).contiguous()


# What multiplies weights of somebody's quantisation.
QuantisedKernel = PackedKernel | InputRowsKernel
