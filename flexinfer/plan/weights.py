"""Weights, and the pieces that they are cut into: the unit of reading, locking and computing.

The output rows of a product do not depend on one another, so cutting a weight by rows leaves every
bit unchanged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["attention", "ffn", "head"]


@dataclass(frozen=True, slots=True)
class Extent:
    """Consecutive bytes of a file."""

    file: Path
    offset_bytes: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive rows of a weight, and where their bytes lie."""

    # Of the weight.
    name: str
    layer: int
    row_start: int
    row_stop: int
    file: Path
    offset_bytes: int
    nbytes: int
    # nbytes, what lies beside, and the padding that direct reads need around them.
    memory_bytes: int
    # Memory that it takes when it is locked, in the compute dtype.
    lock_cost_bytes: int
    # Memory that its kernel may take for a copy of it while it is multiplied.
    copied_bytes: int = 0
    # What the rows need besides, such as scales: read behind them, each from the next page on.
    beside: tuple[Extent, ...] = ()


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of one linear, as pieces that follow one another in the file."""

    name: str
    # Its name within a layer, such as "self_attn.q_proj"; all layers share it.
    role: str
    # The decoder layer; the number of layers for what comes after them.
    layer: int
    kind: Kind
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """In the file."""
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def lock_cost_bytes(self) -> int:
        """Memory that it takes when it is locked whole."""
        return sum(piece.lock_cost_bytes for piece in self.pieces)
