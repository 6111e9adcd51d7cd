"""Cuts the rows of a tensor into pieces of a few MiB."""

import math
from itertools import pairwise

from flexinfer.formats.tensors import Beside, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.memory.buffer import round_up
from flexinfer.plan.weights import Extent, Piece
from flexinfer.streaming.reader import padded_bytes

# Large enough for the disk, small enough that a window of several is little memory.
PIECE_BYTES = 4 << 20
# Pieces are cut at multiples of this many rows, and the last has at least as many: MKL multiplies
# fewer rows of fp32 by another kernel, which adds in another order.
ROW_MULTIPLE = 64


def cut(
    spec: TensorSpec,
    rows: int,
    kernel: Kernel,
    piece_bytes: int | None,
    *,
    name: str,
    layer: int,
    row_start: int = 0,
) -> tuple[Piece, ...]:
    """Even pieces of at most about `piece_bytes` each; one where that is None.

    Args:
        spec: where `rows` rows follow one another.
        kernel: what multiplies them.
        name: of the weight.
        layer: of the weight.
        row_start: number of the first row among those of the weight.
    """
    step, beside = rows, spec.packed.beside if spec.packed is not None else ()
    if piece_bytes is not None and not (spec.packed and spec.packed.by_inputs):
        multiple = math.lcm(ROW_MULTIPLE, *(one.rows for one in beside if one.rows))
        step = min(rows, round_up(-(-rows // -(-spec.nbytes // piece_bytes)), multiple))
    row_bytes, stays = spec.nbytes // rows, kernel.locked is kernel
    pieces = []
    for start, stop in pairwise([0, *range(step, rows - ROW_MULTIPLE + 1, step), rows]):
        offset_bytes, nbytes = spec.offset_bytes + start * row_bytes, (stop - start) * row_bytes
        extents = tuple(_of_rows(one, start, stop) for one in beside)
        memory_bytes = padded_bytes(offset_bytes, nbytes) + sum(
            padded_bytes(one.offset_bytes, one.nbytes) for one in extents
        )
        pieces.append(
            Piece(
                name,
                layer,
                row_start + start,
                row_start + stop,
                spec.file,
                offset_bytes,
                nbytes,
                memory_bytes,
                lock_cost_bytes=memory_bytes if stays else round_up(kernel.locked_bytes(nbytes)),
                copied_bytes=kernel.copied_bytes(nbytes),
                beside=extents,
            )
        )
    return tuple(pieces)


def _of_rows(beside: Beside, start: int, stop: int) -> Extent:
    """The part of a tensor that rows [start, stop) need."""
    spec = beside.spec
    if beside.rows is None:
        return Extent(spec.file, spec.offset_bytes, spec.nbytes)
    first, last = start // beside.rows, -(-stop // beside.rows)
    row_bytes = spec.nbytes // spec.shape[0]
    return Extent(spec.file, spec.offset_bytes + first * row_bytes, (last - first) * row_bytes)
