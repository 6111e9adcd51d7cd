"""The streaming side of a loaded model: what a program sees of it, as `model.flexinfer`."""

import resource
import threading
import warnings
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexinfer.cache_dir import user_path
from flexinfer.draft.drafter import Drafter, draft_that_pays
from flexinfer.engine.length import Lengths
from flexinfer.engine.prepare import Prepared
from flexinfer.engine.runner import PassRunner
from flexinfer.formats.tensors import CheckpointError
from flexinfer.memory.follow import Follower
from flexinfer.memory.process import available_bytes, file_bytes, peak_bytes
from flexinfer.modules.experts import StreamedExperts
from flexinfer.observe.notebook import engine_html, timeline
from flexinfer.observe.perfetto import write_trace
from flexinfer.observe.report import Explainer, memory_stall_s
from flexinfer.observe.trace import Trace
from flexinfer.plan.plan import DraftPlan, Plan
from flexinfer.plan.planner import Planner
from flexinfer.streaming.store import WeightStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Engine:
    """Plan, statistics and budget of a streamed model. `close()` or a `with` block ends it."""

    def __init__(
        self,
        prepared: Prepared,
        tokenizer: PreTrainedTokenizerBase | None,
        planner: Planner,
        store: WeightStore,
        trace: Trace,
        experts: list[StreamedExperts],
        drafter: Drafter | None,
        logits_to_keep: int,
    ) -> None:
        skeleton = prepared.skeleton
        self.mixture, self.context = skeleton.mixture, prepared.context
        # Pages of libraries that a pass touches, part of the plan's process_bytes.
        self.file_bytes = prepared.process.file_bytes
        self.store, self._trace, self._experts, self.drafter = store, trace, experts, drafter
        self._kernels, self._trace_file = skeleton.kernels, prepared.options.trace
        self._follower: Follower | None = None
        self._explainer = Explainer(self.stats, lambda: self.plan)
        self.runner = PassRunner(
            skeleton.config,
            planner,
            store,
            skeleton.meter,
            trace,
            self._explainer,
            context=prepared.context,
            logits_to_keep=logits_to_keep,
        )
        self._tokenizer, self._prepared_tokenizer = tokenizer, prepared.tokenizer

    def attach_to(self, model: PreTrainedModel) -> PreTrainedModel:
        """Have passes of `model`, and its texts, go through this engine."""
        model.flexinfer = self  # type: ignore[assignment]
        model.forward = wraps(model.forward)(partial(self.runner.run, model.forward))
        Lengths(model, self.runner)
        if self.drafter is not None:
            stock: Any = model.generate
            drafted = partial(self.drafter.generate, self.runner, model, stock)
            model.generate = wraps(stock)(drafted)  # type: ignore[assignment]
        return model

    @property
    def plan(self) -> Plan:
        """Where the budget goes, and the speed to expect."""
        return self.store.plan

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights, which was loaded with the model, or the program's own.

        Raises CheckpointError where there is none.
        """
        if self._tokenizer is None:
            raise CheckpointError(
                self._prepared_tokenizer.problem if self._prepared_tokenizer else "no tokenizer"
            )
        return self._tokenizer

    def stats(self) -> dict[str, Any]:
        """Counters since loading: passes over the weights, tokens (rows) that went through, bytes
        and seconds.

        Of a mixture also experts that were in memory when a layer wanted them (hits) or had to be
        read (misses), and those that were predicted. After the first pass "first_token_s", from the
        call of `from_pretrained` on.
        """
        trace, facts = self._trace, dict[str, Any]()
        if self.mixture is not None:
            of_experts = (
                "expert_hits",
                "expert_misses",
                "experts_foretold",
                "experts_foretold_right",
            )
            facts |= {name: getattr(trace, name) for name in of_experts}
        names = (
            "passes",
            "tokens",
            "bytes_read",
            "reads",
            "pass_s",
            "wait_s",
            "resyncs",
            "wasted_bytes",
        )
        facts |= {name: getattr(trace, name) for name in names}
        if self.drafter is not None:
            facts |= self.drafter.stats(self.plan)
        if trace.first_token_s:
            facts["first_token_s"] = trace.first_token_s
        return facts | {
            "compute_s": trace.pass_s - trace.wait_s,
            "peak_bytes": peak_bytes() - max(0, file_bytes() - self.file_bytes),
            "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "memory_stall_s": memory_stall_s(),
        }

    def draft_that_pays(self) -> DraftPlan | None:
        """The draft that would give at least half as many tokens per second again; None with a
        draft, or where none would.
        """
        return (
            draft_that_pays(self.runner.planner, self.plan, self._kernels)
            if self.drafter is None
            else None
        )

    def explain(self) -> str:
        """Why the passes since the last call, or since loading, took as long as they did: "disk:
        ..." (kernels, memory, order).

        Also logged (logger "flexinfer", INFO), without being called, when another text begins and
        at close().
        """
        return self._explainer.explain()

    def record_routing(self) -> list[list[int]]:
        """A list that from now on grows by the experts that each layer of each pass is routed to,
        numbered over all layers.

        Its memory is not in the plan.
        """
        routing: list[list[int]] = []
        for experts in self._experts:
            experts.record(routing.append)
        return routing

    def events(self) -> list[dict[str, Any]]:
        """The timeline of reads, waits and kernels, oldest first; empty unless loaded with
        trace=True.
        """
        return self._trace.events()

    def timeline(self) -> "Figure":
        """Reads, waits and kernels of the last pass as a matplotlib figure, for a model loaded with
        trace=True.

        Raises ValueError where no pass was recorded, ImportError without matplotlib.
        """
        return timeline(self.events())

    def _repr_html_(self) -> str:
        """What a notebook shows: where the budget goes, and what the passes so far have come to."""
        return engine_html(self.plan, self.stats())

    def resize(self, memory: str | int) -> Plan:
        """Change the budget of the live model, from any thread. Returns the new plan.

        While a pass is running, memory is given back before its next weight is used and taken at
        its end; the text stays the same. Raises BudgetError, and leaves all as it is, when `memory`
        is too small.
        """
        return self.runner.resize(memory)

    def follow(self) -> None:
        """From now on give memory back when others need it, and take it again later, up to the
        present budget.
        """
        if self._follower is None:
            self._follower = Follower(
                self.resize,
                budget=lambda: self.store.proposed_plan.budget_bytes,
                smallest=lambda: self.runner.planner.smallest_bytes,
                spare=available_bytes,
                largest_bytes=self.plan.budget_bytes,
            )

    def close_when_collected(self) -> None:
        """`close`, called by the garbage collector: in whatever thread it runs, and wherever that
        thread is.
        """
        if self.store.closes_here():
            self.close()
        else:
            threading.Thread(target=self.close, name="flexinfer-close", daemon=True).start()

    def close(self) -> None:
        """End the threads, close the files, free the weights.

        The model cannot run any more. Safe to call twice.
        """
        if self._follower is not None:
            self._follower.close()
        already = self.store.closed
        self.store.close()
        if self.drafter is not None:
            self.drafter.drafts.model = None
        if already:
            return
        self._explainer.explain_last_text(least_passes=1)
        if not isinstance(self._trace_file, bool):
            try:
                write_trace(user_path(self._trace_file), self._trace.timeline())
            except OSError as error:
                warnings.warn(
                    f"the trace could not be written: {error}", RuntimeWarning, stacklevel=2
                )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()
