"""`from_pretrained`: a stock transformers model whose weights come from disk as they are needed.

The way: index the checkpoint, build the model empty (flexinfer.formats.skeleton), measure costs (flexinfer.machine), divide the budget
(flexinfer.plan), lock what the plan keeps, and put a `StreamedLinear` where each linear was. Everything else of the model, and
`generate()` with all that is built on it, stays transformers' own. Parameters that are no weight of a linear, such as fused
experts of a mixture, are not streamed: they stay in memory, or the budget is refused and they are named.
"""

import gc
import logging
import resource
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from flexinfer.formats.checkpoint import Checkpoint, TensorSpec
from flexinfer.formats.skeleton import NotStreamableError, Skeleton, build_skeleton, load_resident, resolve
from flexinfer.machine import available_bytes, measure_costs, peak_bytes
from flexinfer.perfetto import trace_path, write_trace
from flexinfer.plan import (
    BudgetError,
    Costs,
    Fixed,
    Plan,
    Weight,
    format_size,
    make_plan,
    parse_size,
    smallest_budget_bytes,
)
from flexinfer.report import bottleneck, memory_stall_s, plan_line
from flexinfer.streaming.cache import KVReserve
from flexinfer.streaming.linear import LockedRows, StreamedEmbedding, StreamedLinear, lock_rows
from flexinfer.streaming.memory import Buffer, return_freed_memory
from flexinfer.streaming.prefetch import Prefetcher
from flexinfer.streaming.reader import FileReader, padded_bytes
from flexinfer.trace import MAX_EVENTS, Progress, Trace

logger = logging.getLogger("flexinfer")

MARGIN_BYTES = 24 << 20  # threads' stacks, allocator, what a first pass imports
LARGE_PARAMETER_BYTES = 16 << 20
SMALLEST_DEFAULT_CONTEXT = 128


def from_pretrained(
    path_or_hub_id: str | Path,
    memory: str | int = "auto",
    *,
    policy: str = "balanced",
    window: str | int | None = None,
    io_threads: int = 2,
    direct: bool = True,
    context: int | None = None,
    dtype: str | torch.dtype = "auto",
    trace: bool | str | Path = False,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Load a causal LM that streams its weights from disk inside a memory budget.

    Args:
        path_or_hub_id: a checkpoint directory (safetensors), or a Hugging Face Hub id, taken from the local cache when
            it is there.
        memory: budget of the whole process, "4GiB" or bytes; "auto" takes what the machine or its cgroup has to spare.
        policy: what to keep in memory: "balanced" (ours), "unbalanced", "attention-first", "ffn-first", "algorithm1"
            (the paper's), "none".
        window: memory for prefetched weights: bytes, "64MiB", or "3 layers" (the paper's unit); None: 20 MiB.
        io_threads: reader threads; 0 reads synchronously, when a weight is needed.
        direct: read past the page cache (O_DIRECT); otherwise through it, dropping pages behind.
        context: tokens the KV cache and the activations are sized for, over all sequences of a batch; None: 2048,
            or the model's own limit, or fewer if they would take more than a quarter of the budget.
        dtype: "auto" (the checkpoint's), or what to compute in.
        trace: keep a timeline of reads, waits and kernels (`model.flexinfer.events()`); a path has `close()` write it
            there too, for https://ui.perfetto.dev.
        progress: called with (stage, bytes done, bytes in all) while parameters that stay are read ("load"), while memory
            is filled and locked ("lock"), and piece by piece in each pass ("pass").

    Returns:
        The transformers model, with its `Engine` as `model.flexinfer`.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one.
        BudgetError: `memory` or `window` is no size, or too small for this model; names the smallest that works.
        ValueError: another argument is wrong.
    """
    if io_threads < 0:
        raise ValueError(f"io_threads={io_threads} must be 0 (synchronous) or more")
    if context is not None and context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    trace_path(trace)
    return_freed_memory()  # before the dry run: what it frees would stay in the heap
    checkpoint = Checkpoint.open(resolve(path_or_hub_id))
    budget_bytes = available_bytes() if memory == "auto" else parse_size(memory)
    try:
        skeleton = build_skeleton(checkpoint, dtype)
    except NotStreamableError as error:
        skeleton = _resident_or_refused(checkpoint, dtype, budget_bytes, error)
    context = context or default_context(skeleton, budget_bytes)
    engine = Engine(
        skeleton,
        policy=policy,
        window=window,
        io_threads=io_threads,
        direct=direct,
        context=context,
        trace=trace,
        progress=progress,
    )
    try:
        engine.load(budget_bytes)
    except BaseException:
        engine.close()
        raise
    skeleton.model.flexinfer = engine  # type: ignore[assignment]
    weakref.finalize(skeleton.model, engine.close)
    return skeleton.model


class Engine:
    """The streaming side of a loaded model, reached as `model.flexinfer`. `close()` or a `with` block ends it."""

    plan: Plan
    context: int  # tokens the KV cache holds, over all sequences of a batch

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        policy: str = "balanced",
        window: str | int | None = None,
        io_threads: int = 2,
        direct: bool = True,
        context: int = 2048,
        trace: bool | str | Path = False,
        progress: Progress | None = None,
    ) -> None:
        self._policy, self._window, self._io_threads = policy, window, io_threads
        self._direct, self.context = direct, context
        self._trace = Trace(max_events=MAX_EVENTS if trace else 0, progress=progress)
        self._trace_path, self._progress = trace_path(trace), progress
        self._explained: dict[str, Any] = {}  # the statistics that explain() began from
        self._skeleton: Skeleton | None = skeleton
        self._weights, self._kernels = skeleton.weights, skeleton.kernels
        self._linears: dict[str, StreamedLinear] = {}
        self._locked: dict[str, list[LockedRows]] = {}
        self._reader: FileReader | None = None
        self._prefetcher: Prefetcher | None = None
        self._kv: KVReserve | None = None
        self._closed = False

    def load(self, budget_bytes: int) -> None:
        """Plan `budget_bytes`, read what stays, and put the streamed modules in place. Called once.

        Raises BudgetError before anything is read.
        """
        skeleton, self._skeleton = self._skeleton, None
        assert skeleton is not None
        gc.collect()  # the dry run's model
        self._fixed = fixed_memory(skeleton, self.context)
        self._costs = Costs(bandwidth_bytes_per_s=1.0, compute_s=1.0)
        self._make_plan(budget_bytes, skeleton)
        self._reader = FileReader(skeleton.checkpoint.files, direct=self._direct)
        self._costs = measure_costs(
            self._weights,
            self._kernels,
            self._reader,
            skeleton.dtype,
            max(1, self._io_threads),
            budget_bytes - self._fixed.process_bytes - MARGIN_BYTES // 2,
        )
        plan = self._make_plan(budget_bytes, skeleton)
        self._kv = KVReserve(skeleton.cache_layers, self.context, skeleton.dtype)
        self._place_modules(skeleton)
        self._apply(plan)
        skeleton.model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        skeleton.model.register_forward_hook(self._after_pass, always_call=True)
        self._explained = self.stats()
        logger.info("%s", plan_line(self.plan))

    def _make_plan(self, budget_bytes: int, skeleton: Skeleton | None = None) -> Plan:
        try:
            return make_plan(
                self._weights,
                self._fixed,
                budget_bytes,
                self._costs,
                policy=self._policy,
                window=self._window,
            )
        except BudgetError as error:
            large = [
                s.name
                for s in (skeleton.resident if skeleton else {}).values()
                if s.nbytes > LARGE_PARAMETER_BYTES
            ]
            if not large:
                raise
            raise BudgetError(
                f"{error} {large[0]} and {len(large) - 1} more are not weights of linears (experts of a mixture, perhaps); "
                "they cannot be streamed yet and have to stay in memory."
            ) from None

    def _place_modules(self, skeleton: Skeleton) -> None:
        """Read the parameters that stay, and put streamed modules where the linears and the input embedding were."""
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
            if self._progress is not None:
                self._progress("load", done_bytes, all_bytes)
        for weight in self._weights:
            path = weight.name.removesuffix(".weight")
            module: Any = model.get_submodule(path)
            linear = StreamedLinear(
                weight, self._kernels[weight.name], module.weight.shape, dtype, module.bias, self._trace
            )
            model.set_submodule(path, linear)
            self._linears[weight.name] = linear
        if self._weights:
            embedding: Any = model.get_input_embeddings()
            name = skeleton.embedding_name
            spec = skeleton.specs[name + ".weight"]
            model.set_submodule(name, StreamedEmbedding(embedding, self._row_reader(spec), spec, dtype))

    def _row_reader(self, spec: TensorSpec) -> Callable[[int, memoryview], int]:
        row_bytes = spec.shape[1] * spec.torch_dtype.itemsize

        def read_row(row: int, into: memoryview) -> int:
            assert self._reader is not None
            self._trace.bytes_read += padded_bytes(spec.offset_bytes + row * row_bytes, row_bytes)
            return self._reader.read(spec.file, spec.offset_bytes + row * row_bytes, row_bytes, into)

        return read_row

    def _apply(self, plan: Plan) -> None:
        """Make memory what `plan` says: shrink first, so that no more than the larger budget is ever in use."""
        assert self._reader is not None
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        changed = [
            w
            for w in self._weights
            if plan.locked_pieces.get(w.name, 0) != _pieces_in(w, self._locked.get(w.name, []))
        ]
        for weight in changed:
            self._linears[weight.name].detach("the memory budget is being changed")
            self._locked.pop(weight.name, None)
        schedule = [piece for w in self._weights for piece in w.pieces[plan.locked_pieces.get(w.name, 0) :]]
        with ThreadPoolExecutor(max(1, self._io_threads)) as pool:
            reader = self._reader
            counts = [plan.locked_pieces.get(w.name, 0) for w in changed]
            done_bytes = 0
            all_bytes = sum(p.nbytes for w, n in zip(changed, counts, strict=True) for p in w.pieces[:n])
            for weight, rows in zip(
                changed,
                pool.map(lambda w, n: lock_rows(w, n, self._kernels[w.name], reader), changed, counts),
                strict=True,
            ):
                self._locked[weight.name] = rows
                done_bytes += sum(row.nbytes for row in rows)
                if self._progress is not None and rows:
                    self._progress("lock", done_bytes, all_bytes)
        if schedule:
            self._prefetcher = Prefetcher(
                schedule,
                reader,
                self._trace,
                slots=plan.slots,
                slot_bytes=plan.slot_bytes,
                window_layers=plan.window_layers,
                io_threads=self._io_threads,
            )
        place = 0
        for weight in self._weights:
            streamed = weight.pieces[plan.locked_pieces.get(weight.name, 0) :]
            places = list(enumerate(streamed, place))
            place += len(streamed)
            self._linears[weight.name].attach(self._locked.get(weight.name, []), places, self._prefetcher)
        self.plan = plan
        self._trace.set_memory(plan.budget_bytes, plan.locked_bytes, plan.window_bytes, plan.total_bytes)

    def _before_pass(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self._closed:
            raise RuntimeError("this model is closed; load it again with flexinfer.from_pretrained()")
        self._trace.begin_pass()
        inputs = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None),
            None,
        )
        if inputs is not None:
            self._trace.tokens += inputs.shape[0] * inputs.shape[1]
        cache = kwargs.get("past_key_values")
        if self._kv is not None and isinstance(cache, DynamicCache):
            if self._trace.passes > self._explained["passes"] + 1 and not cache.get_seq_length():
                self.explain()  # another text begins
            self._kv.adopt(cache)
        return args, kwargs

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._closed:
            return
        self._trace.end_pass()

    def stats(self) -> dict[str, Any]:
        """Counters since loading: passes over the weights, tokens (rows) that went through, bytes and seconds."""
        trace = self._trace
        return {
            "passes": trace.passes,
            "tokens": trace.tokens,
            "bytes_read": trace.bytes_read,
            "reads": trace.reads,
            "pass_s": trace.pass_s,
            "compute_s": trace.pass_s - trace.wait_s,
            "wait_s": trace.wait_s,
            "peak_bytes": peak_bytes(),
            "resyncs": trace.resyncs,
            "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
            "memory_stall_s": memory_stall_s(),
        }

    def explain(self) -> str:
        """Why the passes since the last call, or since loading, took as long as they did, as "disk: ..." (kernels, memory,
        order). Also logged (logger "flexinfer", INFO), without being called, when another text begins and at close().
        """
        before, self._explained = self._explained, self.stats()
        text = bottleneck(before, self._explained, self.plan)
        logger.info("%s", text)
        return text

    def events(self) -> list[dict[str, Any]]:
        """The timeline of reads, waits and kernels, oldest first; empty unless loaded with trace=True."""
        return self._trace.events()

    def resize(self, memory: str | int) -> Plan:
        """Change the budget of the live model; between passes. Returns the new plan.

        Raises BudgetError, and leaves all as it is, when `memory` is too small.
        """
        if self._closed:
            raise RuntimeError("this model is closed; load it again with flexinfer.from_pretrained()")
        self._apply(self._make_plan(parse_size(memory)))
        return self.plan

    def close(self) -> None:
        """End the threads, close the files, let go of the weights. The model cannot run any more. Safe to call twice."""
        closed, self._closed = self._closed, True
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        for linear in self._linears.values():
            linear.detach("this model is closed; load it again with flexinfer.from_pretrained()")
        self._locked.clear()
        if self._kv is not None:
            self._kv.close()
        if self._reader is not None:
            self._reader.close()
        if not closed:
            self._leave_notes()

    def _leave_notes(self) -> None:
        """Say what the last passes waited for, and write the timeline."""
        if self._explained and self._trace.passes > self._explained["passes"]:
            self.explain()
        if self._explained and self._trace_path is not None:
            try:
                write_trace(self._trace_path, self._trace.timeline())
            except OSError as error:
                warnings.warn(f"the trace could not be written: {error}", RuntimeWarning, stacklevel=3)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def _pieces_in(weight: Weight, locked: list[LockedRows]) -> int:
    stop = locked[-1].row_stop if locked else 0
    return sum(piece.row_stop <= stop for piece in weight.pieces)


def _read_tensor(reader: FileReader, spec: TensorSpec, dtype: torch.dtype) -> torch.Tensor:
    buffer = Buffer(padded_bytes(spec.offset_bytes, spec.nbytes), lock=False)
    position = (
        reader.read(spec.file, spec.offset_bytes, spec.nbytes, buffer.memory(0, buffer.nbytes))
        if spec.nbytes
        else 0
    )
    return buffer.tensor(position, spec.torch_dtype, spec.shape).to(dtype, copy=True)


def default_context(skeleton: Skeleton, budget_bytes: int) -> int:
    """Tokens a model is loaded for when nothing is said: 2048, or the model's own limit if that is less; halved, down to
    128, while the KV cache and activations would take more than a quarter of the budget, or the rest not fit beside them.
    """
    context = min(2048, getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", 2048))
    while context >= 2 * SMALLEST_DEFAULT_CONTEXT:
        fixed = fixed_memory(skeleton, context)
        fits = smallest_budget_bytes(skeleton.weights, fixed) <= budget_bytes
        if fits and fixed.kv_bytes + fixed.activation_bytes <= budget_bytes // 4:
            break
        context //= 2
    return context


def _resident_or_refused(
    checkpoint: Checkpoint, dtype: str | torch.dtype, budget_bytes: int, why: Exception
) -> Skeleton:
    """The whole model in memory when the budget holds it; BudgetError, with the reason it cannot be streamed, when not."""
    files_bytes = sum(spec.nbytes for spec in checkpoint.tensors.values())
    smallest_bytes = psutil.Process().memory_info().rss + files_bytes + MARGIN_BYTES
    if budget_bytes < smallest_bytes:
        raise BudgetError(
            f"{why}; resident it needs at least memory={smallest_bytes} bytes ({format_size(smallest_bytes)})"
        ) from None
    warnings.warn(f"{why}; it is kept in memory whole", RuntimeWarning, stacklevel=3)
    return load_resident(checkpoint, dtype)


def fixed_memory(skeleton: Skeleton, context: int) -> Fixed:
    """What the process takes besides the weights of linears, with `context` tokens in the cache and in one pass."""
    config = skeleton.model.config.get_text_config()
    state = skeleton.model.state_dict()
    itemsize = skeleton.dtype.itemsize
    widest = max(
        (
            max((w.pieces[-1].row_stop for w in skeleton.weights if w.kind != "head"), default=0),
            config.hidden_size,
        )
    )
    per_row_bytes = itemsize * (6 * config.hidden_size + 3 * widest) + 4 * 3 * config.hidden_size
    head_bytes = config.vocab_size * (itemsize + 4) * 4
    return Fixed(
        process_bytes=psutil.Process().memory_info().rss,
        resident_bytes=sum(state[name].numel() * state[name].dtype.itemsize for name in skeleton.resident),
        kv_bytes=sum(layer.nbytes(context, itemsize) for layer in skeleton.cache_layers),
        activation_bytes=context * per_row_bytes + head_bytes,
        margin_bytes=MARGIN_BYTES,
        context_tokens=context,
    )
