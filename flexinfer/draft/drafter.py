"""Drafts for the texts of one model: chooses what drafts, hands it to `generate()`, and follows
what comes of it.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flexinfer.draft.drafts import Drafts, Option
from flexinfer.draft.economics import (
    DEFAULT_TYPE,
    DraftCosts,
    Pace,
    acceptance_of,
    plan_draft,
    rough_costs,
)
from flexinfer.draft.substitute import (
    DraftError,
    SubstituteFile,
    SubstituteMaker,
    substitute_bytes,
    substitute_kernels,
)
from flexinfer.kernels import Kernel
from flexinfer.model.skeleton import Skeleton
from flexinfer.observe.trace import Trace
from flexinfer.plan.plan import DraftPlan, Plan
from flexinfer.plan.planner import Planner, Substitutes
from flexinfer.sizes import BudgetError, format_size
from flexinfer.streaming.reader import FileReader
from flexinfer.streaming.store import SubstituteSource

# As fast as people read; no hint about drafts above it.
READING_TOKENS_PER_S = 6.0
# Passes before a draft is judged, and how many times as fast it must be without.
ENOUGH_PASSES, BETTER = 12, 1.1
# What may be quantised again each time memory is filled takes at most so many passes.
MAKING_PASSES = 2

logger = logging.getLogger("flexinfer")


def draft_options(
    drafts: Drafts,
    drafted: Planner,
    undrafted: Planner,
    budget_bytes: int,
    measure: Callable[[], DraftCosts],
) -> list[Option]:
    """The draft that was asked for, or with "auto" all that the budget has room for, no draft among
    them.

    Args:
        drafted: plans with the overheads of a draft.
        undrafted: plans without.
        measure: costs with the kernels of `drafts.type`.

    Raises:
        BudgetError: there is no room for the one that was asked for.
    """

    def plan_with(substitutes: Substitutes | None) -> Plan:
        planner = undrafted if drafts.kind is None else replace(drafted, substitutes=substitutes)
        return planner.plan(budget_bytes)

    return drafts.options(plan_with, drafted.costs, measure)


def choose_draft(
    drafts: Drafts,
    drafted: Planner,
    undrafted: Planner,
    budget_bytes: int,
    measure: Callable[[], DraftCosts],
) -> tuple[Planner, DraftCosts]:
    """Of `draft_options` the one of most tokens per second: sets `drafts.kind` and `type`.

    Returns its planner, and what it costs.
    """
    found = draft_options(drafts, drafted, undrafted, budget_bytes, measure)
    best = max(found, key=lambda option: option.tokens_per_s)
    drafts.kind, drafts.type = best.kind, best.type
    if drafts.auto:
        speeds = ", ".join(
            f"{one.kind or 'none'} {one.type} {one.tokens_per_s:.3g}" for one in found
        )
        logger.info("draft %s: tokens/s expected: %s", best.kind or "none", speeds)
    if best.kind is None:
        return undrafted, best.costs
    return replace(
        drafted, substitutes=drafts.substitutes if best.kind == "substitute" else None
    ), best.costs


def substitute_source(
    drafts: Drafts,
    skeleton: Skeleton,
    planner: Planner,
    reader: FileReader,
    trace: Trace,
    *,
    direct: bool,
) -> SubstituteSource:
    """Where substitutes come from; makes their file, where there is to be one."""
    weights, kernels = skeleton.weights, skeleton.kernels
    maker = SubstituteMaker(kernels, drafts.kernels, reader)
    file = SubstituteFile(weights, drafts.kernels, drafts.type, drafts.choice.folder)
    if not file.exists and drafts.choice.folder is None:
        numbers = sum(w.pieces[-1].row_stop * kernels[w.name].in_features for w in weights)
        pass_s = sum(w.nbytes for w in weights) / planner.costs.bandwidth_bytes_per_s
        largest = max(weights, key=lambda weight: weight.nbytes)
        if numbers * maker.seconds_per_number(largest) <= MAKING_PASSES * pass_s:
            return maker
    if not file.exists:
        where, size = file.path.parent, format_size(file.nbytes)
        logger.warning(
            "making the draft's substitute (%s), once: %s in %s", drafts.type, size, where
        )
    file.make(maker, trace.progress)
    file.open(direct=direct)
    return file


class Drafter:
    """Hands the draft to `generate()`, and drops one that does not pay."""

    def __init__(self, drafts: Drafts, costs: DraftCosts, trace: Trace) -> None:
        self.drafts, self._costs, self._trace = drafts, costs, trace
        self.pace: Pace | None = None

    def planned(self, plan: Plan) -> DraftPlan | None:
        """What the draft adds to `plan`; None where "auto" has found that none pays."""
        if self.drafts.kind is None:
            return None
        acceptance = self.pace.acceptance if self.pace is not None else None
        return self.drafts.planned(plan, plan.costs, self._costs, acceptance)

    def generate(
        self,
        runner: Any,
        model: PreTrainedModel,
        generate: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate` with the draft handed in, where it can be: one text, no beams, a
        cache, and no other draft.
        """
        plan = runner.store.plan.draft
        if plan is None or not self.drafts.serves(model, args, kwargs):
            return generate(*args, **kwargs)
        if self.pace is None:
            fixed = self.drafts.choice.candidates is not None
            self.pace = Pace(plan, self.drafts.most, self._costs.pass_s, fixed)

        def cache_of_text() -> DynamicCache | None:
            return runner.text.cache() if runner.text.cache is not None else None

        assistant = self.drafts.assistant(
            model, self.pace, runner.store.running_drafts, cache_of_text
        )
        runner.text.passes = 0
        output = generate(*args, **kwargs | {"assistant_model": assistant})
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        given: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self._trace.texts_tokens += sequences.shape[1] - given.shape[1]
        self._trace.texts_passes += runner.text.passes
        if self.drafts.auto and self.drafts.kind == "substitute":
            self._reconsider(runner)
        return output

    def _reconsider(self, runner: Any) -> None:
        """Let go of a substitute that does not pay by what has been seen, and lock more instead
        ("auto").
        """
        pace = self.pace
        assert pace is not None
        with runner.store.lock:
            if runner.store.closed or pace.passes < ENOUGH_PASSES:
                return
            self.drafts.kind, self.pace = "lookup", None
            without = replace(runner.planner, substitutes=None)
            plan = without.plan(runner.store.plan.budget_bytes)
            if plan.predicted_tokens_per_s <= BETTER * pace.predicted_tokens_per_s():
                self.drafts.kind, self.pace = "substitute", pace
                return
            logger.info(
                "draft: %.2f of its candidates are accepted, too few; weights are locked in its "
                "memory instead",
                pace.acceptance,
            )
            runner.replan(without)

    def stats(self, plan: Plan) -> dict[str, Any]:
        """Draft statistics of the texts that `generate()` made."""
        trace, pace, draft = self._trace, self.pace, plan.draft
        seconds = trace.pass_s + trace.draft_s
        predicted = (
            pace.predicted_tokens_per_s() if pace else draft and draft.predicted_tokens_per_s
        )
        return {
            "draft": self.drafts.kind,
            "drafted": trace.drafted,
            "accepted": trace.texts_tokens - trace.texts_passes,
            "tokens_per_pass": trace.texts_tokens / max(1, trace.texts_passes),
            "draft_passes": trace.draft_passes,
            "draft_s": trace.draft_s,
            "acceptance": pace.acceptance if pace else draft and draft.acceptance,
            "draft_predicted_tokens_per_s": predicted,
            "times_bound": trace.texts_tokens / seconds / plan.bound_tokens_per_s
            if seconds
            else 0.0,
        }


def draft_that_pays(planner: Planner, plan: Plan, kernels: dict[str, Kernel]) -> DraftPlan | None:
    """The draft that would give at least half as many tokens per second again, by a cautious
    estimate, for a model without one.

    None where none would, or where passes are as fast as people read.
    """
    fast = plan.predicted_tokens_per_s > READING_TOKENS_PER_S
    if fast or not plan.streamed_bytes or planner.mixture is not None:
        return None
    try:
        of_ggml = substitute_kernels(planner.weights, kernels, DEFAULT_TYPE, torch.float32)
        substitutes = substitute_bytes(planner.weights, of_ggml)
        drafted = replace(planner, substitutes=substitutes).plan(plan.budget_bytes)
    except (BudgetError, DraftError):
        return None
    bits = next(iter(of_ggml.values())).type
    acceptance = acceptance_of(8 * bits.block_bytes / bits.block_elements)
    costs = rough_costs(planner.costs.compute_s)
    found = plan_draft(
        drafted, planner.costs, costs, "substitute", DEFAULT_TYPE, acceptance, range(1, 9)
    )
    return found if found.predicted_tokens_per_s > 1.5 * plan.predicted_tokens_per_s else None
