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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from flexinfer.mixture import CacheShape, ExpertPlan, Mixture, expert_plan

Kind = Literal["attention", "ffn", "head"]

DEFAULT_WINDOW_BYTES = 20 << 20  # four pieces: one computed on, two being read, one ready
SLACK_BYTES = 6 << 20  # between processes of the same program; a server's differ by up to 4 MiB (docs/log.md)
MIN_SLOTS = 2  # one computed on, one filled
TABLE_BYTES = 4096  # a page of tables
MAPPED_BYTES = 2 << 20  # that it maps
MOST_BYTES = 1 << 60  # no machine has as many
UNITS_BYTES = {"": 1, "B": 1}  # in any case
for _power, _letter in enumerate("KMGT", 1):
    # A letter alone is binary, as docker and systemd have it: a budget is often that of a container.
    UNITS_BYTES |= dict.fromkeys((f"{_letter}iB", f"{_letter}i", _letter), 1 << 10 * _power)
    UNITS_BYTES[f"{_letter}B"] = 1000**_power


class BudgetError(ValueError):
    """A memory budget that cannot work. Names the smallest one that does."""


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


def parse_size(value: str | int, what: str = "memory") -> int:
    """Bytes in `value`: a whole number of bytes, or a number with a unit, in any case.

    "4GiB", "4Gi" and "4G" are 4 x 1024^3 bytes, "4GB" is 4 x 1000^3. Raises BudgetError on anything else. `what` names the argument in
    the message.
    """
    text = str(value).strip()
    unit = text.lstrip("0123456789.").strip()
    units = {known.lower(): size for known, size in UNITS_BYTES.items()}
    try:
        number = float(text[: len(text) - len(unit)]) * units[unit.lower()]
    except (ValueError, KeyError):
        number = -1.0
    if isinstance(value, int) and not isinstance(value, bool):
        number = min(value, MOST_BYTES)
    elif number < 0 or isinstance(value, bool) or (not unit and number % 1):
        number = MOST_BYTES
    if number >= MOST_BYTES:
        raise BudgetError(
            f"{what}={value!r} is not a size; write whole bytes or a number with a unit, such as '4GiB' (or '4G', the same), '1.5GB' "
            "(decimal), '700MiB'"
        )
    if number < 1:
        raise BudgetError(f"{what}={value!r} must be at least 1 byte")
    return int(number)


def format_size(nbytes: float) -> str:
    """`nbytes` for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


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


def named_budget_bytes(smallest_bytes: int) -> int:
    """The budget that a message names where `smallest_bytes` would do: whole MiB, and so much more that the next process, which is
    not always of the same size before it loads a model, accepts it too. What is accepted is decided by `smallest_bytes` alone."""
    return -(-(smallest_bytes + SLACK_BYTES) >> 20) << 20


def name_budget(smallest_bytes: int) -> str:
    """That budget as every message names it: in bytes, and as it can be given."""
    named_bytes = named_budget_bytes(smallest_bytes)
    return f"{named_bytes} bytes ({whole_mib(named_bytes)})"


def whole_mib(nbytes: int) -> str:
    """A budget to be given: `format_size` rounds to the hundredth of a GiB, which may be too little."""
    return f"{-(-nbytes >> 20)} MiB"


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


# ---- policies: (weights in order of use, bytes for locking) -> how many pieces of each weight are locked


def _balanced(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """The same share of every weight; rounding errors are carried along the pass, so that they cannot pile up."""
    share = lock_bytes / sum(weight.locked_bytes for weight in weights)
    locked: dict[str, int] = {}
    wanted = used = 0.0
    for weight in weights:
        wanted += share * weight.locked_bytes
        count = 0
        while count < len(weight.pieces) and used + weight.pieces[count].locked_bytes <= wanted:
            used += weight.pieces[count].locked_bytes
            count += 1
        locked[weight.name] = count
    return _fill(weights, locked, lock_bytes - int(used))


def _fill(weights: Sequence[Weight], locked: dict[str, int], left_bytes: int) -> dict[str, int]:
    """Lock further pieces, a weight at a time from all over the pass, until none fits."""
    by_spread = [weights[i] for i in _spread(len(weights))]
    grown = True
    while grown:
        grown = False
        for weight in by_spread:
            count = locked.get(weight.name, 0)
            if count < len(weight.pieces) and weight.pieces[count].locked_bytes <= left_bytes:
                left_bytes -= weight.pieces[count].locked_bytes
                locked[weight.name] = count + 1
                grown = True
    return locked


def _spread(count: int) -> list[int]:
    """0 to count - 1 in an order whose every beginning is spread evenly (bit-reversal, the van der Corput sequence)."""
    bits = max(count - 1, 1).bit_length()
    reversed_ = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [i for i in reversed_ if i < count]


def _unbalanced(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Whole leading layers (the paper's figure 3a)."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    for layer in dict.fromkeys(w.layer for w in weights if w.kind != "head"):
        in_layer = [w for w in weights if w.layer == layer]
        needed = sum(w.locked_bytes for w in in_layer)
        if needed > left_bytes:
            break
        left_bytes -= needed
        locked |= {w.name: len(w.pieces) for w in in_layer}
    return locked


def _attention_first(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Attention weights of all layers, smallest first, then those of the FFN."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    left_bytes = _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    _lock_roles(weights, _roles(weights, "ffn"), locked, left_bytes)
    return locked


def _ffn_first(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """FFN weights of all layers, then those of the attention."""
    locked, left_bytes = _head_first(weights, lock_bytes)
    left_bytes = _lock_roles(weights, _roles(weights, "ffn"), locked, left_bytes)
    _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    return locked


def _algorithm1(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """The paper's Algorithm 1 as printed: FFN weights only as whole roles by its thresholds, then attention.

    Its 3 FFN tensors are F here, so that it speaks of models with two as well: all F from F f N + 2 a N bytes on, else as
    many roles (at most F - 1) as fit, with f and a the bytes of the largest FFN and attention weight and N the layers.
    """
    locked, left_bytes = _head_first(weights, lock_bytes)
    ffn_roles = _roles(weights, "ffn")
    layers = len({w.layer for w in weights if w.kind != "head"})
    ffn_bytes = layers * max((w.locked_bytes for w in weights if w.kind == "ffn"), default=0)
    attention_bytes = layers * max((w.locked_bytes for w in weights if w.kind == "attention"), default=0)
    if left_bytes >= len(ffn_roles) * ffn_bytes + 2 * attention_bytes:
        keep = len(ffn_roles)
    else:
        keep = min(len(ffn_roles) - 1, left_bytes // ffn_bytes) if ffn_bytes else 0
    left_bytes = _lock_roles(weights, ffn_roles[:keep], locked, left_bytes)
    _lock_roles(weights, _roles(weights, "attention"), locked, left_bytes)
    return locked


def _none(weights: Sequence[Weight], lock_bytes: int) -> dict[str, int]:
    """Lock nothing: prefetching alone."""
    return {}


def _head_first(weights: Sequence[Weight], lock_bytes: int) -> tuple[dict[str, int], int]:
    head = [w for w in weights if w.kind == "head"]
    needed = sum(w.locked_bytes for w in head)
    if needed > lock_bytes:
        return {}, lock_bytes
    return {w.name: len(w.pieces) for w in head}, lock_bytes - needed


def _roles(weights: Sequence[Weight], kind: Kind) -> list[str]:
    """The roles of a kind, smallest weight first (with grouped-query attention K and V come first)."""
    size_of = {w.role: w.locked_bytes for w in weights if w.kind == kind}
    return sorted(size_of, key=lambda role: size_of[role])


def _lock_roles(
    weights: Sequence[Weight], roles: Sequence[str], locked: dict[str, int], left_bytes: int
) -> int:
    """Lock each role in all layers; the one that does not fit everywhere, in evenly spread layers. Returns what is left."""
    for role in roles:
        of_role = [w for w in weights if w.role == role]
        for i in _spread(len(of_role)):
            if of_role[i].locked_bytes <= left_bytes:
                left_bytes -= of_role[i].locked_bytes
                locked[of_role[i].name] = len(of_role[i].pieces)
    return left_bytes


POLICIES: dict[str, Callable[[Sequence[Weight], int], dict[str, int]]] = {
    "balanced": _balanced,
    "unbalanced": _unbalanced,
    "attention-first": _attention_first,
    "ffn-first": _ffn_first,
    "algorithm1": _algorithm1,
    "none": _none,
}
