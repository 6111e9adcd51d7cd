"""Packed weights: how an int4 or int8 linear lies on disk, and how it is multiplied where it lies.

A packed linear [out_features, in_features] is one U8 tensor made of row blocks. A block holds all its rows
need (quantised rows, then their scales), starts at a multiple of 4096 bytes and is at most about 4 MiB: one
direct read, computed as soon as it has landed, without a copy. Splitting by rows changes no output bit.

    4 bit   [rows * in / 2] nibbles in the order of torch's int4 CPU kernel, then [in / group, rows, 2] bf16
            (scale, zero); a weight is (q - 8) * scale + zero, q in 0..15: asymmetric groups, 4.5 bits at 64
    8 bit   [rows, in] int8, then [rows] bf16 scales; a weight is q * scale: symmetric rows

The nibble order belongs to the vector width of the CPU (`layout`), so the checkpoint names it.

Cost: the packed kernels read each byte once and are bound by memory at few activation rows, but repeat the
unpacking for every few rows. From `dequantize_rows` rows on it is cheaper to unpack the block once to float32
and call sgemm. That number is measured when the checkpoint is made and stored with it, so one checkpoint
always takes the same path and gives the same bits; measure_dequantize_rows does it (our choice).

Not here: files (quantize.py writes them, checkpoint.py reads them) and memory (the caller owns the bytes).
Activations are bf16: in other dtypes the int4 kernel is many times slower, so they are cast and cast back.
"""

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from flexinfer.streaming.memory import Buffer

QUANT_METHOD = "flexinfer"
FORMAT_VERSION = 1
ALIGNMENT_BYTES = 4096
BLOCK_BYTES = 4 * 2**20
GROUP_SIZES = (32, 64, 128, 256)
# Rows of one tile of nibbles: its low nibbles are the tile's first half, its high nibbles the second half. The
# kernel takes what is left over after whole tiles, and everything when it has no vectors, in pairs of rows.
TILE_ROWS = {"avx512": 64, "avx2": 32, "pairs": 0}
PAIR_TILE_ROWS = 32
KERNEL_ROWS = 16  # the int4 kernel takes output rows in multiples of this
INT8_COLUMNS = 32  # the int8 kernel reads past the end of a row of any other length
CLIP_RATIOS = (1.0, 0.92, 0.84)  # of a group's least and greatest weight
PACK_WEIGHTS = 2**18  # quantised at a time
SCRATCH_WEIGHTS = 2**20  # unpacked at a time on the many-row path: 4 MiB of float32


class PackedError(ValueError):
    """A packed format or tensor this build or this CPU cannot use."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """The packing of one checkpoint; kept as `quantization_config` of its config.json."""

    bits: int  # 4 or 8
    group_size: int = 64  # weights that share a scale and a zero; 4 bit only
    layout: str = "any"  # order of the nibbles: 'avx2', 'avx512', 'pairs'; 'any' for 8 bit
    dequantize_rows: int = 64  # activation rows from which on a block is unpacked and multiplied in float32

    def __post_init__(self) -> None:
        for name in ("bits", "group_size"):
            if type(getattr(self, name)) is not int:
                raise PackedError(f"{name}: got {getattr(self, name)!r}; give a whole number")
        if self.bits not in (4, 8):
            raise PackedError(f"bits: got {self.bits!r}; choose 4 or 8")
        if self.bits == 4 and self.group_size not in GROUP_SIZES:
            raise PackedError(f"group_size: got {self.group_size!r}; the int4 kernel takes {GROUP_SIZES}")
        layouts = tuple(TILE_ROWS) if self.bits == 4 else ("any",)
        if self.layout not in layouts:
            raise PackedError(f"layout: got {self.layout!r} with bits={self.bits}; known: {layouts}")
        if not isinstance(self.dequantize_rows, int) or self.dequantize_rows < 1:
            raise PackedError(f"dequantize_rows: got {self.dequantize_rows!r}; give a number of rows >= 1")

    @classmethod
    def for_this_cpu(cls, bits: int, group_size: int = 64) -> "PackedFormat":
        """The format whose nibble order is this CPU's; `dequantize_rows` is still the default."""
        return cls(bits, group_size, cpu_layout() if bits == 4 else "any")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PackedFormat":
        """Read `quantization_config`.

        Raises: PackedError for another method, version, unknown or missing keys, or another CPU's layout.
        """
        method, version = config.get("quant_method"), config.get("format_version")
        if method != QUANT_METHOD:
            raise PackedError(
                f"quantization_config: quant_method is {method!r}, not {QUANT_METHOD!r}; start from the "
                "unquantised checkpoint and run `flexinfer quantize SRC DST`"
            )
        if version != FORMAT_VERSION:
            raise PackedError(
                f"quantization_config: format_version is {version!r}, this flexinfer reads {FORMAT_VERSION}; "
                "update flexinfer, or run `flexinfer quantize SRC DST` again from the original checkpoint"
            )
        fields = {"bits", "group_size", "layout", "dequantize_rows"}
        if missing := fields - config.keys():
            raise PackedError(f"quantization_config: {sorted(missing)} missing; quantise the original again")
        packed_format = cls(**{name: config[name] for name in fields})
        if packed_format.bits == 4 and packed_format.layout != cpu_layout():
            raise PackedError(
                f"quantization_config: layout is {packed_format.layout!r}, this CPU's kernel needs {cpu_layout()!r}; "
                "run again, from the original checkpoint: "
                f"`flexinfer quantize SRC DST --bits 4 --group-size {packed_format.group_size}`"
            )
        return packed_format

    def to_config(self) -> dict[str, Any]:
        """The dict kept as `quantization_config`; from_config reads it back."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "layout": self.layout,
            "dequantize_rows": self.dequantize_rows,
        }


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [row_start, row_stop) of a packed tensor: `nbytes` bytes at `offset_bytes` of it, padding included."""

    row_start: int
    row_stop: int
    offset_bytes: int
    nbytes: int


def can_pack(fmt: PackedFormat, in_features: int) -> bool:
    """Whether the kernels take rows of this length (any number of rows is taken: the last ones are padded)."""
    return in_features % (fmt.group_size if fmt.bits == 4 else INT8_COLUMNS) == 0


def blocks(fmt: PackedFormat, out_features: int, in_features: int) -> list[Block]:
    """The row blocks of a packed tensor, in order; a function of shape and format alone.

    Blocks are multiples of 64 rows as equal as that allows; the last one takes the remaining rows too.
    """
    if not can_pack(fmt, in_features):
        raise PackedError(f"in_features: {in_features} cannot be packed as {fmt}; leave this linear as it is")
    units = max(1, out_features // 64)
    count = max(1, -(-out_features // max(64, BLOCK_BYTES // _row_bytes(fmt, in_features) // 64 * 64)))
    count = min(count, units)
    result, offset_bytes = [], 0
    for index in range(count):
        start = 64 * (units * index // count)
        stop = 64 * (units * (index + 1) // count) if index + 1 < count else out_features
        nbytes = -(-_padded(stop - start) * _row_bytes(fmt, in_features) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        result.append(Block(start, stop, offset_bytes, nbytes))
        offset_bytes += nbytes
    return result


def packed_nbytes(fmt: PackedFormat, out_features: int, in_features: int) -> int:
    """Bytes of a whole packed tensor, padding included."""
    last = blocks(fmt, out_features, in_features)[-1]
    return last.offset_bytes + last.nbytes


def pack_rows(fmt: PackedFormat, weight: torch.Tensor) -> torch.Tensor:
    """Quantise and pack the rows of one block: round to nearest, in the range of each group that fits best.

    weight: [rows, in_features], any float dtype. Returns uint8 [nbytes of the block], padded with zeros.
    Scale and zero are rounded to bf16 before the integers are chosen, so these fit what is stored.
    Raises: PackedError if a weight is not finite.
    """
    rows, in_features = weight.shape
    if not can_pack(fmt, in_features):
        raise PackedError(f"in_features: {in_features} cannot be packed as {fmt}; leave this linear as it is")
    weight = F.pad(weight, (0, 0, 0, _padded(rows) - rows))
    step = max(64, PACK_WEIGHTS // in_features // 64 * 64)  # a few rows at a time, in cache
    slices = [_quantize4(fmt, part) if fmt.bits == 4 else _quantize8(part) for part in weight.split(step)]
    packed, scales = torch.cat([q for q, _ in slices]), torch.cat([scale for _, scale in slices], dim=-2)
    if not bool(torch.isfinite(scales).all()):
        raise PackedError(
            "weight: holds NaN or infinity; the checkpoint is damaged or not meant to be quantised"
        )
    data = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in (packed, scales)])
    return F.pad(data, (0, -data.numel() % ALIGNMENT_BYTES))


def packed_linear(
    fmt: PackedFormat, x: torch.Tensor, block_bytes: torch.Tensor, rows: int, in_features: int
) -> torch.Tensor:
    """x @ W.T for the rows of one block, computed on the packed bytes where they lie.

    x: [..., in_features]; block_bytes: uint8 [at least the block's bytes], at any even offset of its storage.
    Returns [..., rows] in x's dtype.
    """
    activations = x.reshape(-1, in_features).to(torch.bfloat16).contiguous()
    if activations.shape[0] >= fmt.dequantize_rows:
        y = _unpacked_linear(fmt, activations.float(), block_bytes, rows, in_features).to(x.dtype)
    else:
        packed, scales = _views(fmt, block_bytes, rows, in_features)
        if fmt.bits == 4:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(activations, packed, fmt.group_size, scales)
        else:
            y = torch.ops.aten._weight_int8pack_mm(activations, packed, scales)
        y = y[:, :rows].to(x.dtype)
    return y.reshape(*x.shape[:-1], rows)


def dequantize(fmt: PackedFormat, block_bytes: torch.Tensor, rows: int, in_features: int) -> torch.Tensor:
    """The weights a block stands for, float32 [rows, in_features]: exactly the numbers the kernels multiply by."""
    packed, scales = _views(fmt, block_bytes, rows, in_features)
    return _columns(fmt, packed, scales, 0, _padded(rows))[:, :rows].T.contiguous()


def measure_dequantize_rows(fmt: PackedFormat, in_features: int = 4096, rows: int = 512) -> PackedFormat:
    """`fmt` with the `dequantize_rows` of this machine: the fewest rows at which unpacking first is not slower.

    Times both ways in turns on one block, at growing numbers of activation rows. In CPU seconds of a single thread,
    the least of five, so that other work on the machine does not decide; about a second.
    """
    ways = (replace(fmt, dequantize_rows=2**31), replace(fmt, dequantize_rows=1))  # packed, unpacked
    candidates = (16, 32, 48, 64, 96, 128, 192, 256)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        block_bytes = pack_rows(fmt, torch.randn(rows, in_features))
        for activation_rows in candidates:
            x = torch.randn(activation_rows, in_features, dtype=torch.bfloat16)
            seconds: list[list[float]] = [[], []]
            for _ in range(5):
                for way, samples in zip(ways, seconds, strict=True):
                    start_s = time.thread_time()
                    packed_linear(way, x, block_bytes, rows, in_features)
                    samples.append(time.thread_time() - start_s)
            if min(seconds[1]) <= min(seconds[0]):
                return replace(fmt, dequantize_rows=activation_rows)
        return replace(fmt, dequantize_rows=2 * candidates[-1])
    finally:
        torch.set_num_threads(threads)


@cache
def cpu_layout() -> str:
    """The order in which this CPU's int4 kernel keeps its nibbles, found by packing a pattern."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(16, (112, 32), dtype=torch.uint8, generator=generator)  # whole tiles and a tail
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(pattern.int(), 1)
    for layout, tile_rows in TILE_ROWS.items():
        if torch.equal(packed, _pack_nibbles(pattern, tile_rows)):
            return layout
    raise PackedError(
        "int4: this build of torch orders nibbles in a way flexinfer does not know; use 8 bit "
        "(`flexinfer quantize SRC DST --bits 8`), or the torch version pinned in pyproject.toml"
    )


def _padded(rows: int) -> int:
    return -(-rows // KERNEL_ROWS) * KERNEL_ROWS


def _row_bytes(fmt: PackedFormat, in_features: int) -> int:
    return in_features // 2 + 4 * (in_features // fmt.group_size) if fmt.bits == 4 else in_features + 2


def _quantize4(fmt: PackedFormat, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed nibbles [rows, in / 2], and (scale, zero) bf16 [groups, rows, 2].

    Tries narrower ranges for each group and takes the one of least error.
    """
    rows, in_features = weight.shape
    groups = weight.float().view(rows, -1, fmt.group_size)
    low, high = (bound.unsqueeze(-1) for bound in groups.aminmax(dim=-1))
    best_scale, best_zero = _range(low, high)
    least = torch.full_like(low, math.inf)
    for low_ratio, high_ratio in itertools.product(CLIP_RATIOS, repeat=2):
        scale, zero = _range(low * low_ratio, high * high_ratio)
        steps = groups.sub(zero).div_(scale)
        steps.sub_(steps.round().clamp_(-8, 7)).abs_()
        error = steps.sqrt().mul_(steps.square_()).sum(-1, keepdim=True).mul_(scale**2.5)
        better = error < least  # never with NaN or infinity, which pack_rows refuses
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    q = groups.sub(best_zero).div_(best_scale).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    scales = torch.cat((best_scale, best_zero), -1).bfloat16().transpose(0, 1)
    return _pack_nibbles(q.view(rows, in_features), TILE_ROWS[fmt.layout]), scales


def _range(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero), as bf16 will keep them, whose 16 values run from `low` to `high`."""
    scale = (
        ((high - low) / 15).bfloat16().float().clamp_min_(2.0**-100)
    )  # a constant group keeps its value as zero
    return scale, (low + 8 * scale).bfloat16().float()


def _quantize8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [rows, in], and scales bf16 [rows, 1]."""
    weight = weight.float()
    scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16().float().clamp_min(2.0**-100)
    return (weight / scale).round_().clamp_(-127, 127).to(torch.int8), scale.bfloat16()


def _pack_nibbles(q: torch.Tensor, tile_rows: int) -> torch.Tensor:
    """Put uint8 [rows, in] of 0..15 in a kernel's order: uint8 [rows, in / 2]; any layout, on any CPU."""
    rows, in_features = q.shape
    whole = rows // tile_rows * tile_rows if tile_rows else 0
    parts = []
    if whole:
        tiles = q[:whole].view(-1, 2, tile_rows // 2, in_features)  # [tiles, half, row, in]
        parts.append((tiles[:, 0] | tiles[:, 1] << 4).transpose(1, 2).reshape(-1))
    pair_tile_rows = tile_rows or PAIR_TILE_ROWS
    for start in range(whole, rows, pair_tile_rows):
        pairs = q[start : start + pair_tile_rows].view(-1, 2, in_features)  # [pair, row, in]
        parts.append((pairs[:, 0] | pairs[:, 1] << 4).T.reshape(-1))
    return torch.cat(parts).view(rows, in_features // 2)


def _views(
    fmt: PackedFormat, block_bytes: torch.Tensor, rows: int, in_features: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two parts of a block, as the kernels take them; no copy."""
    rows = _padded(rows)
    weight_bytes = rows * in_features * fmt.bits // 8
    scales = block_bytes[weight_bytes : rows * _row_bytes(fmt, in_features)].view(torch.bfloat16)
    if fmt.bits == 4:
        return block_bytes[:weight_bytes].view(rows, in_features // 2), scales.view(-1, rows, 2)
    return block_bytes[:weight_bytes].view(torch.int8).view(rows, in_features), scales


def _unpacked_linear(
    fmt: PackedFormat, x: torch.Tensor, block_bytes: torch.Tensor, rows: int, in_features: int
) -> torch.Tensor:
    """x [m, in] float32 times a block unpacked a few rows at a time, so that the scratch stays small."""
    packed, scales = _views(fmt, block_bytes, rows, in_features)
    step = max(64, SCRATCH_WEIGHTS // in_features // 64 * 64)
    y = torch.empty(x.shape[0], rows)
    for start in range(0, rows, step):
        stop = min(start + step, _padded(rows))
        width = min(stop, rows) - start
        y[:, start : start + width] = (x @ _columns(fmt, packed, scales, start, stop))[:, :width]
    return y


def _columns(
    fmt: PackedFormat, packed: torch.Tensor, scales: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """Rows [start, stop) of a block as float32 columns [in, stop - start]; start is a multiple of 64."""
    rows = stop - start
    if fmt.bits == 8:
        return (packed[start:stop].float() * scales[start:stop, None].float()).T
    in_features = packed.shape[1] * 2
    q = torch.empty(in_features, rows, dtype=torch.int8)
    tile_rows = TILE_ROWS[fmt.layout]
    whole = rows // tile_rows * tile_rows if tile_rows else 0
    data = packed[start:stop].reshape(-1)
    data = data if data.storage_offset() % 8 == 0 else data.clone()
    if whole:  # eight nibbles at a time
        words = data[: whole * in_features // 2].view(torch.int64).view(-1, in_features, tile_rows // 16)
        words = words.transpose(0, 1).contiguous()
        out = (
            q[:, :whole].view(torch.int64).view(in_features, -1, 2, tile_rows // 16)
        )  # [in, tile, half, word]
        out[:, :, 0] = words & 0x0F0F0F0F0F0F0F0F
        out[:, :, 1] = (words >> 4) & 0x0F0F0F0F0F0F0F0F
    pair_tile_rows = tile_rows or PAIR_TILE_ROWS
    for first in range(whole, rows, pair_tile_rows):
        last = min(first + pair_tile_rows, rows)
        pairs = data[first * in_features // 2 : last * in_features // 2].view(in_features, -1)
        tail = q[:, first:last].view(torch.uint8).view(in_features, -1, 2)  # [in, pair, row]
        torch.bitwise_and(pairs, 15, out=tail[:, :, 0])
        torch.bitwise_right_shift(pairs, 4, out=tail[:, :, 1])
    scale, zero = (
        scales[:, start:stop, None].float().permute(3, 0, 2, 1).contiguous()
    )  # each [groups, 1, rows]
    weights = q.sub_(8).float().view(-1, fmt.group_size, rows)
    return torch.addcmul(zero, weights, scale, out=weights).view(in_features, rows)


@dataclass(frozen=True, slots=True)
class PackedKernel:
    """Blocks written by `flexinfer quantize`, each with its own scales."""

    in_features: int
    format: PackedFormat
    joins: bool = False

    @property
    def resident(self) -> "PackedKernel":
        return self

    def resident_bytes(self, nbytes: int) -> int:
        return nbytes

    def copied_bytes(self, nbytes: int) -> int:
        """Weights unpacked for many rows, and their products before they are rounded."""
        return 2 * SCRATCH_WEIGHTS * 4

    def work_bytes(self, activation_rows: int, output_rows: int) -> int:
        """torch's own, small and of any size: in the margin."""
        return 0

    def view(self, buffer: Buffer, position: int, rows: int) -> torch.Tensor:
        return buffer.bytes[position:]

    def multiply(
        self, x: torch.Tensor, view: torch.Tensor, rows: int, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = packed_linear(self.format, x, view, rows, self.in_features)
        return y if bias is None else y + bias
