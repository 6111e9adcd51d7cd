"""`from_pretrained`: a stock transformers model whose weights come from disk as they are needed.

The way: index the checkpoint, build the model empty (flexinfer.formats.skeleton), measure process and costs (flexinfer.machine), divide
the budget (flexinfer.plan), and put a `StreamedLinear` where each linear was. Locked memory is filled by the first pass as it comes to each
weight (flexinfer.streaming.locked), so that until then it is free for what a program loads besides. Everything else of the model, and
`generate()` with all that is built on it, stays transformers' own, experts of a mixture too: they are computed through the interface that it
has for this (flexinfer.streaming.experts), and kept in a cache of what the budget leaves. Parameters that are no weight of a linear or an expert are not streamed: they stay
in memory, or the budget is refused and they are named.

The budget is held pass by pass: a call whose activations the plan has no room for is refused before it runs, and where the process itself
has grown since the plan was made, locked memory is given back for it.
"""

import contextlib
import gc
import inspect
import logging
import os
import resource
import threading
import warnings
import weakref
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flexinfer.cache_dir import user_path
from flexinfer.draft.assistant import Drafts
from flexinfer.draft.economics import DEFAULT_TYPE, DraftCosts, Pace, acceptance_of, plan_draft, rough_costs
from flexinfer.draft.substitute import (
    DraftError,
    Substitute,
    SubstituteFile,
    SubstituteMaker,
    substitute_bytes,
    substitute_kernels,
)
from flexinfer.engine.length import Lengths
from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.hub import resolve
from flexinfer.formats.tensors import CheckpointError, TensorSpec
from flexinfer.formats.tokenizer import PreparedTokenizer, TokenizerMemory, prepare_tokenizer
from flexinfer.kernels.dense import bound_kernel_caches
from flexinfer.kernels.ggml import GgmlKernel
from flexinfer.memory.buffer import Buffer
from flexinfer.memory.follow import Follower
from flexinfer.memory.heap import return_freed_memory, trim_heap
from flexinfer.memory.libraries import LibraryPages
from flexinfer.memory.process import anonymous_bytes, available_bytes, file_bytes, peak_bytes, reset_peak
from flexinfer.model.experts import parameters_of
from flexinfer.model.linears import decoder_of
from flexinfer.model.match import NotStreamableError
from flexinfer.model.rehearsal import rehearse_once
from flexinfer.model.resident import load_resident, resident_bytes
from flexinfer.model.skeleton import Skeleton, build_skeleton
from flexinfer.modules.embedding import StreamedEmbedding
from flexinfer.modules.experts import StreamedExperts, foretold
from flexinfer.modules.linear import Drafting, StreamedLinear
from flexinfer.modules.placeholder import streamed_weight
from flexinfer.modules.results import ReusedResults
from flexinfer.observe.notebook import TqdmBars, engine_html, timeline
from flexinfer.observe.perfetto import write_trace
from flexinfer.observe.report import bottleneck, memory_stall_s, plan_line
from flexinfer.observe.trace import MAX_EVENTS, Trace
from flexinfer.options import Options
from flexinfer.plan.budget import (
    MIN_SLOTS,
    Costs,
    DraftPlan,
    Fixed,
    PassShape,
    Plan,
    Substitutes,
    make_plan,
    smallest_budget_bytes,
    with_page_tables,
)
from flexinfer.plan.weights import Weight
from flexinfer.sizes import BudgetError, format_size, name_budget, named_budget_bytes, parse_size, whole_mib
from flexinfer.streaming.checksums import Checksums, checksums_of
from flexinfer.streaming.costs import measure_costs, measure_draft_costs
from flexinfer.streaming.expert_cache import ExpertCache
from flexinfer.streaming.kv_cache import KVReserve, reserved_bytes
from flexinfer.streaming.locked import Filler, LockedPieces
from flexinfer.streaming.prefetch import Prefetcher
from flexinfer.streaming.queue import ReadQueue
from flexinfer.streaming.reader import FileReader, padded_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN_BYTES = 16 << 20  # threads' stacks, allocator, what a first pass imports

GROWTH_BYTES = 6 << 20  # a process that grows by less is left alone: the margin is for it

LARGE_PARAMETER_BYTES = 16 << 20

SMALLEST_DEFAULT_CONTEXT = 128

CACHE_LINE_BYTES = 64

MANY_ROWS = 128  # of a prompt, from which its results use memory again

MOST_TOGETHER = 7  # weights that are computed in one call with the first that is given their input

READING_TOKENS_PER_S = 6.0  # as fast as people read; nobody needs to be told of drafts

ENOUGH_PASSES, BETTER = (
    12,
    1.1,
)  # passes to see before a draft is judged, and how many times as fast it must be without

MAKING_PASSES = 2  # over the weights: what may be quantised anew each time memory is filled

logger = logging.getLogger("flexinfer")

CLOSED = "this model is closed; load it again with flexinfer.from_pretrained()"


def from_pretrained(
    path_or_hub_id: str | Path, memory: str | int = "auto", **options: Any
) -> PreTrainedModel:
    """Load a causal LM that streams its weights from disk inside a memory budget.

    Args:
        path_or_hub_id: a checkpoint directory (safetensors), a GGUF file or a directory with one, or a Hugging Face Hub id, taken
            from the local cache when it is there.
        memory: budget of the whole process, "4GiB" or bytes; "auto" takes what the machine or its cgroup has to spare.
        options: the other fields of `flexinfer.Options`, by name, which say what they mean.

    Returns:
        The transformers model, with its `Engine` as `model.flexinfer`.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        DraftError: the draft cannot be made of, or for, this model.
        BudgetError: `memory` or `window` is no size, or too small for this model; names the smallest that works.
        ValueError: another argument is wrong.
        TypeError: there is no option of that name.
    """
    return load(path_or_hub_id, Options.of({"memory": memory} | options))


from_pretrained.__signature__ = Options.signature_of(from_pretrained)  # type: ignore[attr-defined]  # for help() and notebooks


@dataclass(frozen=True, slots=True)
class ContextOf:
    """The context that a prompt needs, which its tokenizer tells."""

    least: int  # before that
    most: int
    exact: Callable[[PreTrainedTokenizerBase], int]


def load(
    path_or_hub_id: str | Path, options: Options, context_of: ContextOf | None = None
) -> PreTrainedModel:
    """`from_pretrained`, with options that are made already, and with the context of a prompt where none is given."""
    progress = TqdmBars() if options.progress is True else options.progress or None
    # Before the process is measured: its memory is part of it.
    trace = Trace(max_events=MAX_EVENTS if options.trace else 0, progress=progress)
    return_freed_memory()  # before the dry run: what it frees would stay in the heap
    bound_kernel_caches()
    checkpoint = Checkpoint.open(resolve(path_or_hub_id, options.gguf_file))
    budget_bytes = available_bytes() if options.memory == "auto" else parse_size(options.memory)
    try:
        skeleton = build_skeleton(checkpoint, options.dtype, options.kv_dtype)
    except NotStreamableError as error:
        skeleton = _resident_or_refused(checkpoint, options.dtype, budget_bytes, options.context, error)
    trace.first_token.reached("header")
    checksums = _checksums(skeleton, options.verify, progress)  # measured too, as the trace is
    if checksums is not None:
        trace.first_token.reached("verify")
    choice = options.draft_choice
    drafts = Drafts(choice, skeleton, skeleton.dtype) if choice is not None else None
    logits_to_keep = undrafted_logits = options.logits_to_keep
    if drafts is not None:
        logits_to_keep = max(logits_to_keep, drafts.fit(budget_bytes) + 1)
    in_blocks = drafts is not None and bool(drafts.kernels)
    prepared = prepare_tokenizer(checkpoint.config_dir) if options.tokenizer is None else None
    measured = MemoryOfProcess.measure(skeleton, prepared, in_blocks=in_blocks)
    trace.first_token.reached("rehearsal")
    context_of = context_of if options.context is None else None
    context = options.context or (context_of and context_of.least)
    context = context or default_context(skeleton, measured, budget_bytes, logits_to_keep, drafts)
    options = replace(options, context=context, logits_to_keep=logits_to_keep)
    engine = Engine(skeleton, measured, options, checksums, trace, drafts, undrafted_logits)
    try:
        engine.load_tokenizer(budget_bytes, prepared, context_of)
        engine.load(budget_bytes)
    except BaseException:
        engine.close()
        raise
    model = skeleton.model
    model.flexinfer = engine  # type: ignore[assignment]
    model.forward = wraps(model.forward)(partial(engine.run, model.forward))
    Lengths(model, engine)
    if drafts is not None:
        stock: Any = model.generate
        model.generate = wraps(stock)(partial(engine.generate, model, stock))  # type: ignore[assignment]
    weakref.finalize(model, engine.close_when_collected)
    if options.follow:
        engine.follow()
    return model


class _Text(threading.local):
    """What a thread's passes have in common while it generates one text."""

    cache: "weakref.ref[DynamicCache] | None" = None  # of the last one
    passes: int = 0


class Engine:
    """The streaming side of a loaded model, reached as `model.flexinfer`. `close()` or a `with` block ends it."""

    plan: Plan
    context: int  # tokens the KV cache holds, over all sequences of a batch
    file_bytes: int  # pages of libraries that a pass touches, part of the plan's process_bytes

    def __init__(
        self,
        skeleton: Skeleton,
        measured: "MemoryOfProcess",
        options: Options,
        checksums: Mapping[Path, Checksums] | None,
        trace: Trace,
        drafts: Drafts | None,
        undrafted_logits: int,  # positions to keep the logits of, without a draft
    ) -> None:
        assert options.context is not None
        self._options, self.context, self._logits_to_keep = options, options.context, options.logits_to_keep
        self._checksums, self._trace = checksums, trace
        self._drafts = drafts
        self._pace: Pace | None = None
        self._drafting = Drafting()
        self._substitutes: Substitutes | None = None  # what of them is in the plan
        self._substitute_source: SubstituteFile | SubstituteMaker | None = None
        self._in_few_bits: dict[str, tuple[int, Substitute]] = {}  # the first piece, and its rows
        self._draft_costs: DraftCosts | None = None
        self._text = _Text()
        self._pid = os.getpid()
        self._explained: dict[str, Any] = {}  # the statistics that explain() began from
        self._skeleton: Skeleton | None = skeleton
        self._weights, self._kernels = skeleton.weights, skeleton.kernels
        self.mixture = skeleton.mixture  # None where there are no experts
        self._experts = dict[str, StreamedExperts]()
        self._cache: ExpertCache | None = None
        self._config_dir, self._config = skeleton.checkpoint.config_dir, skeleton.config
        self._layers, self._meter = skeleton.cache_layers, skeleton.meter
        self._itemsize = skeleton.dtype.itemsize
        self._undrafted_logits = undrafted_logits
        self._plan_for(self.context, measured)
        self._libraries, self.file_bytes = measured.libraries, measured.file_bytes
        self._tokenizer, self._no_tokenizer = options.tokenizer, ""  # why there is none
        self._linears: dict[str, StreamedLinear] = {}
        self._locked: dict[str, list[LockedPieces]] = {}
        self._reader: FileReader | None = None
        self._queue: ReadQueue | None = None
        self._kv: KVReserve | None = None
        self._lock = threading.RLock()  # held during a pass, and while memory is changed
        self._in_pass = False
        self._wanted: Plan | None = None  # what memory is to become, as soon as no pass is running
        self._rest_bytes: int | None = None  # anonymous memory between passes; None until the first one
        self._follower: Follower | None = None
        self._closed = False

    def _plan_for(self, context: int, measured: "MemoryOfProcess") -> None:
        """Size everything for `context` tokens."""
        skeleton, drafts = self._skeleton, self._drafts
        assert skeleton is not None
        self.context, self._measured = context, measured
        self._fixed = fixed_memory(skeleton, measured, context, self._logits_to_keep, drafts)
        self._undrafted = self._fixed, self._logits_to_keep  # what "auto" goes back to where no draft pays
        if drafts is not None and drafts.auto:
            fixed = fixed_memory(skeleton, measured, context, self._undrafted_logits)
            self._undrafted = fixed, self._undrafted_logits

    def load_tokenizer(
        self, budget_bytes: int, prepared: PreparedTokenizer | None, context_of: ContextOf | None = None
    ) -> None:
        """Load the tokenizer beside the weights, before anything else takes memory, and take the context that it tells.

        Raises BudgetError before it is loaded.
        """
        try:
            self._check(budget_bytes)
        except BudgetError:
            if context_of is not None:  # what is named has to be enough for the prompt
                self._plan_for(context_of.most, self._measured)
                self._check(budget_bytes)
            raise
        if prepared is not None and prepared.problem is not None:
            self._no_tokenizer = prepared.problem
        elif prepared is not None:
            before_bytes = anonymous_bytes()
            self._tokenizer = prepared.load()
            self._plan_for(self.context, self._measured.with_loaded(anonymous_bytes() - before_bytes))
            self._trace.first_token.reached("tokenizer")
        if context_of is not None:
            self._plan_for(context_of.exact(self.tokenizer), self._measured)

    def _check(self, budget_bytes: int) -> None:
        """Raise BudgetError where `budget_bytes` cannot work."""
        self._costs = Costs(bandwidth_bytes_per_s=1.0, compute_s=1.0)
        if self._drafts is not None and not self._drafts.auto:
            self._substitutes = self._drafts.substitutes
        self._make_plan(budget_bytes, self._skeleton, fixed=self._undrafted[0])

    def load(self, budget_bytes: int) -> None:
        """Plan `budget_bytes`, read the parameters that stay, and put the streamed modules in place. Called once.

        Raises BudgetError before anything is read.
        """
        self._check(budget_bytes)
        skeleton, self._skeleton = self._skeleton, None
        assert skeleton is not None
        self._libraries.lock()
        reset_peak()
        self._reader = FileReader(
            skeleton.checkpoint.files,
            direct=self._options.direct,
            timeout_s=self._options.read_timeout_s,
            checksums=self._checksums,
        )
        self._costs = measure_costs(
            skeleton.used,
            self._reader,
            skeleton.dtype,
            max(1, self._options.io_threads),
            budget_bytes - self._fixed.process_bytes - MARGIN_BYTES // 2,
        )
        if self._drafts is not None:
            self._choose_draft(budget_bytes, skeleton)
        self._trace.first_token.reached("costs")
        self.plan = self._make_plan(budget_bytes, skeleton)
        self._kv = KVReserve(self._layers, self.context, skeleton.kv_dtype, skeleton.dtype)
        self._place_modules(skeleton)
        self._loaded_bytes = anonymous_bytes()
        self._explained = self.stats()
        self._trace.first_token.reached("load")
        logger.info("%s", plan_line(self.plan))

    def _make_plan(
        self, budget_bytes: int, skeleton: Skeleton | None = None, fixed: Fixed | None = None
    ) -> Plan:
        try:
            plan = make_plan(
                self._weights,
                fixed or self._fixed,
                budget_bytes,
                self._costs,
                policy=self._options.policy,
                window=self._options.window,
                mixture=self.mixture,
                substitutes=self._substitutes,
            )
            return plan if self._drafts is None else replace(plan, draft=self._plan_draft(plan))
        except BudgetError as error:
            large = [
                s.name
                for s in (skeleton.resident if skeleton else {}).values()
                if s.nbytes > LARGE_PARAMETER_BYTES
            ]
            if not large:
                raise
            raise BudgetError(
                f"{error} {large[0]} and {len(large) - 1} more are not weights of linears or of experts that can be told apart; "
                "they cannot be streamed yet and have to stay in memory."
            ) from None

    def _plan_draft(self, plan: Plan) -> DraftPlan | None:
        """What the draft gives beside `plan`; None before its costs are known, and where "auto" has found that none pays."""
        drafts, costs = self._drafts, self._draft_costs
        assert drafts is not None
        if costs is None or drafts.kind is None:
            return None
        return drafts.planned(plan, self._costs, costs, self._pace.acceptance if self._pace else None)

    def _choose_draft(self, budget_bytes: int, skeleton: Skeleton) -> None:
        """Measure what drafting costs; with "auto", take the draft and the division of the budget that give most tokens per second."""
        drafts = self._drafts
        assert drafts is not None
        assert self._reader is not None
        room_bytes = budget_bytes - self._fixed.process_bytes - MARGIN_BYTES // 2

        def plan_with(substitutes: Substitutes | None) -> Plan:
            self._substitutes = substitutes
            fixed = self._undrafted[0] if drafts.kind is None else self._fixed
            return self._make_plan(budget_bytes, skeleton, fixed=fixed)

        def measure() -> DraftCosts:
            return measure_draft_costs(
                skeleton.used, drafts.kernels, drafts.model_share, skeleton.dtype, room_bytes
            )

        found = drafts.options(plan_with, self._costs, measure)
        best = max(found, key=lambda option: option.tokens_per_s)
        drafts.kind, drafts.type, self._draft_costs = best.kind, best.type, best.costs
        self._substitutes = drafts.substitutes if best.kind == "substitute" else None
        if best.kind is None:
            self._fixed, self._logits_to_keep = self._undrafted
        if drafts.auto:
            told = ", ".join(f"{one.kind or 'none'} {one.type} {one.tokens_per_s:.3g}" for one in found)
            logger.info("draft %s: tokens/s expected: %s", best.kind or "none", told)
        if self._substitutes is not None:
            self._open_substitute(drafts, skeleton)
        if drafts.kind == "model":
            drafts.load()

    def _open_substitute(self, drafts: Drafts, skeleton: Skeleton) -> None:
        """Find where substitutes come from; make their file, where there is to be one."""
        assert self._reader is not None
        maker = SubstituteMaker(self._kernels, drafts.kernels, self._reader)
        file = SubstituteFile(self._weights, drafts.kernels, drafts.type, drafts.choice.folder)
        if not file.exists and drafts.choice.folder is None:
            numbers = sum(w.pieces[-1].row_stop * self._kernels[w.name].in_features for w in self._weights)
            pass_s = sum(w.nbytes for w in self._weights) / self._costs.bandwidth_bytes_per_s
            weight = max(self._weights, key=lambda weight: weight.nbytes)
            if numbers * maker.seconds_per_number(weight) <= MAKING_PASSES * pass_s:
                self._substitute_source = maker
                return
        if not file.exists:
            logger.warning(
                "making the draft's substitute (%s), once: %s in %s",
                drafts.type,
                format_size(file.nbytes),
                file.path.parent,
            )
        file.make(maker, self._trace.progress)
        file.open(direct=self._options.direct)
        self._substitute_source = file

    def _place_modules(self, skeleton: Skeleton) -> None:
        """Read the parameters that stay, and put streamed modules where the linears, experts and the input embedding were."""
        assert self._reader is not None
        model, dtype = skeleton.model, skeleton.dtype
        done_bytes, all_bytes = 0, sum(spec.nbytes for spec in skeleton.resident.values())
        for name, spec in skeleton.resident.items():
            owner, _, leaf = name.rpartition(".")
            holder = model.get_submodule(owner)
            stock = getattr(holder, leaf)
            tensor = _read_tensor(self._reader, spec, stock.dtype)
            if isinstance(stock, nn.Parameter):
                holder.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                holder.register_buffer(leaf, tensor)
            done_bytes += spec.nbytes
            if self._trace.progress is not None:
                self._trace.progress("load", done_bytes, all_bytes)
        for weight in self._weights:
            path = weight.name.removesuffix(".weight")
            module: Any = model.get_submodule(path)
            linear = StreamedLinear(
                weight,
                self._kernels[weight.name],
                module,
                dtype,
                self._trace,
                self._lock,
                self._between_linears,
                skeleton.row_orders.get(weight.name),
                self._drafting,
                self._drafts.kernels.get(weight.name) if self._drafts is not None else None,
            )
            model.set_submodule(path, linear)
            self._linears[weight.name] = linear
        for names in skeleton.together:
            if all(isinstance(self._kernels[name], GgmlKernel) for name in names):
                first, *others = (self._linears[name] for name in names)
                first.lead(others[:MOST_TOGETHER])
        self._place_experts(skeleton)
        if self._weights:
            embedding: Any = model.get_input_embeddings()
            name = skeleton.embedding_name
            spec = skeleton.specs[name + ".weight"]
            decode = decoder_of(spec)
            kept_rows = 2 * self._logits_to_keep if self._substitutes is not None else 0
            rows = StreamedEmbedding(
                embedding, self._row_reader(spec), decode, spec, dtype, self._lock, kept_rows
            )
            model.set_submodule(name, rows)

    def _place_experts(self, skeleton: Skeleton) -> None:
        """Have the experts modules use what is streamed, and stand-ins for their parameters."""
        if skeleton.experts is None:
            return
        experts = skeleton.experts
        pieces = list(experts.mixture.pieces())
        slot_bytes = experts.mixture.slots().slot_bytes
        used = sum(layer.used for layer in experts.mixture.layers)
        self._cache = ExpertCache(
            pieces, slot_bytes, self._options.expert_policy, self._trace, token_experts=used
        )
        first, before = 0, None
        for layer in experts.mixture.layers:
            streamed = StreamedExperts(
                layer,
                experts.kernels[layer.name],
                first,
                self._trace,
                self._lock,
                self._between_linears,
                alternate=layer.name in experts.alternate,
            )
            module: Any = skeleton.model.get_submodule(layer.name)
            module.streamed = self._experts[layer.name] = streamed
            router = experts.routers.get(layer.name)
            if self._options.look_ahead and router is not None and before is not None:
                chooses = skeleton.model.get_submodule(router.name)
                before.look_ahead(partial(foretold, chooses, router.place, first))
            before = streamed
            first += len(layer.experts)
            for parameter in parameters_of(layer.name, module):
                leaf = parameter.rpartition(".")[2]
                stand_in = streamed_weight(parameter, getattr(module, leaf).shape, skeleton.dtype)
                module.register_parameter(leaf, stand_in)

    def _row_reader(self, spec: TensorSpec) -> Callable[[int, memoryview], int]:
        row_bytes = spec.row_bytes

        def read_row(row: int, into: memoryview) -> int:
            assert self._reader is not None
            self._trace.bytes_read += padded_bytes(spec.offset_bytes + row * row_bytes, row_bytes)
            return self._reader.read(spec.file, spec.offset_bytes + row * row_bytes, row_bytes, into)

        return read_row

    def _apply(self, plan: Plan) -> None:
        """Make memory what `plan` says: give back first, so that no more than the larger budget is ever in use.

        What is new in it is read by the readers, the next pass waiting for each weight as it comes to it.
        """
        assert self._kv is not None
        self._detach("its memory is being changed")
        count_of = {w.name: plan.locked_pieces.get(w.name, 0) for w in self._weights}
        for weight in self._weights:
            self._locked[weight.name] = _keep(self._locked.get(weight.name, []), count_of[weight.name])
            if self._in_few_bits.get(weight.name, (-1, None))[0] != count_of[weight.name]:
                self._in_few_bits.pop(weight.name, None)
        if not plan.substitute_bytes:
            self._in_few_bits.clear()
        self._kv.allocate()
        slots = plan.experts.slots if plan.experts is not None else 0
        if self._cache is not None and slots < self._cache.slots:
            self._cache.resize(slots)
        for weight in self._weights:
            have, want = _count(self._locked[weight.name]), count_of[weight.name]
            if have < want:
                block = LockedPieces(weight.pieces[have:want], self._kernels[weight.name])
                self._locked[weight.name].append(block)
        try:
            if (source := self._substitute_source) is not None and plan.substitute_bytes:
                for weight in self._weights:
                    first = count_of[weight.name]
                    if first < len(weight.pieces) and weight.name not in self._in_few_bits:
                        self._in_few_bits[weight.name] = (first, source.begin(weight, first))
            if self._cache is not None and not self._closed:
                self._cache.resize(slots)
        finally:
            self._attach(plan)
        if self._closed:
            raise RuntimeError(CLOSED)
        before, self.plan = self.plan, plan
        self._trace.set_memory(plan.budget_bytes, plan.locked_bytes, plan.window_bytes, plan.total_bytes)
        if self._in_pass and self._rest_bytes is not None:  # with its activations
            self._rest_bytes += plan.held_bytes - before.held_bytes
        else:
            self._rest_bytes = self._expected_bytes()

    def _expected_bytes(self) -> int:
        """Anonymous memory of this process, with what is yet to be taken for weights that stay."""
        if self._queue is None:
            return anonymous_bytes()
        with self._queue.changed:  # none is taken meanwhile
            blocks = (block for locked in self._locked.values() for block in locked)
            return anonymous_bytes() + sum(block.missing_bytes for block in blocks)

    def _complete_substitutes(self) -> None:
        """Have a substitute of all rows that are not locked: of those that no pass has made, and from a file. Raises ReadError."""
        source, ones = self._substitute_source, self._in_few_bits
        missing = [w for w in self._weights if w.name in ones and ones[w.name][1].missing]
        if source is None or not missing:
            return

        def complete(weight: Weight) -> None:
            if not self._closed:
                source.complete(weight, ones[weight.name][1])

        done_bytes, all_bytes = 0, sum(weight.nbytes for weight in missing)
        with ThreadPoolExecutor(max(1, self._options.io_threads)) as pool:
            for weight, _ in zip(missing, pool.map(complete, missing), strict=True):
                done_bytes += weight.nbytes
                if self._trace.progress is not None:
                    self._trace.progress("draft", done_bytes, all_bytes)

    def _detach(self, why: str) -> None:
        """Take everything from the linears and experts, and end the window."""
        for linear in self._linears.values():
            linear.detach(why)
        for experts in self._experts.values():
            experts.detach(why)
        if self._queue is not None:
            self._queue.close()
            self._queue = None
            if self._cache is not None:
                self._cache.detach()

    def _attach(self, plan: Plan) -> None:
        """Give the linears what is locked, a window for all that is not, and the experts their cache."""
        if self._closed:
            return
        assert self._reader is not None
        streamed = {w.name: w.pieces[_count(self._locked[w.name]) :] for w in self._weights}
        schedule = [piece for pieces in streamed.values() for piece in pieces]
        prefetcher = filler = None
        blocks = [block for w in self._weights for block in self._locked[w.name] if not block.filled]
        if schedule or blocks or self._cache is not None:
            self._queue = ReadQueue(self._reader, self._trace, io_threads=self._options.io_threads)
        if self._queue is not None and self._cache is not None:
            self._queue.serve(self._cache.take)
        if self._queue is not None and schedule:
            prefetcher = Prefetcher(
                schedule,
                self._queue,
                slots=max(plan.slots, MIN_SLOTS),
                slot_bytes=max(plan.slot_bytes, *(piece.memory_bytes for piece in schedule)),
                window_layers=plan.window_layers,
                ahead=self._options.read_ahead,
            )
            self._queue.serve(prefetcher.take)
        if self._queue is not None and blocks:
            filler = Filler(blocks, self._queue)
            self._queue.serve(filler.take)
        if self._queue is not None and self._cache is not None:
            self._queue.serve(self._cache.take_foretold)
            self._cache.attach(self._queue)
            for experts in self._experts.values():
                experts.attach(self._cache)
        place = 0
        for weight in self._weights:
            places = list(enumerate(streamed[weight.name], place))
            place += len(places)
            _, draft = self._in_few_bits.get(weight.name, (-1, None))
            locked = self._locked[weight.name]
            self._linears[weight.name].attach(locked, places, prefetcher, filler, draft)

    def generate(
        self, model: PreTrainedModel, generate: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' `generate` with the draft handed in, where it can be: one text, no beams, a cache, and no other draft."""
        drafts, plan = self._drafts, self.plan.draft
        assert drafts is not None
        if plan is None or not drafts.serves(model, args, kwargs):
            return generate(*args, **kwargs)
        assert self._draft_costs is not None
        if self._pace is None:
            fixed = drafts.choice.candidates is not None
            self._pace = Pace(plan, drafts.most, self._draft_costs.pass_s, fixed)
        assistant = drafts.assistant(model, self._pace, self._while_drafting, self._cache_of_text)
        kwargs = kwargs | {"assistant_model": assistant}
        self._text.passes = 0
        output = generate(*args, **kwargs)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        given: Any = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self._trace.texts_tokens += sequences.shape[1] - given.shape[1]
        self._trace.texts_passes += self._text.passes
        if drafts.auto and drafts.kind == "substitute":
            self._reconsider_draft()
        return output

    def _reconsider_draft(self) -> None:
        """Let go of a substitute that does not pay by what has been seen, and lock more instead ("auto")."""
        assert self._drafts is not None
        assert self._pace is not None
        with self._lock:
            if self._closed or self._pace.passes < ENOUGH_PASSES:
                return
            before = self._substitutes, self._drafts.kind, self._pace
            self._substitutes, self._drafts.kind, self._pace = None, "lookup", None
            plan = self._make_plan(self.plan.budget_bytes)
            if plan.predicted_tokens_per_s <= BETTER * before[2].predicted_tokens_per_s():
                self._substitutes, self._drafts.kind, self._pace = before
                return
            logger.info(
                "draft: %.2f of its candidates are accepted, too few; weights are locked in its memory instead",
                before[2].acceptance,
            )
            self._apply(plan)

    @property
    def drafting(self) -> bool:
        """Whether the pass that is running is a draft."""
        return self._drafting.now

    def _cache_of_text(self) -> DynamicCache | None:
        return self._text.cache() if self._text.cache is not None else None

    @contextlib.contextmanager
    def _while_drafting(self) -> Iterator[None]:
        """Passes of this block are drafts: they read no weight, and are no passes over the weights."""
        with self._lock:
            self._complete_substitutes()
            start_s, self._drafting.now = perf_counter(), True
            try:
                yield
            finally:
                self._drafting.now = False
                self._trace.draft_s += perf_counter() - start_s

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One pass: `forward` of the transformers model, with memory seen to before it. One at a time; threads wait for one another.

        Raises BudgetError, before anything runs, when the plan has no room for what the call asks.
        """
        if os.getpid() != self._pid:  # before the lock, which another thread may have held at the fork
            raise RuntimeError(
                f"this model was loaded in another process ({self._pid}), whose reader threads are not in this one; load it again here"
            )
        with self._lock:
            if self._closed:
                raise RuntimeError(CLOSED)
            if self._in_pass:  # a hook of the program's own that calls the model again
                return forward(*args, **kwargs)
            asked = inspect.signature(forward).bind(*args, **kwargs).arguments
            asked |= asked.pop("kwargs", {})
            ids = asked.get("input_ids")
            if ids is None:
                ids = asked.get("inputs_embeds")
            self._trace.first_token.reached("program")
            if self._rest_bytes is None:
                self._first_fill()
            if ids is not None:
                kwargs = self._prepare(forward, ids, asked, kwargs)
            drafting = self._drafting.now
            if not drafting:
                self._trace.begin_pass()
            self._in_pass = True
            many = ids is not None and ids.shape[0] * ids.shape[1] >= MANY_ROWS
            try:
                with ReusedResults(self._fixed.activation_bytes) if many else contextlib.nullcontext():
                    output = forward(*args, **kwargs)
                if not drafting and self._trace.came_to_its_end():
                    logger.info("%s", self._trace.first_token.line())
                return output
            finally:
                self._in_pass = False
                if drafting:
                    self._trace.draft_passes += 1
                elif not self._closed:
                    self._text.passes += 1
                    if ids is not None:
                        self._trace.tokens += ids.shape[0] * ids.shape[1]
                    self._trace.end_pass()
                    if self._wanted is not None:
                        plan, self._wanted = self._wanted, None
                        self._apply(plan)

    def longest_text(
        self, rows: int, cache: object | None, own_memory: bool, uses_cache: bool, tokens: int
    ) -> int:
        """How many tokens of each of `rows` sequences passes have room for, up to `tokens`.

        cache: the one that holds the text so far, if the program brought one. own_memory: it will not be where memory was set aside.
        """
        if uses_cache and not own_memory and self._kv is not None and self._layers:
            room = self._kv.room(cache, rows)
            if room is not None:
                return min(tokens, room)
        if not uses_cache and rows * tokens <= self.context:
            return tokens

        def too_long(tokens: int) -> bool:
            last = (1, tokens - 1) if uses_cache else (tokens, 0)
            needed_bytes = self._meter.extra_bytes(
                PassShape(rows, *last, cached=not uses_cache), self.context
            )
            if needed_bytes > self._room_bytes():
                return True
            itemsize = self._itemsize if uses_cache else 0
            kept_bytes = sum(layer.nbytes(rows * tokens, itemsize) for layer in self._layers)
            smallest_bytes = smallest_budget_bytes(
                self._weights, self._fixed, self.mixture, self._substitutes
            )
            return smallest_bytes + kept_bytes > self.plan.budget_bytes

        if tokens < 1 or not too_long(tokens):
            return tokens
        return bisect_left(range(1, tokens), True, key=too_long)

    def _room_bytes(self) -> int:
        """What a pass may take beyond what is in memory before it."""
        fixed = self.plan.fixed
        return fixed.activation_bytes + self.plan.unused_bytes + fixed.margin_bytes // 2

    def _between_linears(self) -> None:
        """Called before each use of a linear, in a pass or alone: the first fills memory, and memory that others need goes at once."""
        if self._rest_bytes is None:
            self._first_fill()
        elif self._wanted is not None and self._wanted.held_bytes < self.plan.held_bytes and not self._closed:
            plan, self._wanted = self._wanted, None
            self._apply(plan)

    def _first_fill(self) -> None:
        """Plan again with what the process holds by now, and fill the memory that stays. Called by the first use of the weights."""
        if self._closed:
            raise RuntimeError(CLOSED)
        trim_heap()
        grown_bytes = anonymous_bytes() - self._loaded_bytes
        used_bytes = min(max(0, grown_bytes), self._fixed.tokenizer_bytes)  # as was planned for
        self._fixed = replace(
            self._fixed,
            process_bytes=self._fixed.process_bytes + used_bytes,
            tokenizer_bytes=self._fixed.tokenizer_bytes - used_bytes,
        )
        grown_bytes -= used_bytes
        self._apply(self._plan_grown(grown_bytes if grown_bytes > GROWTH_BYTES else 0))

    def _prepare(
        self, forward: Callable[..., Any], ids: torch.Tensor, asked: dict[str, Any], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """See that the pass has room, and that its keys and values go where memory was set aside for them."""
        assert self._kv is not None
        given = cache = asked.get("cache", asked.get("past_key_values"))  # its name before transformers 5.24
        uses_cache = asked.get("use_cache")
        if uses_cache is None:
            uses_cache = getattr(self._config, "use_cache", True)
        if uses_cache:
            self._kv.check(cache, ids.shape[0], ids.shape[1])
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in forward.__self__.parameters())  # type: ignore[attr-defined]
        if cache is None and uses_cache and self._layers:
            config = self._config.get_text_config(decoder=True)
            cache = DynamicCache(config=config) if trained else self._kv.new_cache(config)
            kwargs = kwargs | {"cache": cache}
        elif isinstance(cache, DynamicCache) and not trained:
            self._kv.adopt(cache)
        if self._drafts is not None and isinstance(cache, DynamicCache):
            self._text.cache = weakref.ref(cache)
        past_tokens = 0 if cache is None else cache.get_seq_length()
        another_text = given is not None and not past_tokens
        if another_text and self._trace.passes > self._explained["passes"] + 1:
            self.explain()
        kept = asked.get("logits_to_keep", 0)
        if isinstance(kept, int) and kept > 1 and ids.shape[0] == 1:  # candidates and one
            self._trace.drafted += kept - 1
        shape = PassShape(
            batch=ids.shape[0],
            new_tokens=ids.shape[1],
            past_tokens=past_tokens,
            kept=len(kept) if isinstance(kept, torch.Tensor) else kept,
            cached=not uses_cache or self._kv.holds(cache),
        )
        self._see_to_room(shape, "logits_to_keep" in inspect.signature(forward).parameters)
        return kwargs

    def _see_to_room(self, shape: PassShape, can_keep_fewer: bool) -> None:
        """Raise BudgetError when the plan has no room for a pass of `shape`; give locked memory back where the process has grown."""
        assert self._rest_bytes is not None
        planned = (
            shape.cached
            and shape.total_tokens <= self.context
            and shape.batch * shape.kept_tokens <= self._logits_to_keep
        )
        grown_bytes = self._expected_bytes() - self._rest_bytes
        if planned and grown_bytes <= GROWTH_BYTES:
            return
        needed_bytes = self._meter.extra_bytes(shape, self.context)
        room_bytes = self._room_bytes()
        if needed_bytes + grown_bytes <= room_bytes:
            return
        if needed_bytes > room_bytes:
            raise BudgetError(self._too_large(shape, needed_bytes, room_bytes, can_keep_fewer))
        gc.collect()
        trim_heap()
        grown_bytes = self._expected_bytes() - self._rest_bytes
        if needed_bytes + grown_bytes > room_bytes:
            self._give_back(grown_bytes)

    def planned_bytes(self, shape: PassShape) -> int:
        """What the plan says this process holds while a pass of `shape` runs, the margin apart. Reads and computes nothing."""
        plan = self.plan
        without = plan.fixed.activation_bytes + plan.fixed.margin_bytes + plan.unused_bytes
        return plan.budget_bytes - without + self._meter.extra_bytes(shape, self.context)

    def _give_back(self, grown_bytes: int) -> None:
        """Lock less, as the process has grown by `grown_bytes` since the plan was made."""
        plan = self._plan_grown(grown_bytes)
        warnings.warn(
            f"the process has grown by {format_size(grown_bytes)} since the model was loaded; to stay within memory="
            f"{format_size(plan.budget_bytes)} {format_size(plan.streamed_bytes - self.plan.streamed_bytes)} more are read for each pass",
            RuntimeWarning,
            stacklevel=2,
        )
        self._apply(plan)

    def _plan_grown(self, grown_bytes: int) -> Plan:
        """The plan for a process that is larger by `grown_bytes`, from now on: with less locked, or, where nothing is left to give, with less margin,
        which is for what cannot be known. Raises BudgetError past that."""
        grown = replace(self._fixed, process_bytes=self._fixed.process_bytes + grown_bytes)
        try:
            plan = self._make_plan(self.plan.budget_bytes, fixed=grown)
        except BudgetError:
            if grown_bytes > grown.margin_bytes:
                raise
            grown = replace(grown, margin_bytes=grown.margin_bytes - grown_bytes)
            plan = self._make_plan(self.plan.budget_bytes, fixed=grown)
        self._fixed = grown
        return plan

    def _too_large(self, shape: PassShape, needed_bytes: int, room_bytes: int, can_keep_fewer: bool) -> str:
        """What a call asks for and what would make it fit."""
        kept = shape.batch * shape.kept_tokens
        larger_bytes = self.plan.budget_bytes + needed_bytes - room_bytes
        remedies = []
        if kept > 1 and can_keep_fewer:
            remedies.append("ask for fewer logits with logits_to_keep=1 (score a long text in parts)")
        if shape.batch > 1:
            remedies.append("a smaller batch")
        if shape.new_tokens > 1:
            remedies.append("fewer tokens at a time")
        if not shape.cached:
            remedies.append(
                "let go of the KV cache of an earlier call (this one gets its own beside it), or pass use_cache=False"
            )
        remedies.append(
            f"plan for it: flexinfer.from_pretrained(..., memory={whole_mib(named_budget_bytes(larger_bytes))!r}, "
            f"context={max(self.context, shape.total_tokens)}, logits_to_keep={max(kept, self._logits_to_keep)})"
        )
        return (
            f"a pass of {shape.batch} x {shape.new_tokens} new tokens after {shape.past_tokens}, with logits of {kept} positions, takes "
            f"{format_size(needed_bytes)} and memory={format_size(self.plan.budget_bytes)} leaves {format_size(room_bytes)} for it "
            f"(context={self.context}, logits_to_keep={self._logits_to_keep}); nothing was run. What would make it fit: "
            + "; or ".join(remedies)
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights, which was loaded with the model (flexinfer.tokenizer), or the program's own.

        Raises CheckpointError where there is none.
        """
        if self._tokenizer is None:
            raise CheckpointError(self._no_tokenizer)
        return self._tokenizer

    def stats(self) -> dict[str, Any]:
        """Counters since loading: passes over the weights, tokens (rows) that went through, bytes and seconds; of a mixture also
        experts that were in memory when a layer wanted them (hits) or had to be read (misses), and those that were foretold.

        After the first pass "first_token_s" too, from the call of `from_pretrained` on, and its parts (flexinfer.first_token).
        """
        trace = self._trace
        of_experts = {
            "expert_hits": trace.expert_hits,
            "expert_misses": trace.expert_misses,
            "experts_foretold": trace.experts_foretold,
            "experts_foretold_right": trace.experts_foretold_right,
        }
        return (of_experts if self.mixture is not None else {}) | {
            "passes": trace.passes,
            "tokens": trace.tokens,
            **self._draft_stats(),
            "bytes_read": trace.bytes_read,
            "reads": trace.reads,
            "pass_s": trace.pass_s,
            "compute_s": trace.pass_s - trace.wait_s,
            "wait_s": trace.wait_s,
            "peak_bytes": peak_bytes() - max(0, file_bytes() - self.file_bytes),
            "resyncs": trace.resyncs,
            "wasted_bytes": trace.wasted_bytes,
            "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "memory_stall_s": memory_stall_s(),
            **trace.first_token.facts(),
        }

    def _draft_stats(self) -> dict[str, Any]:
        """Of texts that `generate()` made with a draft; nothing without one."""
        if self._drafts is None:
            return {}
        trace, plan, passes = self._trace, self.plan.draft, max(1, self._trace.texts_passes)
        seconds = trace.pass_s + trace.draft_s
        predicted = (
            self._pace.predicted_tokens_per_s() if self._pace else plan and plan.predicted_tokens_per_s
        )
        return {
            "draft": self._drafts.kind,
            "drafted": trace.drafted,
            "accepted": trace.texts_tokens - trace.texts_passes,
            "tokens_per_pass": trace.texts_tokens / passes,
            "draft_passes": trace.draft_passes,
            "draft_s": trace.draft_s,
            "acceptance": self._pace.acceptance if self._pace else plan and plan.acceptance,
            "draft_predicted_tokens_per_s": predicted,
            "times_bound": trace.texts_tokens / seconds / self.plan.bound_tokens_per_s if seconds else 0.0,
        }

    def draft_that_pays(self) -> DraftPlan | None:
        """The draft that would give at least half as many tokens per second again, by a cautious reckoning; None with a draft, where
        none would, or where passes are as fast as one reads."""
        fast = self.plan.predicted_tokens_per_s > READING_TOKENS_PER_S
        if self._drafts is not None or fast or not self.plan.streamed_bytes or self.mixture is not None:
            return None
        try:
            kernels = substitute_kernels(self._weights, self._kernels, DEFAULT_TYPE, torch.float32)
            plan = make_plan(
                self._weights,
                self._fixed,
                self.plan.budget_bytes,
                self._costs,
                substitutes=substitute_bytes(self._weights, kernels),
            )
        except (BudgetError, DraftError):
            return None
        bits = next(iter(kernels.values())).type
        acceptance = acceptance_of(8 * bits.block_bytes / bits.block_elements)
        found = plan_draft(
            plan,
            self._costs,
            rough_costs(self._costs.compute_s),
            "substitute",
            DEFAULT_TYPE,
            acceptance,
            range(1, 9),
        )
        pays = found.predicted_tokens_per_s > 1.5 * self.plan.predicted_tokens_per_s
        return found if pays else None

    def explain(self) -> str:
        """Why the passes since the last call, or since loading, took as long as they did, as "disk: ..." (kernels, memory,
        order). Also logged (logger "flexinfer", INFO), without being called, when another text begins and at close().
        """
        before, self._explained = self._explained, self.stats()
        text = bottleneck(before, self._explained, self.plan)
        logger.info("%s", text)
        return text

    def record_routing(self) -> list[list[int]]:
        """A list that from now on grows by the experts that each layer of each pass is routed to, numbered over all layers.

        Its memory is not in the plan. What policies of a cache would make of it: experiments.routing.
        """
        routing: list[list[int]] = []
        for experts in self._experts.values():
            experts.record(routing.append)
        return routing

    def events(self) -> list[dict[str, Any]]:
        """The timeline of reads, waits and kernels, oldest first; empty unless loaded with trace=True."""
        return self._trace.events()

    def timeline(self) -> "Figure":
        """Reads, waits and kernels of the last pass as a matplotlib figure, for a model loaded with trace=True.

        Raises ValueError where no pass was recorded, ImportError without matplotlib.
        """
        return timeline(self.events())

    def _repr_html_(self) -> str:
        """What a notebook shows: where the budget goes, and what the passes so far have come to."""
        return engine_html(self.plan, self.stats())

    def resize(self, memory: str | int) -> Plan:
        """Change the budget of the live model, from any thread. Returns the new plan.

        While a pass is running, in this thread or another, memory is given back before its next weight is used and taken at its
        end; the text stays the same.
        Raises BudgetError, and leaves all as it is, when `memory` is too small.
        """
        if self._closed:
            raise RuntimeError(CLOSED)
        plan = self._make_plan(parse_size(memory))
        if not self._lock.acquire(blocking=False):
            self._wanted = plan  # for the pass that is running
            if not self._lock.acquire(blocking=False):
                return plan
            self._wanted = None  # it ended in between
        try:
            if self._in_pass:
                self._wanted = plan
            elif self._rest_bytes is None:
                self.plan = plan
            else:
                self._apply(plan)
        finally:
            self._lock.release()
        return plan

    def follow(self) -> None:
        """From now on give memory back when others need it, and take it again later, up to the present budget."""
        if self._follower is None:
            self._follower = Follower(
                self.resize,
                budget=lambda: (self._wanted or self.plan).budget_bytes,
                smallest=lambda: smallest_budget_bytes(
                    self._weights, self._fixed, self.mixture, self._substitutes
                ),
                spare=available_bytes,
                largest_bytes=self.plan.budget_bytes,
            )

    def close_when_collected(self) -> None:
        """`close`, called by the garbage collector: in whatever thread it runs, and wherever that thread is."""
        if self._queue is None or self._queue.closes_here():
            self.close()
        else:
            threading.Thread(target=self.close, name="flexinfer-close", daemon=True).start()

    def close(self) -> None:
        """End the threads, close the files, let go of the weights. The model cannot run any more. Safe to call twice."""
        closed, self._closed = self._closed, True
        if self._follower is not None:
            self._follower.close()
        self._detach(CLOSED)  # a pass of another thread ends at its next weight
        with self._lock:
            self._detach(CLOSED)  # what that pass may have attached meanwhile
            self._locked.clear()
            self._in_few_bits.clear()
            if self._drafts is not None:
                self._drafts.model = None
            if isinstance(self._substitute_source, SubstituteFile):
                self._substitute_source.close()
            self._cache = None
            if self._kv is not None:
                self._kv.close()
            if self._reader is not None:
                self._reader.close()
            self._libraries.unlock()
        if not closed:
            self._leave_notes()

    def _leave_notes(self) -> None:
        """Say what the last passes waited for, and write the timeline."""
        if self._explained and self._trace.passes > self._explained["passes"]:
            self.explain()
        trace_file = self._options.trace
        if self._explained and not isinstance(trace_file, bool):
            try:
                write_trace(user_path(trace_file), self._trace.timeline())
            except OSError as error:
                warnings.warn(f"the trace could not be written: {error}", RuntimeWarning, stacklevel=3)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _count(locked: list[LockedPieces]) -> int:
    return sum(len(one.pieces) for one in locked)


def _checksums(
    skeleton: Skeleton, verify: bool | str | Path, progress: Callable[[str, int, int], None] | None
) -> Mapping[Path, Checksums] | None:
    if verify is False:
        return None
    if not skeleton.weights:
        raise ValueError(
            "verify=True: this model is loaded whole by transformers, which does not check what it reads"
        )
    return checksums_of(skeleton.checkpoint.files, None if verify is True else user_path(verify), progress)


def _keep(locked: list[LockedPieces], count: int) -> list[LockedPieces]:
    """The first `count` pieces of what is locked of a weight; the others are let go of."""
    kept = []
    for one in locked:
        if count <= 0:
            break
        have = len(one.pieces)
        if have > count:
            one.keep(count)
        kept.append(one)
        count -= have
    return kept


def _read_tensor(reader: FileReader, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    if spec.alternate is not None:
        half = replace(spec, shape=(*spec.shape[:-1], spec.shape[-1] // 2), alternate=None)
        both = (half, replace(spec.alternate, shape=half.shape))
        return torch.stack([_read_tensor(reader, one, dtype) for one in both], -1).flatten(-2)
    buffer = Buffer(padded_bytes(spec.offset_bytes, spec.nbytes), lock=False)
    position = (
        reader.read(spec.file, spec.offset_bytes, spec.nbytes, buffer.memory(0, buffer.nbytes))
        if spec.nbytes
        else 0
    )
    tensor = buffer.tensor(position, spec.torch_dtype, spec.shape)
    if spec.added:
        return tensor.add(spec.added).to(dtype)
    return tensor.to(dtype) if tensor.dtype != dtype else _copy_as_mapped(tensor, spec.offset_bytes)


def _copy_as_mapped(tensor: torch.Tensor, offset_bytes: int) -> torch.Tensor:
    """A copy that begins at such an address as it does where transformers maps the file: MKL may add up the products of a single row
    of fp32 in another order at an address that is no multiple of 16."""
    memory = torch.empty(tensor.nbytes + CACHE_LINE_BYTES, dtype=torch.uint8)
    start = (offset_bytes - memory.data_ptr()) % CACHE_LINE_BYTES
    if start % tensor.itemsize:  # transformers cannot map it either
        return tensor.clone()
    copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


@dataclass(frozen=True, slots=True)
class MemoryOfProcess:
    """What a process holds that has loaded no weight yet, in bytes."""

    anonymous_bytes: int
    libraries: LibraryPages  # that a pass touches; the others can be had again from disk
    file_bytes: int  # of those pages
    tokenizer: TokenizerMemory  # of the one beside the weights, if it is not loaded yet
    margin_bytes: int = MARGIN_BYTES

    @classmethod
    def measure(
        cls, skeleton: Skeleton, prepared: PreparedTokenizer | None = None, *, in_blocks: bool = False
    ) -> "MemoryOfProcess":
        """Measured after what every run does once, on a model of a few kilobytes, has been done."""
        libraries = rehearse_once(
            skeleton.dtype,
            skeleton.attention,
            dense=skeleton.dense,
            in_blocks=skeleton.in_blocks or in_blocks,
        )
        gc.collect()  # the dry run's model
        trim_heap()
        tokenizer = prepared.memory if prepared is not None else TokenizerMemory()
        return cls(anonymous_bytes(), libraries, libraries.nbytes or file_bytes(), tokenizer)

    def with_loaded(self, taken_bytes: int) -> "MemoryOfProcess":
        """The same process with its tokenizer, which took `taken_bytes`. The sum stays what it was before, so that what was accepted
        still is: what was taken too much is a part of the margin."""
        planned_bytes = self.tokenizer.stays_bytes + self.tokenizer.use_bytes
        return replace(
            self,
            anonymous_bytes=self.anonymous_bytes + taken_bytes,
            tokenizer=TokenizerMemory(use_bytes=max(0, planned_bytes - taken_bytes)),
            margin_bytes=max(0, self.margin_bytes - max(0, taken_bytes - planned_bytes)),
        )


def default_context(
    skeleton: Skeleton,
    measured: MemoryOfProcess,
    budget_bytes: int,
    logits_to_keep: int = 1,
    drafts: Drafts | None = None,
) -> int:
    """Tokens a model is loaded for when nothing is said: 2048, or the model's own limit if that is less; halved, down to
    128, while the KV cache and activations would take more than a quarter of the budget, or the rest not fit beside them.
    """
    context = min(2048, context_limit(skeleton.config))
    while context >= 2 * SMALLEST_DEFAULT_CONTEXT:
        fixed = fixed_memory(skeleton, measured, context, logits_to_keep, drafts)
        substitutes = drafts.substitutes if drafts is not None and not drafts.auto else None
        smallest_bytes = smallest_budget_bytes(skeleton.weights, fixed, skeleton.mixture, substitutes)
        fits = smallest_bytes <= budget_bytes
        if fits and fixed.kv_bytes + fixed.activation_bytes <= budget_bytes // 4:
            break
        context //= 2
    return context


def context_limit(config: PretrainedConfig) -> int:
    """The tokens that a model says it is made for; 2048 where it does not."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else 2048


def _resident_or_refused(
    checkpoint: Checkpoint,
    dtype: str | torch.dtype,
    budget_bytes: int,
    context: int | None,
    why: Exception,
) -> Skeleton:
    """The whole model in memory when the budget holds it; BudgetError, with the reason it cannot be streamed, when not."""
    smallest_bytes = (
        anonymous_bytes() + with_page_tables(resident_bytes(checkpoint, dtype, context)) + MARGIN_BYTES
    )
    if budget_bytes < smallest_bytes:
        raise BudgetError(f"{why}; resident it needs at least {name_budget(smallest_bytes)}") from None
    warnings.warn(f"{why}; it is kept in memory whole", RuntimeWarning, stacklevel=3)
    return load_resident(checkpoint, dtype)


def fixed_memory(
    skeleton: Skeleton,
    measured: MemoryOfProcess,
    context: int,
    logits_to_keep: int = 1,
    drafts: Drafts | None = None,
) -> Fixed:
    """What the process takes besides the weights of linears, with `context` tokens in the cache and in one pass."""
    state = skeleton.model.state_dict()
    kv_bytes, attention_bytes = reserved_bytes(
        skeleton.cache_layers, context, skeleton.kv_dtype, skeleton.dtype
    )
    activation_bytes = skeleton.meter.planned_bytes(context, logits_to_keep)
    return Fixed(
        process_bytes=measured.anonymous_bytes + measured.file_bytes,
        tokenizer_bytes=measured.tokenizer.stays_bytes + measured.tokenizer.use_bytes,
        resident_bytes=sum(state[name].numel() * state[name].dtype.itemsize for name in skeleton.resident),
        kv_bytes=kv_bytes,
        activation_bytes=activation_bytes,
        margin_bytes=measured.margin_bytes,
        context_tokens=context,
        draft_bytes=drafts.bytes_beside(context) if drafts is not None else 0,
        attention_bytes=attention_bytes,
        loading_bytes=measured.tokenizer.peak_bytes,
    )
