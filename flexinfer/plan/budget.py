"""Which bytes stay in memory and which are streamed. Pure functions: no files, no clock, no torch.

Units. A `Weight` is the weight of one linear; it is cut by output rows into `Piece`s of a few MiB, the unit of reading
and of computing (the rows of a product do not depend on one another, so cutting leaves every bit in place). A plan locks
the first k pieces of each weight; the rest of it is streamed through the window, in order of use.

Policies. `balanced` (ours) locks the same share of every weight, so that reads are spread evenly over the whole pass: the
paper's balanced locking (section 3.2) taken down to the piece, which leaves less than one piece of the budget unused.
`unbalanced`, `attention-first`, `ffn-first` and `algorithm1` are the paper's variants (figures 3 and 5, Algorithm 1) and
lock whole weights; they keep what is not in a decoder layer (lm_head) resident first, as the paper does.

Experts of a mixture (flexinfer.mixture) get what dense weights leave: all of those are locked first. Where the budget does not
hold them, the experts pass through a cache no larger than the window.

With a draft from a substitute (flexinfer.streaming.substitute) every piece is in memory: locked, or in a few bits. The policies then
divide what is left once all pieces have a substitute, a locked piece costing as much more as it takes more than its substitute.

Cost model, the paper's equation 4: seconds per pass = max(compute, streamed bytes / bandwidth).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flexinfer.plan.experts import CacheShape, ExpertPlan, Mixture, expert_plan
from flexinfer.plan.preservation import POLICIES
from flexinfer.plan.weights import Weight
from flexinfer.sizes import BudgetError, format_size, name_budget, parse_size

DEFAULT_WINDOW_BYTES = 20 << 20  # four pieces: one computed on, two being read, one ready

MIN_SLOTS = 2  # one computed on, one filled

TABLE_BYTES = 4096  # a page of tables

MAPPED_BYTES = 2 << 20  # that it maps


@dataclass(frozen=True, slots=True)
class Costs:
    """What this machine was measured to do."""

    bandwidth_bytes_per_s: float
    compute_s: float  # one pass at one row with every weight resident


@dataclass(frozen=True, slots=True)
class Fixed:
    """Memory that is spent before any weight is locked or streamed, in bytes."""

    process_bytes: int  # interpreter, libraries, the model's modules
    resident_bytes: int  # norms, biases, positions and other parameters that are never streamed
    kv_bytes: int  # keys and values of full-attention layers, set aside
    activation_bytes: int  # the largest pass, and the layers of sliding windows
    margin_bytes: int  # what cannot be known: allocator, threads, page tables
    context_tokens: int = 0  # what the KV cache and the activations are sized for
    tokenizer_bytes: int = 0  # kept free for a tokenizer that is yet to be loaded, and for its first use
    draft_bytes: int = 0  # a draft model, and the scores of candidates
    attention_bytes: int = (
        0  # some heads of keys and values as attention takes them, where the cache keeps another dtype
    )
    loading_bytes: int = (
        0  # at most while a tokenizer is loaded, before anything else but the process is there
    )

    @property
    def nbytes(self) -> int:
        return (
            self.process_bytes
            + self.tokenizer_bytes
            + self.draft_bytes
            + self.attention_bytes
            + self.resident_bytes
            + self.kv_bytes
            + self.activation_bytes
            + self.margin_bytes
        )


@dataclass(frozen=True, slots=True)
class PassShape:
    """What a call asks of one pass over the weights."""

    batch: int
    new_tokens: int  # of each sequence
    past_tokens: int = 0  # of each sequence, in the KV cache
    kept: int = 1  # positions of each sequence whose logits are wanted, the last ones; 0 for all
    cached: bool = True  # whether its keys and values go into the memory set aside for them

    @property
    def kept_tokens(self) -> int:
        """Positions of each sequence that get logits."""
        return min(self.kept, self.new_tokens) if self.kept else self.new_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of all sequences, when the pass is over."""
        return self.batch * (self.past_tokens + self.new_tokens)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a budget goes. All sizes in bytes; `streamed_bytes`, `total_bytes` and the speeds are per pass over the weights.

    Of experts a pass has those that one token is routed to, and reads as many as are expected to be missed.
    """

    budget_bytes: int
    fixed: Fixed
    policy: str
    window_layers: int | None  # the paper's k, or None where the window is counted in bytes alone
    slots: int
    slot_bytes: int
    locked_pieces: dict[str, int] = field(repr=False)  # weight name -> how many of its pieces are locked
    locked_bytes: int
    streamed_bytes: int
    total_bytes: int
    unused_bytes: int
    costs: Costs
    bound_tokens_per_s: (
        float  # what no system can beat in this budget: 1 / max(compute, (total - R) / bandwidth)
    )
    predicted_tokens_per_s: float
    experts: ExpertPlan | None = None  # None where there are none
    substitute_bytes: int = 0  # of what is streamed, for drafts
    draft: "DraftPlan | None" = None

    @property
    def held_bytes(self) -> int:
        """Memory for weights: locked, substitutes, window and cache of experts."""
        cache_bytes = self.experts.cache_bytes if self.experts is not None else 0
        return self.locked_bytes + self.substitute_bytes + self.window_bytes + cache_bytes

    @property
    def process_bytes(self) -> int:
        return self.fixed.process_bytes

    @property
    def kv_bytes(self) -> int:
        return self.fixed.kv_bytes

    @property
    def window_bytes(self) -> int:
        return self.slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Several tokens for each pass over the weights, and what that is expected to give."""

    kind: str  # "substitute", "lookup" or "model"
    type: str | None  # of a substitute's blocks
    candidates: int  # that a pass verifies
    acceptance: float  # of a candidate whose predecessors were accepted
    tokens_per_pass: float
    predicted_tokens_per_s: float


def parse_window(window: str | int | None) -> tuple[int | None, int | None]:
    """`window` as (bytes, layers), one of them None: None, bytes, "64MiB", or "3 layers" (the paper's unit).

    Raises BudgetError on anything else.
    """
    if window is None:
        return DEFAULT_WINDOW_BYTES, None
    words = window.split() if isinstance(window, str) else []
    if len(words) == 2 and words[1] in {"layer", "layers"}:
        if not words[0].isdigit() or int(words[0]) < 1:
            raise BudgetError(f"window={window!r}: the number of layers must be a whole number from 1")
        return None, int(words[0])
    return parse_size(window, "window"), None


Substitutes = Mapping[str, Sequence[int]]  # memory of the substitute of each piece, by the name of its weight


def smallest_budget_bytes(
    weights: Sequence[Weight],
    fixed: Fixed,
    mixture: Mixture | None = None,
    substitutes: Substitutes | None = None,
) -> int:
    """The least budget in which the weights can be streamed: what is fixed, and the smallest window and cache of experts, and
    substitutes of all weights where there are some."""
    slot_bytes = mixture.slots().slot_bytes if mixture is not None else 0
    held_bytes = MIN_SLOTS * (_slot_bytes(weights) + slot_bytes) + _all_bytes(substitutes)
    return max(fixed.nbytes + with_page_tables(held_bytes), _loading_bytes(fixed))


def _loading_bytes(fixed: Fixed) -> int:
    """What the process holds at most while a tokenizer is loaded: nothing else is there yet."""
    return fixed.process_bytes + with_page_tables(fixed.loading_bytes) + fixed.margin_bytes


def page_table_bytes(nbytes: int) -> int:
    """What the system takes for the tables of so much memory, huge pages or not: a page for each 2 MiB, counted with the process."""
    return max(0, nbytes) // MAPPED_BYTES * TABLE_BYTES


def with_page_tables(nbytes: int) -> int:
    """The least memory that holds `nbytes` and the tables for all of it."""
    total_bytes = nbytes + page_table_bytes(nbytes)
    while total_bytes - page_table_bytes(total_bytes) < nbytes:
        total_bytes += TABLE_BYTES
    return total_bytes


def _all_bytes(substitutes: Substitutes | None) -> int:
    return sum(sum(pieces) for pieces in (substitutes or {}).values())


def _slot_bytes(weights: Sequence[Weight]) -> int:
    return max((piece.memory_bytes for weight in weights for piece in weight.pieces), default=0)


def make_plan(
    weights: Sequence[Weight],
    fixed: Fixed,
    budget_bytes: int,
    costs: Costs,
    *,
    policy: str = "balanced",
    window: str | int | None = None,
    mixture: Mixture | None = None,
    substitutes: Substitutes | None = None,
) -> Plan:
    """Divide `budget_bytes` between what is fixed, the window, the locked pieces of `weights` (in order of use), `substitutes` of
    the others and a cache of the experts of `mixture`.

    Raises BudgetError when the budget cannot hold the fixed part and the smallest window and cache, and ValueError for a
    policy that does not exist.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy={policy!r} does not exist; there are {', '.join(sorted(POLICIES))}")
    window_bytes, window_layers = parse_window(window)
    pieces = [piece for weight in weights for piece in weight.pieces]
    dense_bytes = sum(piece.nbytes for piece in pieces)
    smallest_bytes = smallest_budget_bytes(weights, fixed, mixture, substitutes)
    loadable = budget_bytes >= _loading_bytes(fixed)
    tables_bytes = page_table_bytes(budget_bytes - fixed.nbytes)
    fixed = replace(fixed, process_bytes=fixed.process_bytes + tables_bytes)
    spare_bytes = budget_bytes - fixed.nbytes
    slot_bytes = _slot_bytes(weights)
    to_lock_bytes = sum(weight.locked_bytes for weight in weights)

    cache, slots_of_cache = None, 0
    if mixture is not None:
        cache = mixture.slots()
        most_bytes = spare_bytes - MIN_SLOTS * slot_bytes
        slots_of_cache = _small_cache(cache, window_bytes or DEFAULT_WINDOW_BYTES, most_bytes)
        spare_bytes -= slots_of_cache * cache.slot_bytes
    all_fits = to_lock_bytes <= spare_bytes and loadable
    if all_fits and (policy != "none" or not pieces):
        slots, locked = 0, {weight.name: len(weight.pieces) for weight in weights}
        if cache is not None:
            more = min(cache.all_slots - slots_of_cache, (spare_bytes - to_lock_bytes) // cache.slot_bytes)
            slots_of_cache += more
            spare_bytes -= more * cache.slot_bytes
    else:
        if budget_bytes < smallest_bytes:
            raise BudgetError(
                _too_little(budget_bytes, smallest_bytes, fixed, slot_bytes, cache, _all_bytes(substitutes))
            )
        lock_bytes = spare_bytes - _all_bytes(substitutes)
        slots = _window_slots(weights, window_bytes, window_layers, slot_bytes, lock_bytes)
        to_lock = weights if substitutes is None else _beyond_substitutes(weights, substitutes)
        locked = POLICIES[policy](to_lock, lock_bytes - slots * slot_bytes)

    in_few_bits = 0
    if substitutes is not None:
        in_few_bits = sum(sum(substitutes[w.name][locked.get(w.name, 0) :]) for w in weights)
    streamed = [piece for weight in weights for piece in weight.pieces[locked.get(weight.name, 0) :]]
    locked_memory = sum(p.locked_bytes for w in weights for p in w.pieces[: locked.get(w.name, 0)])
    streamed_bytes = sum(piece.nbytes for piece in streamed)
    read_bytes = sum(piece.memory_bytes for piece in streamed)
    at_best_bytes = dense_bytes - max(
        0, budget_bytes - fixed.process_bytes - fixed.tokenizer_bytes - fixed.kv_bytes
    )  # less than nothing: room for experts
    experts = None
    if mixture is not None and cache is not None:
        experts = expert_plan(mixture, cache, slots_of_cache)
        read_bytes += experts.missed_bytes
        kept = min(1.0, max(0, -at_best_bytes) / experts.total_bytes)
        at_best_bytes = max(0, at_best_bytes) + int(experts.token_bytes * (1 - kept))
    read_s, at_best_s = (
        nbytes / costs.bandwidth_bytes_per_s for nbytes in (read_bytes, max(0, at_best_bytes))
    )
    return Plan(
        budget_bytes=budget_bytes,
        fixed=fixed,
        policy=policy,
        window_layers=window_layers,
        slots=slots if streamed else 0,
        slot_bytes=slot_bytes,
        locked_pieces=locked,
        locked_bytes=dense_bytes - streamed_bytes,
        streamed_bytes=streamed_bytes + (experts.missed_bytes if experts else 0),
        total_bytes=dense_bytes + (experts.token_bytes if experts else 0),
        unused_bytes=spare_bytes - locked_memory - in_few_bits - (slots * slot_bytes if streamed else 0),
        costs=costs,
        bound_tokens_per_s=_per_s(max(costs.compute_s, at_best_s)),
        predicted_tokens_per_s=_per_s(max(costs.compute_s, read_s)),
        experts=experts,
        substitute_bytes=in_few_bits,
    )


def _beyond_substitutes(weights: Sequence[Weight], substitutes: Substitutes) -> list[Weight]:
    """The weights, a piece taking what it takes locked beyond its substitute."""
    return [
        replace(
            weight,
            pieces=tuple(
                replace(piece, locked_bytes=max(0, piece.locked_bytes - nbytes))
                for piece, nbytes in zip(weight.pieces, substitutes[weight.name], strict=True)
            ),
        )
        for weight in weights
    ]


def _small_cache(cache: CacheShape, window_bytes: int, most_bytes: int) -> int:
    """Slots of the cache before dense weights have had their part: as large as a window."""
    return min(cache.all_slots, max(MIN_SLOTS, min(window_bytes, most_bytes) // cache.slot_bytes))


def _too_little(
    budget_bytes: int,
    smallest_bytes: int,
    fixed: Fixed,
    slot_bytes: int,
    cache: CacheShape | None,
    in_few_bits: int,
) -> str:
    """What a budget is needed for."""
    others = f", experts {format_size(MIN_SLOTS * cache.slot_bytes)}" if cache is not None else ""
    draft_bytes = in_few_bits + fixed.draft_bytes
    others += f", draft {format_size(draft_bytes)}" if draft_bytes else ""
    loading = f" ({format_size(fixed.loading_bytes)} while it is loaded)" if fixed.loading_bytes else ""
    return (
        f"memory={format_size(budget_bytes)} is too little for this model: it needs at least {name_budget(smallest_bytes)}: "
        f"process {format_size(fixed.process_bytes)}, tokenizer {format_size(fixed.tokenizer_bytes)}{loading}, parameters that stay "
        f"{format_size(fixed.resident_bytes)}, KV cache {format_size(fixed.kv_bytes + fixed.attention_bytes)}, activations "
        f"{format_size(fixed.activation_bytes)}, margin {format_size(fixed.margin_bytes)}, window "
        f"{format_size(MIN_SLOTS * slot_bytes)}{others}. A smaller context makes the KV cache and activations smaller."
    )


def _per_s(seconds: float) -> float:
    return 1 / seconds if seconds else math.inf


def _window_slots(
    weights: Sequence[Weight],
    window_bytes: int | None,
    window_layers: int | None,
    slot_bytes: int,
    spare_bytes: int,
) -> int:
    """How many slots the window has: what was asked for, at least MIN_SLOTS, at most what the budget holds."""
    if window_layers is None:
        assert window_bytes is not None
        wanted = window_bytes // slot_bytes
    else:
        count_of: dict[int, int] = {}
        for weight in weights:
            count_of[weight.layer] = count_of.get(weight.layer, 0) + len(weight.pieces)
        counts = list(count_of.values())
        wanted = max(sum((counts + counts)[i : i + window_layers]) for i in range(len(counts)))
    return max(MIN_SLOTS, min(wanted, spare_bytes // slot_bytes))
