"""Weights of somebody's quantisation in safetensors: floats are made of a strip of rows at a time,
and torch multiplies them.

A number is (code - zero) * scale, computed in float32 and rounded once to the compute dtype, as the
formats define it and transformers computes it where it dequantises a checkpoint. Scales and zeros
lie in tensors of their own; they are read behind the rows that need them
(flexinfer.streaming.queue) and stay packed in memory as the rows do.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flexinfer.memory.buffer import Buffer, behind

# Numbers that are made at a time, and the bytes that the steps from codes to floats take for each.
STRIP_NUMBERS, STEPS_BYTES = 1 << 18, 20
# Of a sign, two bits of exponent and one of mantissa, without the sign.
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def _float8(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda codes: codes.view(dtype).float()


def _pairs(values: Sequence[float]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Two of 16 values to a byte, the first in the low bits."""
    pairs = torch.tensor([[float(values[b & 15]), float(values[b >> 4])] for b in range(256)])
    return lambda codes: pairs[codes.int()].flatten(-2)


def tensors_behind(
    buffer: Buffer, end_byte: int, beside: Sequence[tuple[torch.dtype, tuple[int, ...]]]
) -> tuple[torch.Tensor, ...]:
    """What lies behind `end_byte` of `buffer`, by dtype and shape; no copy."""
    sizes = (math.prod(shape) * dtype.itemsize for dtype, shape in beside)
    return tuple(
        buffer.tensor(begin, dtype, shape)
        for begin, (dtype, shape) in zip(behind(end_byte, sizes), beside, strict=True)
    )


# By scheme: codes [rows, row_bytes] uint8 -> [rows, in_features] float32.
CODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "f8_e4m3": _float8(torch.float8_e4m3fn),
    "f8_e5m2": _float8(torch.float8_e5m2),
    "e2m1": _pairs([*E2M1, *(-one for one in E2M1)]),
    "i4": _pairs(range(-8, 8)),
    "i8": lambda codes: codes.view(torch.int8).float(),
    "u8": lambda codes: codes.float().sub_(128),
}


@dataclass(frozen=True, slots=True)
class Side:
    """Numbers beside the rows of a weight, one for so many of its rows and columns."""

    dtype: torch.dtype
    # None where one is for all rows.
    rows: int | None
    columns: int
    # Numbers of each of its rows.
    width: int

    def count(self, rows: int) -> int:
        """Its rows, of so many rows of the weight."""
        return 1 if self.rows is None else -(-rows // self.rows)

    def spread(
        self, numbers: torch.Tensor, start: int, stop: int, in_features: int, scheme: str
    ) -> torch.Tensor:
        """numbers [its rows, width] -> float32 that broadcasts to rows [start, stop) of the weight,
        [rows, in_features].
        """
        each = self.rows
        if each is not None:
            numbers = numbers[start // each : -(-stop // each)]
        if self.dtype == torch.int32:
            # Zeros of several rows to an int32, in the codes of the weight.
            codes = numbers.reshape(-1, 1).view(torch.uint8)
            of_rows = CODES[scheme](codes).view(*numbers.shape, -1).transpose(1, 2)
            found = of_rows.reshape(-1, self.width)
        elif self.dtype in (torch.uint8, torch.float8_e8m0fnu):
            # An exponent.
            found = (numbers.view(torch.uint8).float() - 127).exp2()
        else:
            found = numbers.float()
        if each is not None:
            if each > 1 and self.dtype != torch.int32:
                found = found.repeat_interleave(each, 0)
            found = found[start % each :][: stop - start]
        if self.columns not in (1, in_features):
            found = found.repeat_interleave(self.columns, 1)[:, :in_features]
        return found


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of a weight in memory, and what lies beside them."""

    # [rows, row_bytes] uint8.
    codes: torch.Tensor
    # [rows of the side, its width] each.
    numbers: tuple[torch.Tensor, ...]
    sides: tuple[Side, ...]

    def __getitem__(self, rows: slice) -> "PackedRows":
        """Some of them, from one that shares no number with the row before."""
        start, stop, _ = rows.indices(len(self.codes))
        taken = [
            one if side.rows is None else one[start // side.rows : -(-stop // side.rows)]
            for one, side in zip(self.numbers, self.sides, strict=True)
        ]
        return PackedRows(self.codes[start:stop], tuple(taken), self.sides)


@dataclass(frozen=True, slots=True)
class PackedKernel:
    """Rows of `in_features` numbers in codes of `scheme`."""

    in_features: int
    row_bytes: int
    scheme: str
    # Scales; and zeros, where there are some.
    sides: tuple[Side, ...]
    # Compute dtype.
    dtype: torch.dtype
    # Dtype that floats are rounded to before anything else.
    made_in: torch.dtype = torch.float32
    # Whether the parameter has inputs for rows, as gpt-oss has its experts.
    transposed: bool = False

    @property
    def locked(self) -> "PackedKernel":
        return self

    def locked_bytes(self, nbytes: int) -> int:
        return nbytes

    def copied_bytes(self, nbytes: int) -> int:
        """The floats, also in the parameter's order where that is another; and what they are made
        with.
        """
        floats_bytes = nbytes // self.row_bytes * self.in_features * self.dtype.itemsize
        strip_bytes = STEPS_BYTES * max(STRIP_NUMBERS, self.in_features)
        return floats_bytes * (2 if self.transposed else 1) + strip_bytes

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """torch's own, small and of any size: in the margin."""
        return 0

    def view(self, buffer: Buffer, position: int, rows: int) -> PackedRows:
        codes = buffer.tensor(position, torch.uint8, (rows, self.row_bytes))
        shapes = [(side.count(rows), side.width) for side in self.sides]
        beside = [(side.dtype, shape) for side, shape in zip(self.sides, shapes, strict=True)]
        return PackedRows(
            codes, tensors_behind(buffer, position + codes.nbytes, beside), self.sides
        )

    def multiply(
        self, x: torch.Tensor, view: PackedRows, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        weight = self.matrix(view)
        if not self.transposed:
            return F.linear(x, weight, bias)
        y = x @ weight.T.contiguous()
        return y if bias is None else y + bias

    def matrix(self, view: PackedRows) -> torch.Tensor:
        count = len(view.codes)
        weight = torch.empty(count, self.in_features, dtype=self.dtype)
        step = max(1, STRIP_NUMBERS // self.in_features)
        for start in range(0, count, step):
            stop = min(start + step, count)
            floats = CODES[self.scheme](view.codes[start:stop])
            scale, *zeros = (
                side.spread(numbers, start, stop, self.in_features, self.scheme)
                for side, numbers in zip(self.sides, view.numbers, strict=True)
            )
            for zero in zeros:
                floats -= zero
            weight[start:stop] = floats.mul_(scale).to(self.made_in)
        return weight
