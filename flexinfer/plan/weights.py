"""TODO"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["attention", "ffn", "head"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some consecutive rows of a weight, and where their bytes lie."""

    name: str  # of the weight
    layer: int
    row_start: int
    row_stop: int
    file: Path
    offset_bytes: int
    nbytes: int
    memory_bytes: int  # nbytes and the padding a direct read needs around them
    locked_bytes: int  # memory it takes when it stays, in the dtype that is computed in
    copied_bytes: int = 0  # memory that its kernel may take for a copy of it while it is multiplied


@dataclass(frozen=True, slots=True)
class Weight:
    """The weight of one linear, as pieces that follow one another in the file."""

    name: str
    role: str  # its name within a layer, such as "self_attn.q_proj"; all layers share it
    layer: int  # the decoder layer; the number of layers for what comes after them
    kind: Kind
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    @property
    def locked_bytes(self) -> int:
        """Memory it takes when locked whole."""
        return sum(piece.locked_bytes for piece in self.pieces)
