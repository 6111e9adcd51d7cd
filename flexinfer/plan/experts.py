"""Mixtures of experts in a plan: what a token needs of them, what a cache of them is worth. Pure
functions.

A token is routed to `used` of the experts of each layer, so what a pass reads is not known before
it. Dense weights come first in a budget, for every token needs them; a cache of experts takes what
is left. It is made of equal slots, one for a piece of an expert's weight, so that experts of any
layer can take the place of any other.

Cost model: experts that are in the cache cost nothing, the others their bytes at the disk's
bandwidth. Where routing is uniform, the worst case, no policy that cannot foresee hits more often
than the share of the experts that the cache holds; and recency never hits in a cache that holds
less than one token uses, for each expert is gone before its layer comes round again. Trained
routers are not uniform: what they really hit is counted (`Engine.stats()`).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexinfer.plan.weights import Piece, Weight

# A piece is at least 1/16 of the largest that is read at once.
FEW_PIECES = 16
# Fixed cost of a read, in bytes; our choice.
REQUEST_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer.

    Each has the same weights: one or two for the way up, and last the way down.
    """

    # Name of the module.
    name: str
    layer: int
    # Experts per token.
    used: int
    experts: tuple[tuple["Weight", ...], ...]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for expert in self.experts for weight in expert)

    @property
    def used_bytes(self) -> int:
        """Bytes of the experts that a token is routed to."""
        return self.nbytes * self.used // len(self.experts)


@dataclass(frozen=True, slots=True)
class Mixture:
    """All experts of a model, layer by layer."""

    layers: tuple[ExpertLayer, ...]

    def pieces(self) -> Iterator[tuple["Piece", ...]]:
        """The pieces of each expert, in order of use."""
        for layer in self.layers:
            for expert in layer.experts:
                yield tuple(piece for weight in expert for piece in weight.pieces)

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts that a token is routed to, over all layers."""
        return sum(layer.used_bytes for layer in self.layers)

    def slots(self) -> "CacheShape":
        """What a cache of all experts would be."""
        counts = [len(pieces) for pieces in self.pieces()]
        layers = iter(counts)
        token = sum(max(next(layers) for _ in layer.experts) * layer.used for layer in self.layers)
        slot_bytes = max(piece.memory_bytes for pieces in self.pieces() for piece in pieces)
        return CacheShape(sum(counts), token, slot_bytes)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Slots that all experts take, and those that one token uses."""

    all_slots: int
    token_slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.all_slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """What of a budget goes to experts, and what is expected of it. Bytes."""

    slots: int
    slot_bytes: int
    # Size of all experts.
    total_bytes: int
    # Size of the experts of one token.
    token_bytes: int
    # Hit rate to expect if routing is uniform.
    hit_rate: float

    @property
    def cache_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def missed_bytes(self) -> int:
        """Expected to be read for a token, where routing is uniform."""
        return int(self.token_bytes * (1 - self.hit_rate))


def expert_plan(mixture: Mixture, shape: CacheShape, slots: int) -> ExpertPlan:
    """A cache of `slots`."""
    hit_rate = 0.0 if slots < shape.token_slots else slots / shape.all_slots
    return ExpertPlan(slots, shape.slot_bytes, mixture.nbytes, mixture.token_bytes, hit_rate)


def even_piece_bytes(sizes: Counter[int], largest_bytes: int) -> int:
    """At how many bytes weights of `sizes` (bytes -> how many) are best cut, so that equal slots
    hold their pieces.

    Weighs what slots leave unused, as some weights have more bits than others, against the number
    of reads.
    """

    def cost(piece_bytes: int) -> int:
        slots = sum(count * -(-size // piece_bytes) for size, count in sizes.items())
        return slots * (piece_bytes + REQUEST_BYTES)

    least_bytes = largest_bytes // FEW_PIECES
    parts = {
        -(-size // count)
        for size in sizes
        for count in range(-(-size // largest_bytes), max(1, size // least_bytes) + 1)
    }
    return min(sorted(parts, reverse=True), key=cost)
