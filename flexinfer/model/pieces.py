"""Cuts the rows of a tensor into pieces of a few MiB."""

from itertools import pairwise

from flexinfer.formats.tensors import TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.memory.buffer import round_up
from flexinfer.plan.weights import Piece
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
    step = rows
    if piece_bytes is not None:
        step = min(rows, round_up(-(-rows // -(-spec.nbytes // piece_bytes)), ROW_MULTIPLE))
    row_bytes, stays = spec.nbytes // rows, kernel.resident is kernel
    pieces = []
    for start, stop in pairwise([0, *range(step, rows - ROW_MULTIPLE + 1, step), rows]):
        offset_bytes, nbytes = spec.offset_bytes + start * row_bytes, (stop - start) * row_bytes
        memory_bytes = padded_bytes(offset_bytes, nbytes)
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
                locked_bytes=memory_bytes if stays else round_up(kernel.resident_bytes(nbytes)),
                copied_bytes=kernel.copied_bytes(nbytes),
            )
        )
    return tuple(pieces)
