"""All memory for weights and states of one model: locked rows, the window, substitutes, the cache
of experts, keys and values.

`apply` makes memory follow a plan, `rows` is the one way to a weight. A linear asks for the rows of
its weight block by block, and multiplies each: locked rows first, then those that pass through the
window, while the readers fetch what comes next. That loop is where reading and computing overlap.

    for block in store.rows(weight):     # waits for a read only where the disk is behind
        y[block.rows] = kernel(x, block) # meanwhile readers fill the next slots

Locked memory is filled by the first pass as it comes to each weight (flexinfer.streaming.locked),
so that until then it is free for what a program loads besides. Not here: what is locked
(flexinfer.plan), and when a pass may run (flexinfer.engine.runner).
"""

import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

import torch

from flexinfer.kernels import Kernel
from flexinfer.memory.libraries import LibraryPages
from flexinfer.memory.process import anonymous_bytes
from flexinfer.observe.trace import Trace
from flexinfer.plan.plan import Plan
from flexinfer.plan.planner import MIN_SLOTS
from flexinfer.plan.weights import Piece, Weight
from flexinfer.streaming.expert_cache import ExpertCache
from flexinfer.streaming.kv_cache import KVReserve
from flexinfer.streaming.locked import Filler, LockedBlock, Rows
from flexinfer.streaming.prefetch import Prefetcher
from flexinfer.streaming.queue import CLOSED, ReadQueue
from flexinfer.streaming.reader import FileReader


class Substitute(Protocol):
    """Streamed rows of a weight in few bits, from which candidates are drafted."""

    rows: Rows

    @property
    def missing(self) -> Mapping[int, Piece]:
        """Pieces that have not been made yet, by their first row."""
        ...

    def add(self, piece: Piece, view: torch.Tensor) -> None:
        """A pass has the true rows of `piece` in memory."""
        ...


class SubstituteSource(Protocol):
    """Where substitutes come from."""

    def begin(self, weight: Weight, first: int) -> Substitute:
        """Memory for the substitute of the pieces of `weight` from number `first` on."""
        ...

    def complete(self, weight: Weight, substitute: Any) -> None:
        """Make or read what is missing. Raises ReadError."""
        ...

    def close(self) -> None:
        """Close files."""
        ...


@dataclass(slots=True)
class _Placement:
    """Where the rows of one weight are."""

    weight: Weight
    kernel: Kernel
    locked: list[LockedBlock] = field(default_factory=list)
    # The others, each with its place in the window's schedule.
    streamed: list[tuple[int, Piece]] = field(default_factory=list)
    substitute: Substitute | None = None

    @property
    def locked_pieces(self) -> int:
        return sum(len(block.pieces) for block in self.locked)

    def keep(self, count: int) -> None:
        """Keep the first `count` locked pieces; return the memory of the others to the system."""
        kept = []
        for block in self.locked:
            if count <= 0:
                break
            if (have := len(block.pieces)) > count:
                block.keep(count)
            kept.append(block)
            count -= have
        self.locked = kept


class WeightStore:
    """The only owner of memory for weights and states. Usable from several threads, one at a time:
    `lock`.

    Memory follows `plan` from the first use on; a smaller plan that is proposed during a pass, from
    the next weight on; a larger one from its end on.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        kernels: Mapping[str, Kernel],
        plan: Plan,
        reader: FileReader,
        kv: KVReserve,
        libraries: LibraryPages,
        trace: Trace,
        *,
        cache: ExpertCache | None = None,
        substitutes: SubstituteSource | None = None,
        io_threads: int = 2,
        read_ahead: bool = True,
    ) -> None:
        self.lock = threading.RLock()
        self.plan, self.reader, self.kv, self.cache = plan, reader, kv, cache
        self.closed = self.in_pass = self.drafting = False
        # Whether memory follows a plan: from the first use on.
        self.applied = False
        # Anonymous memory between passes, as planned; what the process has beyond it has grown
        # elsewhere.
        self.idle_bytes = 0
        self._pending: Plan | None = plan
        self._placements = {w.name: _Placement(w, kernels[w.name]) for w in weights}
        self.libraries = libraries
        self._substitutes, self._trace = substitutes, trace
        self._io_threads, self._read_ahead = io_threads, read_ahead
        self.queue: ReadQueue | None = None
        self._prefetcher: Prefetcher | None = None
        self._filler: Filler | None = None

    # ---- what modules call

    def rows(self, weight: Weight) -> Generator[Rows, None, None]:
        """The rows of `weight`, block by block in their order. A block may be used until the next
        is asked for.

        The caller holds `lock`, and closes the iterator. While candidates are drafted, rows that
        are not locked come from their substitute. Raises ReadError, and RuntimeError once the model
        is closed.
        """
        self.before_use()
        placement = self._placements[weight.name]
        for block in placement.locked:
            if not block.filled:
                assert self._filler is not None
                self._filler.wait_for(block)
            yield block.rows()
        if not placement.streamed:
            return
        if self.drafting and placement.substitute is not None:
            yield placement.substitute.rows
            return
        assert self._prefetcher is not None
        for place, piece in placement.streamed:
            with self._prefetcher.next(place) as (buffer, position):
                count = piece.row_stop - piece.row_start
                view = placement.kernel.view(buffer, position, count)
                if placement.substitute is not None:
                    placement.substitute.add(piece, view)
                yield Rows(piece.row_start, count, count, piece.nbytes, view, placement.kernel)

    def locked_rows(self, weight: Weight) -> Rows | None:
        """All rows of `weight`, where they are in memory as one block."""
        placement = self._placements[weight.name]
        if placement.streamed or len(placement.locked) != 1 or not placement.locked[0].filled:
            return None
        return placement.locked[0].rows()

    def locked_bytes(self, weight: Weight) -> int:
        """Bytes of `weight` that are locked, in the file."""
        return sum(block.nbytes for block in self._placements[weight.name].locked)

    def before_use(self) -> None:
        """See that memory is as it should be before a weight is used: filled by the first use, and
        given back at once where a smaller plan is pending. The caller holds `lock`.
        """
        if self.closed:
            raise RuntimeError(CLOSED)
        pending = self._pending
        if pending is None or self.drafting:
            return
        if not self.applied or pending.held_bytes < self.plan.held_bytes:
            self.apply(pending)

    # ---- what the runner calls

    def propose(self, plan: Plan) -> None:
        """Have memory follow `plan`: now, or where a pass is running, as soon as it may."""
        if not self.lock.acquire(blocking=False):
            # A pass of another thread applies it.
            self._pending = plan
            if not self.lock.acquire(blocking=False):
                return
            self._pending = None
        try:
            if self.in_pass or not self.applied:
                self._pending = plan
                self.plan = self.plan if self.applied else plan
            else:
                self.apply(plan)
        finally:
            self.lock.release()

    @property
    def proposed_plan(self) -> Plan:
        """The plan that memory follows, or will."""
        return self._pending or self.plan

    @contextmanager
    def running_pass(self) -> Iterator[None]:
        """A pass runs in this block; a plan that was proposed meanwhile is applied at its end."""
        self.in_pass = True
        try:
            yield
        finally:
            self.in_pass = False
            if self._pending is not None and not (self.closed or self.drafting):
                self.apply(self._pending)

    @contextmanager
    def running_drafts(self) -> Iterator[None]:
        """Passes of this block are drafts: they read no weight."""
        with self.lock:
            self._complete_substitutes()
            start_s, self.drafting = perf_counter(), True
            try:
                yield
            finally:
                self.drafting = False
                self._trace.draft_s += perf_counter() - start_s

    def apply(self, plan: Plan) -> None:
        """Make memory follow `plan`: give back first, so that no more than the larger budget is
        ever in use.

        What is new in it is read by the readers; the next pass waits for each weight as it comes to
        it.
        """
        with self.lock:
            self._pending = None
            self._stop_readers()
            count_of = {name: plan.locked_pieces.get(name, 0) for name in self._placements}
            for name, placement in self._placements.items():
                if placement.locked_pieces != count_of[name] or not plan.substitute_bytes:
                    placement.substitute = None
                placement.keep(count_of[name])
            slots = plan.experts.slots if plan.experts is not None else 0
            if self.cache is not None and slots < self.cache.slots:
                self.cache.resize(slots)
            self.kv.allocate()
            for placement in self._placements.values():
                have, pieces = placement.locked_pieces, placement.weight.pieces
                if have < count_of[placement.weight.name]:
                    new = pieces[have : count_of[placement.weight.name]]
                    placement.locked.append(LockedBlock(new, placement.kernel))
            try:
                self._begin_substitutes(plan)
                if self.cache is not None and not self.closed:
                    self.cache.resize(slots)
            finally:
                self._start_readers(plan)
            if self.closed:
                raise RuntimeError(CLOSED)
            self._note(plan)

    def held_bytes(self) -> int:
        """Anonymous memory of this process, with what is yet to be taken for weights that stay."""
        if self.queue is None:
            return anonymous_bytes()
        # No reader takes memory while the lock is held.
        with self.queue.changed:
            blocks = (block for p in self._placements.values() for block in p.locked)
            return anonymous_bytes() + sum(block.missing_bytes for block in blocks)

    def closes_here(self) -> bool:
        """Whether this thread may call `close` now."""
        return self.queue is None or self.queue.closes_here()

    def close(self) -> None:
        """End the threads, close the files, free the memory.

        A pass of another thread ends at its next weight. Safe to call twice.
        """
        self.closed = True
        self._stop_readers()
        with self.lock:
            # What that pass may have started meanwhile.
            self._stop_readers()
            for placement in self._placements.values():
                placement.locked, placement.streamed, placement.substitute = [], [], None
            if self._substitutes is not None:
                self._substitutes.close()
            self.cache = None
            self.kv.close()
            self.reader.close()
            self.libraries.unlock()

    # ---- parts of apply

    def _stop_readers(self) -> None:
        queue, self.queue = self.queue, None
        if queue is not None:
            queue.close()
            self._prefetcher = self._filler = None
            if self.cache is not None:
                self.cache.detach()

    def _start_readers(self, plan: Plan) -> None:
        """A window for all that is not locked, and threads for it, for blocks that are to be
        filled, and for the cache of experts.

        They are served in that order, hinted experts last.
        """
        schedule: list[Piece] = []
        for placement in self._placements.values():
            pieces = placement.weight.pieces[placement.locked_pieces :]
            placement.streamed = list(enumerate(pieces, len(schedule)))
            schedule.extend(pieces)
        blocks = [
            block for p in self._placements.values() for block in p.locked if not block.filled
        ]
        if self.closed or not (schedule or blocks or self.cache is not None):
            return
        self.queue = queue = ReadQueue(self.reader, self._trace, io_threads=self._io_threads)
        if self.cache is not None:
            queue.serve(self.cache.take)
        if schedule:
            self._prefetcher = Prefetcher(
                schedule,
                queue,
                slots=max(plan.slots, MIN_SLOTS),
                slot_bytes=max(plan.slot_bytes, *(piece.memory_bytes for piece in schedule)),
                window_layers=plan.window_layers,
                ahead=self._read_ahead,
            )
            queue.serve(self._prefetcher.take)
        if blocks:
            self._filler = Filler(blocks, queue)
            queue.serve(self._filler.take)
        if self.cache is not None:
            queue.serve(self.cache.take_hinted)
            self.cache.attach(queue)

    def _note(self, plan: Plan) -> None:
        """Memory follows `plan` now."""
        before, self.plan = self.plan, plan
        self._trace.set_memory(
            plan.budget_bytes, plan.locked_bytes, plan.window_bytes, plan.total_bytes
        )
        if self.in_pass and self.applied:
            # Activations are in memory too: the process cannot be measured now.
            self.idle_bytes += plan.held_bytes - before.held_bytes
        else:
            self.idle_bytes = self.held_bytes()
        self.applied = True

    def _begin_substitutes(self, plan: Plan) -> None:
        """Memory for the substitutes of what is streamed."""
        if self._substitutes is None or not plan.substitute_bytes:
            return
        for placement in self._placements.values():
            first, weight = placement.locked_pieces, placement.weight
            if first < len(weight.pieces) and placement.substitute is None:
                placement.substitute = self._substitutes.begin(weight, first)

    def _complete_substitutes(self) -> None:
        """Have a substitute of all rows that are not locked: of those that no pass has made, and
        from a file. Raises ReadError.
        """
        source, missing = (
            self._substitutes,
            [p for p in self._placements.values() if p.substitute and p.substitute.missing],
        )
        if source is None or not missing:
            return

        def complete(placement: _Placement) -> None:
            if not self.closed and placement.substitute is not None:
                source.complete(placement.weight, placement.substitute)

        done_bytes, all_bytes = 0, sum(placement.weight.nbytes for placement in missing)
        with ThreadPoolExecutor(max(1, self._io_threads)) as pool:
            for placement, _ in zip(missing, pool.map(complete, missing), strict=True):
                done_bytes += placement.weight.nbytes
                if self._trace.progress is not None:
                    self._trace.progress("draft", done_bytes, all_bytes)
