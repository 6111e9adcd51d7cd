"""Passes over the weights: one at a time, each admitted before it runs, inside the budget.

A call that the plan has no room for is refused before anything runs. Where the process has grown
since the plan was made, locked memory is given back for it.
"""

import inspect
import os
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig

from flexinfer.memory.heap import give_back, trim_heap
from flexinfer.memory.process import anonymous_bytes
from flexinfer.model.pass_memory import PassMeter
from flexinfer.modules.results import ReusedResults
from flexinfer.observe.report import Explainer
from flexinfer.observe.trace import Trace
from flexinfer.plan.plan import PassShape, Plan
from flexinfer.plan.planner import Planner
from flexinfer.sizes import BudgetError, format_size, named_budget_bytes, parse_size, whole_mib
from flexinfer.streaming.kv_cache import tokens_in
from flexinfer.streaming.queue import CLOSED
from flexinfer.streaming.store import WeightStore

# A process that grows by less is left alone: the margin is for it.
GROWTH_BYTES = 6 << 20
# Positions of a prompt, from which its results reuse memory.
MANY_ROWS = 128


class Text(threading.local):
    """What a thread's passes have in common while it generates one text."""

    # Of the last pass.
    cache: "weakref.ref[DynamicCache] | None" = None
    passes: int = 0


class PassRunner:
    """Runs passes of one model, and changes its budget between them.

    Args:
        planner: plans for the process as it is; replaced as the process grows.
        context: tokens that the KV cache holds, over all sequences of a batch.
        logits_to_keep: positions of a pass that there is room for the logits of.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        planner: Planner,
        store: WeightStore,
        meter: PassMeter,
        trace: Trace,
        explainer: Explainer,
        *,
        context: int,
        logits_to_keep: int,
    ) -> None:
        self.planner, self.store, self.text = planner, store, Text()
        self.context, self.logits_to_keep = context, logits_to_keep
        self._config, self.meter = config, meter
        self._trace, self._explainer = trace, explainer
        self._pid = os.getpid()
        self._loaded_bytes = anonymous_bytes()

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One pass: `forward` of the transformers model. Threads wait for one another.

        Raises BudgetError, before anything runs, when the plan has no room for the call.
        """
        # Before the lock, which another thread may have held at the fork.
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"this model was loaded in another process ({self._pid}), whose reader threads are "
                "not in this one; load it again here"
            )
        store = self.store
        with store.lock:
            if store.closed:
                raise RuntimeError(CLOSED)
            # A hook of the program's own that calls the model again.
            if store.in_pass:
                return forward(*args, **kwargs)
            if not store.applied:
                self._plan_first_fill()
            given = inspect.signature(forward).bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            ids = (
                given.get("input_ids")
                if given.get("input_ids") is not None
                else given.get("inputs_embeds")
            )
            if ids is None:
                return self._run(forward, 0, *args, **kwargs)
            kwargs |= self._admit(forward, ids, given)
            return self._run(forward, ids.shape[0] * ids.shape[1], *args, **kwargs)

    def _run(self, forward: Callable[..., Any], rows: int, *args: Any, **kwargs: Any) -> Any:
        """The pass itself, counted unless it is a draft."""
        drafting, trace = self.store.drafting, self._trace
        reused = (
            ReusedResults(self.store.plan.overheads.activation_bytes)
            if rows >= MANY_ROWS
            else nullcontext()
        )
        if drafting:
            with self.store.running_pass(), reused:
                trace.draft_passes += 1
                return forward(*args, **kwargs)
        with self.store.running_pass(), trace.one_pass(rows), reused:
            try:
                return forward(*args, **kwargs)
            finally:
                self.text.passes += 1

    def resize(self, memory: str | int) -> Plan:
        """Change the budget, from any thread. Returns the new plan.

        While a pass is running, in this thread or another, memory is given back before its next
        weight is used and taken at its end. Raises BudgetError, and leaves all as it is, when
        `memory` is too small.
        """
        if self.store.closed:
            raise RuntimeError(CLOSED)
        plan = self.planner.plan(parse_size(memory))
        self.store.propose(plan)
        return plan

    def replan(self, planner: Planner) -> None:
        """Plan the present budget by `planner` from now on."""
        self.store.apply(planner.plan(self.store.plan.budget_bytes))
        self.planner = planner

    def planned_bytes(self, shape: PassShape) -> int:
        """What this process holds by plan while a pass of `shape` runs, without the margin.

        Reads and computes nothing.
        """
        plan = self.store.plan
        without = plan.overheads.activation_bytes + plan.overheads.margin_bytes + plan.unused_bytes
        return plan.budget_bytes - without + self.meter.extra_bytes(shape, self.context)

    def longest_text(
        self, rows: int, cache: object | None, own_memory: bool, uses_cache: bool, tokens: int
    ) -> int:
        """How many tokens of each of `rows` sequences passes have room for, up to `tokens`.

        Args:
            cache: the one that holds the text so far, if the program brought one.
            own_memory: it will not be in the memory reserved for it.
        """
        kv = self.store.kv
        if uses_cache and not own_memory and kv.layers:
            room = kv.room(cache, rows)
            if room is not None:
                return min(tokens, room)
        if not uses_cache and rows * tokens <= self.context:
            return tokens

        def too_long(tokens: int) -> bool:
            last = (1, tokens - 1) if uses_cache else (tokens, 0)
            shape = PassShape(rows, *last, cached=not uses_cache)
            if self.meter.extra_bytes(shape, self.context) > self._room_bytes():
                return True
            kept_bytes = kv.stock_bytes(rows * tokens) if uses_cache else 0
            return self.planner.smallest_bytes + kept_bytes > self.store.plan.budget_bytes

        if tokens < 1 or not too_long(tokens):
            return tokens
        return bisect_left(range(1, tokens), True, key=too_long)

    def _room_bytes(self) -> int:
        """What a pass may take beyond what is in memory before it."""
        plan = self.store.plan
        return (
            plan.overheads.activation_bytes + plan.unused_bytes + plan.overheads.margin_bytes // 2
        )

    # ---- admission

    def _plan_first_fill(self) -> None:
        """Plan again with what the process holds by now: memory is about to be filled."""
        trim_heap()
        grown_bytes, overheads = anonymous_bytes() - self._loaded_bytes, self.planner.overheads
        # What the tokenizer grows by when it is used is planned for.
        used_bytes = min(max(0, grown_bytes), overheads.tokenizer_bytes)
        overheads = replace(
            overheads,
            process_bytes=overheads.process_bytes + used_bytes,
            tokenizer_bytes=overheads.tokenizer_bytes - used_bytes,
        )
        grown_bytes -= used_bytes
        planner, budget_bytes = (
            replace(self.planner, overheads=overheads),
            self.store.proposed_plan.budget_bytes,
        )
        self.planner, plan = planner.grown(
            grown_bytes if grown_bytes > GROWTH_BYTES else 0, budget_bytes
        )
        self.store.apply(plan)

    def _admit(
        self, forward: Callable[..., Any], ids: torch.Tensor, given: dict[str, Any]
    ) -> dict[str, Any]:
        """See that the pass has room, and that its keys and values go into the memory reserved for
        them. Returns arguments to add.
        """
        added: dict[str, Any] = {}
        # "past_key_values" was its name before transformers 5.24.
        passed = cache = given.get("cache", given.get("past_key_values"))
        uses_cache = given.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self._config, "use_cache", True)
        kv = self.store.kv
        if uses_cache:
            kv.check(cache, ids.shape[0], ids.shape[1])
        # A graph needs keys and values that nothing overwrites.
        parameters = forward.__self__.parameters()  # type: ignore[attr-defined]
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
        if cache is None and uses_cache and kv.layers:
            config = self._config.get_text_config(decoder=True)
            added["cache"] = cache = (
                DynamicCache(config=config) if trained else kv.new_cache(config)
            )
        elif isinstance(cache, DynamicCache) and not trained:
            kv.adopt(cache)
        if isinstance(cache, DynamicCache):
            self.text.cache = weakref.ref(cache)
        past_tokens = 0 if cache is None else tokens_in(cache)
        if passed is not None and not past_tokens:
            self._explainer.explain_last_text()
        kept = given.get("logits_to_keep", 0)
        # Candidates and one.
        if isinstance(kept, int) and kept > 1 and ids.shape[0] == 1:
            self._trace.drafted += kept - 1
        shape = PassShape(
            batch=ids.shape[0],
            new_tokens=ids.shape[1],
            past_tokens=past_tokens,
            kept=len(kept) if isinstance(kept, torch.Tensor) else kept,
            cached=not uses_cache or kv.holds(cache),
        )
        self._find_room(shape, "logits_to_keep" in inspect.signature(forward).parameters)
        return added

    def _find_room(self, shape: PassShape, can_keep_fewer: bool) -> None:
        """Raise BudgetError when the plan has no room for a pass of `shape`; give locked memory
        back where the process has grown.
        """
        store = self.store
        planned = (
            shape.cached
            and shape.total_tokens <= self.context
            and shape.batch * shape.kept_tokens <= self.logits_to_keep
        )
        grown_bytes = store.held_bytes() - store.idle_bytes
        if planned and grown_bytes <= GROWTH_BYTES:
            return
        needed_bytes = self.meter.extra_bytes(shape, self.context)
        room_bytes = self._room_bytes()
        if needed_bytes + grown_bytes <= room_bytes:
            return
        if needed_bytes > room_bytes:
            raise BudgetError(self._too_large(shape, needed_bytes, room_bytes, can_keep_fewer))
        give_back()
        grown_bytes = store.held_bytes() - store.idle_bytes
        if needed_bytes + grown_bytes > room_bytes:
            self._give_back(grown_bytes)

    def _give_back(self, grown_bytes: int) -> None:
        """Lock less, as the process has grown by `grown_bytes` since the plan was made."""
        before = self.store.plan
        planner, plan = self.planner.grown(grown_bytes, before.budget_bytes)
        warnings.warn(
            f"the process has grown by {format_size(grown_bytes)} since the model was loaded; to "
            f"stay within memory={format_size(plan.budget_bytes)} "
            f"{format_size(plan.streamed_bytes - before.streamed_bytes)} more are read for each "
            "pass",
            RuntimeWarning,
            stacklevel=2,
        )
        self.planner = planner
        self.store.apply(plan)

    def _too_large(
        self, shape: PassShape, needed_bytes: int, room_bytes: int, can_keep_fewer: bool
    ) -> str:
        """What a call needs and what would make it fit."""
        kept, budget_bytes = shape.batch * shape.kept_tokens, self.store.plan.budget_bytes
        larger_bytes = budget_bytes + needed_bytes - room_bytes
        remedies = []
        if kept > 1 and can_keep_fewer:
            remedies.append("keep fewer logits with logits_to_keep=1 (score a long text in parts)")
        if shape.batch > 1:
            remedies.append("a smaller batch")
        if shape.new_tokens > 1:
            remedies.append("fewer tokens at a time")
        if not shape.cached:
            remedies.append(
                "delete the KV cache of an earlier call (this one gets its own in addition), or "
                "pass use_cache=False"
            )
        remedies.append(
            "plan for it: flexinfer.from_pretrained(..., "
            f"memory={whole_mib(named_budget_bytes(larger_bytes))!r}, "
            f"context={max(self.context, shape.total_tokens)}, "
            f"logits_to_keep={max(kept, self.logits_to_keep)})"
        )
        return (
            f"a pass of {shape.batch} x {shape.new_tokens} new tokens after {shape.past_tokens}, "
            f"with logits of {kept} positions, takes {format_size(needed_bytes)} and "
            f"memory={format_size(budget_bytes)} leaves {format_size(room_bytes)} for it "
            f"(context={self.context}, logits_to_keep={self.logits_to_keep}); nothing was run. "
            "What would make it fit: " + "; or ".join(remedies)
        )
