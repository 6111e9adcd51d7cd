"""Divides a memory budget between overheads, the window, locked pieces, substitutes and a cache of
experts. Pure: no files, no clock.

A plan locks the first k pieces of each weight; the rest of the weight is streamed through the
window, in order of use. How many pieces are locked of which weight is the policy's to say: balanced
locking (flexinfer.plan.locking), or the paper's other ways to preserve tensors
(flexinfer.plan.preservation).

Experts of a mixture (flexinfer.plan.experts) get what dense weights leave: all of those are locked
first. Where the budget does not hold them, the experts pass through a cache no larger than the
window.

With a draft by a substitute (flexinfer.draft.substitute) every piece is in memory: locked, or in a
few bits. The policies then divide what is left once all pieces have a substitute; a locked piece
costs what it takes beyond its substitute.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexinfer.plan.experts import ExpertPlan, Mixture, expert_plan
from flexinfer.plan.plan import Costs, DraftPlan, Overheads, Plan
from flexinfer.plan.preservation import POLICIES
from flexinfer.plan.weights import Weight
from flexinfer.sizes import BudgetError, format_size, name_budget, parse_size

# Four pieces: one computed on, two being read, one ready.
DEFAULT_WINDOW_BYTES = 20 << 20
# One computed on, one filled.
MIN_SLOTS = 2
# The kernel takes a page of tables for so much memory, huge pages or not, and counts it with the
# process.
TABLE_BYTES, MAPPED_BYTES = 4096, 2 << 20
NOT_MEASURED = Costs(bandwidth_bytes_per_s=1.0, compute_s=1.0)

# Memory of the substitute of each piece, by the name of its weight.
Substitutes = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Division:
    """Who gets the memory that overheads leave."""

    slots: int
    locked: dict[str, int]
    cache_slots: int


@dataclass(frozen=True, slots=True)
class Planner:
    """All that a plan of one model depends on, except the budget."""

    # The dense weights, in order of use.
    weights: Sequence[Weight]
    overheads: Overheads
    costs: Costs = NOT_MEASURED
    policy: str = "balanced"
    window: str | int | None = None
    mixture: Mixture | None = None
    substitutes: Substitutes | None = None
    # What cannot be streamed, and why: a refusal begins with it.
    not_streamable: str = ""
    # What a draft gives in addition to a plan.
    draft: Callable[[Plan], DraftPlan | None] | None = None

    def plan(self, budget_bytes: int) -> Plan:
        """The plan for a budget.

        Raises:
            BudgetError: the budget cannot hold the overheads and the smallest window and cache.
            ValueError: there is no policy of that name.
        """
        if self.policy not in POLICIES:
            raise ValueError(
                f"policy={self.policy!r} does not exist; there are {', '.join(sorted(POLICIES))}"
            )
        tables_bytes = page_table_bytes(budget_bytes - self.overheads.nbytes)
        overheads = replace(
            self.overheads, process_bytes=self.overheads.process_bytes + tables_bytes
        )
        spare_bytes = budget_bytes - overheads.nbytes
        division = self._all_locked(spare_bytes) if budget_bytes >= self._loading_bytes else None
        if division is None:
            if budget_bytes < self.smallest_bytes:
                raise BudgetError(self._too_little(budget_bytes, overheads))
            division = self._streamed(spare_bytes)
        plan = self._described(budget_bytes, overheads, spare_bytes, division)
        return plan if self.draft is None else replace(plan, draft=self.draft(plan))

    @property
    def smallest_bytes(self) -> int:
        """The least budget in which the model runs: overheads, the smallest window and cache, and
        all substitutes.
        """
        cache_bytes = self.mixture.slots().slot_bytes if self.mixture is not None else 0
        held_bytes = MIN_SLOTS * (self._slot_bytes + cache_bytes) + self._substitute_bytes
        return max(self.overheads.nbytes + with_page_tables(held_bytes), self._loading_bytes)

    def grown(self, nbytes: int, budget_bytes: int) -> tuple["Planner", Plan]:
        """The planner of a process that is larger by `nbytes`, and its plan: with less locked, or,
        where nothing is left to give back, with less margin, which is for what cannot be known.
        Raises BudgetError past that.
        """
        overheads = replace(self.overheads, process_bytes=self.overheads.process_bytes + nbytes)
        grown = replace(self, overheads=overheads)
        try:
            return grown, grown.plan(budget_bytes)
        except BudgetError:
            if nbytes > overheads.margin_bytes:
                raise
            less_margin = replace(overheads, margin_bytes=overheads.margin_bytes - nbytes)
            grown = replace(self, overheads=less_margin)
            return grown, grown.plan(budget_bytes)

    @property
    def _loading_bytes(self) -> int:
        """What the process holds at most while the tokenizer, the first thing, is loaded."""
        overheads = self.overheads
        return (
            overheads.process_bytes
            + with_page_tables(overheads.loading_bytes)
            + overheads.margin_bytes
        )

    # ---- dividing

    def _all_locked(self, spare_bytes: int) -> _Division | None:
        """Every dense weight locked, and the cache of experts as large as the rest allows; None
        where they do not fit.
        """
        cache_slots, cache_bytes = self._small_cache(spare_bytes)
        to_lock_bytes = sum(weight.lock_cost_bytes for weight in self.weights)
        left_bytes = spare_bytes - cache_slots * cache_bytes - to_lock_bytes
        if left_bytes < 0 or (
            self.policy == "none" and any(weight.pieces for weight in self.weights)
        ):
            return None
        if self.mixture is not None:
            cache_slots += min(
                self.mixture.slots().all_slots - cache_slots, left_bytes // cache_bytes
            )
        return _Division(
            0, {weight.name: len(weight.pieces) for weight in self.weights}, cache_slots
        )

    def _streamed(self, spare_bytes: int) -> _Division:
        """What the window, the smallest cache and the substitutes leave, locked by the policy."""
        cache_slots, cache_bytes = self._small_cache(spare_bytes)
        lock_bytes = spare_bytes - cache_slots * cache_bytes - self._substitute_bytes
        slots = self._window_slots(lock_bytes)
        to_lock = self.weights
        if self.substitutes is not None:
            to_lock = _beyond_substitutes(self.weights, self.substitutes)
        locked = POLICIES[self.policy](to_lock, lock_bytes - slots * self._slot_bytes)
        return _Division(slots, locked, cache_slots)

    def _small_cache(self, spare_bytes: int) -> tuple[int, int]:
        """Slots of the cache before dense weights have had their part, as large as a window; and
        the bytes of one.
        """
        if self.mixture is None:
            return 0, 0
        cache, most_bytes = self.mixture.slots(), spare_bytes - MIN_SLOTS * self._slot_bytes
        window_bytes = parse_window(self.window)[0] or DEFAULT_WINDOW_BYTES
        wanted = min(window_bytes, most_bytes) // cache.slot_bytes
        return min(cache.all_slots, max(MIN_SLOTS, wanted)), cache.slot_bytes

    def _window_slots(self, spare_bytes: int) -> int:
        """How many slots the window has: as configured, at least MIN_SLOTS, at most what the budget
        holds.
        """
        window_bytes, window_layers = parse_window(self.window)
        if window_layers is None:
            assert window_bytes is not None
            wanted = window_bytes // self._slot_bytes
        else:
            count_of: dict[int, int] = {}
            for weight in self.weights:
                count_of[weight.layer] = count_of.get(weight.layer, 0) + len(weight.pieces)
            counts = list(count_of.values())
            wanted = max(sum((counts + counts)[i : i + window_layers]) for i in range(len(counts)))
        return max(MIN_SLOTS, min(wanted, spare_bytes // self._slot_bytes))

    @property
    def _slot_bytes(self) -> int:
        return max(
            (piece.memory_bytes for weight in self.weights for piece in weight.pieces), default=0
        )

    @property
    def _substitute_bytes(self) -> int:
        return sum(sum(pieces) for pieces in (self.substitutes or {}).values())

    # ---- describing

    def _described(
        self, budget_bytes: int, overheads: Overheads, spare_bytes: int, division: _Division
    ) -> Plan:
        """The plan of a division: bytes of each part, and the speeds to expect."""
        locked, experts = division.locked, self._expert_plan(division.cache_slots)
        substitute_bytes = 0
        if self.substitutes is not None:
            substitute_bytes = sum(
                sum(self.substitutes[w.name][locked.get(w.name, 0) :]) for w in self.weights
            )
        streamed = [piece for w in self.weights for piece in w.pieces[locked.get(w.name, 0) :]]
        locked_memory = sum(
            p.lock_cost_bytes for w in self.weights for p in w.pieces[: locked.get(w.name, 0)]
        )
        dense_bytes = sum(weight.nbytes for weight in self.weights)
        streamed_bytes = sum(piece.nbytes for piece in streamed)
        slots = division.slots if streamed else 0
        missed_bytes = experts.missed_bytes if experts is not None else 0
        cache_bytes = experts.cache_bytes if experts is not None else 0
        read_bytes = sum(piece.memory_bytes for piece in streamed) + missed_bytes
        at_best_bytes = self._at_best_bytes(budget_bytes, overheads, dense_bytes, experts)
        return Plan(
            budget_bytes=budget_bytes,
            overheads=overheads,
            policy=self.policy,
            window_layers=parse_window(self.window)[1],
            slots=slots,
            slot_bytes=self._slot_bytes,
            locked_pieces=locked,
            locked_bytes=dense_bytes - streamed_bytes,
            locked_memory_bytes=locked_memory,
            streamed_bytes=streamed_bytes + missed_bytes,
            total_bytes=dense_bytes + (experts.token_bytes if experts is not None else 0),
            unused_bytes=spare_bytes
            - cache_bytes
            - locked_memory
            - substitute_bytes
            - slots * self._slot_bytes,
            costs=self.costs,
            bound_tokens_per_s=self._passes_per_s(at_best_bytes),
            predicted_tokens_per_s=self._passes_per_s(read_bytes),
            experts=experts,
            substitute_bytes=substitute_bytes,
        )

    def _expert_plan(self, cache_slots: int) -> ExpertPlan | None:
        if self.mixture is None:
            return None
        return expert_plan(self.mixture, self.mixture.slots(), cache_slots)

    def _at_best_bytes(
        self, budget_bytes: int, overheads: Overheads, dense_bytes: int, experts: ExpertPlan | None
    ) -> int:
        """What a pass has to read if all of the budget beyond the process and its KV cache keeps
        weights.
        """
        needed_bytes = overheads.process_bytes + overheads.tokenizer_bytes + overheads.kv_bytes
        missing_bytes = dense_bytes - max(0, budget_bytes - needed_bytes)
        if experts is None:
            return max(0, missing_bytes)
        # Less than nothing missing is room for experts.
        kept = min(1.0, max(0, -missing_bytes) / experts.total_bytes)
        return max(0, missing_bytes) + int(experts.token_bytes * (1 - kept))

    def _passes_per_s(self, read_bytes: int) -> float:
        seconds = max(self.costs.compute_s, read_bytes / self.costs.bandwidth_bytes_per_s)
        return 1 / seconds if seconds else math.inf

    def _too_little(self, budget_bytes: int, overheads: Overheads) -> str:
        """What a budget is needed for."""
        others = ""
        if self.mixture is not None:
            others = f", experts {format_size(MIN_SLOTS * self.mixture.slots().slot_bytes)}"
        if draft_bytes := self._substitute_bytes + overheads.draft_bytes:
            others += f", draft {format_size(draft_bytes)}"
        reason = f"{self.not_streamable}; " if self.not_streamable else ""
        loading = (
            f" ({format_size(overheads.loading_bytes)} while it is loaded)"
            if overheads.loading_bytes
            else ""
        )
        return (
            f"{reason}memory={format_size(budget_bytes)} is too little for this model: it needs at "
            f"least {name_budget(self.smallest_bytes)}: process "
            f"{format_size(overheads.process_bytes)}, tokenizer "
            f"{format_size(overheads.tokenizer_bytes)}{loading}, parameters that stay "
            f"{format_size(overheads.unstreamed_bytes)}, KV cache "
            f"{format_size(overheads.kv_bytes + overheads.attention_bytes)}, activations "
            f"{format_size(overheads.activation_bytes)}, margin "
            f"{format_size(overheads.margin_bytes)}, window "
            f"{format_size(MIN_SLOTS * self._slot_bytes)}{others}. A smaller context makes the KV "
            "cache and activations smaller."
        )


def parse_window(window: str | int | None) -> tuple[int | None, int | None]:
    """`window` as (bytes, layers), one of them None: None, bytes, "64MiB", or "3 layers" (the
    paper's unit).

    Raises BudgetError on anything else.
    """
    if window is None:
        return DEFAULT_WINDOW_BYTES, None
    words = window.split() if isinstance(window, str) else []
    if len(words) == 2 and words[1] in {"layer", "layers"}:
        if not words[0].isdigit() or int(words[0]) < 1:
            raise BudgetError(
                f"window={window!r}: the number of layers must be a whole number from 1"
            )
        return None, int(words[0])
    return parse_size(window, "window"), None


def page_table_bytes(nbytes: int) -> int:
    """What the kernel takes for the tables of so much memory."""
    return max(0, nbytes) // MAPPED_BYTES * TABLE_BYTES


def with_page_tables(nbytes: int) -> int:
    """The least memory that holds `nbytes` and the tables for all of it."""
    total_bytes = nbytes + page_table_bytes(nbytes)
    while total_bytes - page_table_bytes(total_bytes) < nbytes:
        total_bytes += TABLE_BYTES
    return total_bytes


def _beyond_substitutes(weights: Sequence[Weight], substitutes: Substitutes) -> list[Weight]:
    """The weights, each piece counted by what it takes locked beyond its substitute."""
    return [
        replace(
            weight,
            pieces=tuple(
                replace(piece, lock_cost_bytes=max(0, piece.lock_cost_bytes - nbytes))
                for piece, nbytes in zip(weight.pieces, substitutes[weight.name], strict=True)
            ),
        )
        for weight in weights
    ]
