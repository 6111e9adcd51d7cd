"""`from_pretrained`: a stock transformers model whose weights come from disk as they are needed.

The way: resolve the checkpoint, build the model empty, find the decoder stack and its linears, learn the order in which
they run from a pass on the meta device, plan the budget, lock what the plan keeps, and put a `StreamedLinear` where each
linear was. Everything else of the model, and `generate()` with all that is built on it, stays transformers' own.

Works for any causal LM whose decoder layers are made of `nn.Linear` (or GPT-2's `Conv1D`). Parameters of other kinds, such
as fused experts of a mixture, are not streamed: they stay in memory, or the budget is refused and they are named.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from flexinfer.cache import KVReserve, LayerShape
from flexinfer.checkpoint import Checkpoint, CheckpointError, TensorSpec
from flexinfer.linear import (
    Conv1DKernel,
    DenseKernel,
    Kernel,
    LockedRows,
    PackedKernel,
    StreamedEmbedding,
    StreamedLinear,
    lock_rows,
    measure_compute_s,
)
from flexinfer.memory import Buffer, round_up
from flexinfer.packed import QUANT_METHOD, PackedFormat, blocks, packed_nbytes
from flexinfer.plan import BudgetError, Costs, Fixed, Kind, Piece, Plan, Weight, make_plan, parse_size
from flexinfer.prefetch import FileReader, Prefetcher, padded_bytes
from flexinfer.trace import Trace

PIECE_BYTES = 4 << 20  # requests of this size read fastest here (docs/performance.md)
ROW_MULTIPLE = 64  # pieces are cut at multiples of this many rows
FLOAT_DTYPES = {"BF16", "F16", "F32"}
MARGIN_BYTES = 48 << 20  # threads' stacks, allocator, page tables
LARGE_PARAMETER_BYTES = 16 << 20


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
    trace: bool = False,
) -> PreTrainedModel:
    """Load a causal LM that streams its weights from disk inside a memory budget.

    Args:
        path_or_hub_id: a checkpoint directory (safetensors), or a Hugging Face Hub id, taken from the local cache when
            it is there.
        memory: budget of the whole process, "4GiB" or bytes; "auto" takes what the machine or its cgroup has to spare.
        policy: what to keep in memory: "balanced" (ours), "unbalanced", "attention-first", "ffn-first", "algorithm1"
            (the paper's), "none".
        window: memory for prefetched weights: bytes, "64MiB", or "3 layers" (the paper's unit); None: 32 MiB.
        io_threads: reader threads; 0 reads synchronously, when a weight is needed.
        direct: read past the page cache (O_DIRECT); otherwise through it, dropping pages behind.
        context: tokens the KV cache and the activations are sized for, over all sequences of a batch; None: 2048, or
            the model's own limit if that is less.
        dtype: "auto" (the checkpoint's), or what to compute in.
        trace: keep a timeline of reads, waits and kernels (`model.flexinfer.events()`).

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
    path = resolve(path_or_hub_id)
    skeleton = build_skeleton(Checkpoint.open(path), dtype)
    context = context or min(
        2048, getattr(skeleton.model.config.get_text_config(), "max_position_embeddings", 2048)
    )
    budget_bytes = available_bytes() if memory == "auto" else parse_size(memory)
    engine = Engine(
        skeleton,
        policy=policy,
        window=window,
        io_threads=io_threads,
        direct=direct,
        context=context,
        trace=trace,
    )
    try:
        engine.load(budget_bytes)
    except BaseException:
        engine.close()
        raise
    skeleton.model.flexinfer = engine
    weakref.finalize(skeleton.model, engine.close)
    return skeleton.model


def resolve(path_or_hub_id: str | Path) -> Path:
    """The checkpoint directory: a local one, or a snapshot in the Hugging Face cache (downloaded if need be)."""
    if Path(path_or_hub_id).is_dir():
        return Path(path_or_hub_id)
    name = str(path_or_hub_id)
    if isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CheckpointError(f"{name}: no such directory, and not a Hub id of the form 'owner/name'")
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
    except Exception:
        try:
            return Path(snapshot_download(name, allow_patterns=wanted))
        except Exception as error:
            raise CheckpointError(
                f"{name}: neither a directory, nor in the Hugging Face cache, nor to be had from the Hub ({error})"
            ) from error


def available_bytes() -> int:
    """Memory this process may have: what is free on the machine or in its cgroup, and what it has already, less 10 %."""
    own_bytes = psutil.Process().memory_info().rss
    limit_bytes = psutil.virtual_memory().available + own_bytes
    for limit_file in _cgroup_limit_files():
        with contextlib.suppress(OSError, ValueError):
            limit_bytes = min(limit_bytes, int(limit_file.read_text()))
    return int(limit_bytes * 0.9)


def _cgroup_limit_files() -> Iterator[Path]:
    """The memory limits this process is under, its own cgroup's and those above (v1 and v2)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            root, name = (Path("/sys/fs/cgroup"), "memory.max")
            if controllers:
                if "memory" not in controllers.split(","):
                    continue
                root, name = root / "memory", "memory.limit_in_bytes"
            here = root / group.lstrip("/")
            yield from (folder / name for folder in (here, *here.parents) if folder.is_relative_to(root))


# ---- the empty model and what it is made of


@dataclass(slots=True)
class Skeleton:
    """A model with no weights yet, and where each of them is."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]  # by the model's parameter name
    weights: list[Weight]  # the streamable ones, in order of use
    kernels: dict[str, Kernel]  # by the name of the weight
    cache_layers: list[LayerShape]

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def resident(self) -> dict[str, TensorSpec]:
        """Parameters and buffers that are read once and stay."""
        not_read = {weight.name for weight in self.weights} | {self.embedding_name + ".weight"}
        return {name: spec for name, spec in self.specs.items() if name not in not_read}

    @property
    def embedding_name(self) -> str:
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is embedding)


def build_skeleton(checkpoint: Checkpoint, dtype: str | torch.dtype = "auto") -> Skeleton:
    """The empty model for `checkpoint`, with every parameter matched to a tensor. Reads no weights.

    Raises CheckpointError when config.json is of no causal LM, tensors are missing or have the wrong shape, or the
    weights would have to be converted to fit.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.path}/config.json: not a model that transformers knows ({error})"
        ) from error
    packed = _packed_format(config)
    compute_dtype = _compute_dtype(dtype, config, checkpoint)
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}/config.json: no causal LM ({error})") from error
    model.eval().requires_grad_(False)
    if (checkpoint.path / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(checkpoint.path)

    specs = _match(model, checkpoint, packed)
    linears = {linear.name: linear for linear in find_linears(model)}
    order, cache_layers = _dry_run(config, compute_dtype, linears.keys())
    parts = [_weight_of(linears[name], specs, packed, compute_dtype) for name in order]
    return Skeleton(
        model=model,
        checkpoint=checkpoint,
        specs=specs,
        weights=[weight for weight, _ in parts],
        kernels={weight.name: kernel for weight, kernel in parts},
        cache_layers=cache_layers,
    )


def _packed_format(config: PretrainedConfig) -> PackedFormat | None:
    """The packing of a checkpoint that `flexinfer quantize` wrote, or None. Refuses other quantised checkpoints."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    method = quantization.get("quant_method")
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"quantization_config: this checkpoint is quantised by {method!r}, which is not supported; take the original "
            "checkpoint and, if it should be small, run `flexinfer quantize SRC DST --bits 4`"
        )
    del config.quantization_config
    return PackedFormat.from_config(quantization)


def _compute_dtype(dtype: str | torch.dtype, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype, None)
        if not isinstance(named, torch.dtype):
            raise ValueError(
                f"dtype={dtype!r} is no torch dtype; choose 'auto', 'bfloat16', 'float16' or 'float32'"
            )
        dtype = named
    if isinstance(dtype, torch.dtype):
        if dtype not in {torch.bfloat16, torch.float16, torch.float32}:
            raise ValueError(
                f"dtype={dtype} is not supported; choose 'auto', 'bfloat16', 'float16' or 'float32'"
            )
        return dtype
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(
        (spec.torch_dtype for spec in checkpoint.tensors.values() if spec.dtype in FLOAT_DTYPES),
        torch.float32,
    )


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear that can be streamed, and its place in the model."""

    name: str  # of the module
    module: nn.Module
    role: str  # its name within a layer
    layer: int  # the number of layers for the output head
    kind: Kind

    @property
    def features(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        if isinstance(self.module, Conv1D):
            return self.module.nf, self.module.nx
        assert isinstance(self.module, nn.Linear)
        return self.module.out_features, self.module.in_features


def find_linears(model: PreTrainedModel) -> list[Linear]:
    """The linears that can be streamed: those of the decoder stack, and the output head.

    The stack is the `nn.ModuleList` with the most parameters. Subclasses of `nn.Linear` may compute something else, so
    only `nn.Linear` itself and `Conv1D` are taken.
    """
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__}: no stack of decoder layers found; this architecture cannot be streamed"
        )
    stack_name, stack = max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    found = []
    for layer, decoder_layer in enumerate(stack):
        for role, module in decoder_layer.named_modules():
            if type(module) in {nn.Linear, Conv1D}:
                kind: Kind = "attention" if "attn" in role or "attention" in role else "ffn"
                found.append(Linear(f"{stack_name}.{layer}.{role}", module, role, layer, kind))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        name = next(name for name, module in model.named_modules() if module is head)
        found.append(Linear(name, head, name, len(stack), "head"))
    return found


def _match(
    model: PreTrainedModel, checkpoint: Checkpoint, packed: PackedFormat | None
) -> dict[str, TensorSpec]:
    """The tensor of each parameter and persistent buffer, by transformers' own renaming rules."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    specs: dict[str, TensorSpec] = {}
    converted: list[str] = []
    for name, spec in checkpoint.tensors.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is not None and name not in state:
            converted.append(name)
        elif name in state:
            specs[name] = spec
        elif target in state:
            specs[target] = spec
    if converted:
        raise CheckpointError(
            f"{checkpoint.path}: {converted[0]} and {len(converted) - 1} more tensors are stored apart and joined when "
            f"transformers loads {type(model).__name__} (experts of a mixture, as a rule); they cannot be streamed yet"
        )
    if model.config.get_text_config().tie_word_embeddings:
        for target, source in (getattr(model, "_tied_weights_keys", None) or {}).items():
            if source in specs and (target not in specs or packed is None):
                specs[target] = specs[source]
    if missing := sorted(
        name for name, _ in model.named_parameters(remove_duplicate=False) if name not in specs
    ):
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors of {type(model).__name__} are not in it, such as {missing[0]!r}; "
            "the checkpoint is incomplete or of another model"
        )
    for name, spec in specs.items():
        if tuple(state[name].shape) != spec.shape and not (packed and spec.dtype == "U8"):
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} has shape {list(spec.shape)}, config.json says {list(state[name].shape)}; "
                "the two do not belong together"
            )
    return specs


def _dry_run(
    config: PretrainedConfig, dtype: torch.dtype, linears: Collection[str]
) -> tuple[list[str], list[LayerShape]]:
    """One pass on the meta device: the order in which the linears run, and what a token keeps in each cache layer."""
    order: list[str] = []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for name, module in model.named_modules():
            if name in linears:
                module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(name))
        cache = DynamicCache(config=config.get_text_config(decoder=True))
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache, use_cache=True)
    layers = [
        LayerShape(
            key=(layer.keys.shape[1], layer.keys.shape[3]),
            value=(layer.values.shape[1], layer.values.shape[3]),
            window=getattr(layer, "sliding_window", None),
        )
        for layer in cache.layers
    ]
    once = list(dict.fromkeys(order))
    return once + [name for name in linears if name not in once], layers


def _weight_of(
    linear: Linear, specs: dict[str, TensorSpec], packed: PackedFormat | None, dtype: torch.dtype
) -> tuple[Weight, Kernel]:
    name = linear.name + ".weight"
    spec = specs[name]
    out_features, in_features = linear.features
    kernel: Kernel
    if packed is not None and spec.dtype == "U8":
        if spec.nbytes != packed_nbytes(packed, out_features, in_features):
            raise CheckpointError(
                f"{spec.file}: packed tensor {name!r} has {spec.nbytes} bytes, its shape needs "
                f"{packed_nbytes(packed, out_features, in_features)}; quantise the original again"
            )
        kernel = PackedKernel(in_features, packed)
        cuts = [
            (b.row_start, b.row_stop, b.offset_bytes, b.nbytes)
            for b in blocks(packed, out_features, in_features)
        ]
    else:
        if spec.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{spec.file}: {name!r} has dtype {spec.dtype}; the weight of a linear can be {', '.join(sorted(FLOAT_DTYPES))}"
            )
        row_bytes = in_features * spec.torch_dtype.itemsize
        if isinstance(linear.module, Conv1D):
            kernel, rows = Conv1DKernel(in_features, spec.torch_dtype, dtype), out_features
        else:
            kernel = DenseKernel(in_features, spec.torch_dtype, dtype)
            count = -(-out_features * row_bytes // PIECE_BYTES)
            rows = round_up(-(-out_features // count), ROW_MULTIPLE)
        starts = range(0, out_features, rows)
        cuts = [
            (i, min(i + rows, out_features), i * row_bytes, min(rows, out_features - i) * row_bytes)
            for i in starts
        ]
    pieces = []
    for start, stop, offset_bytes, nbytes in cuts:
        offset_bytes += spec.offset_bytes
        memory_bytes = padded_bytes(offset_bytes, nbytes)
        pieces.append(Piece(name, linear.layer, start, stop, spec.file, offset_bytes, nbytes, memory_bytes))
    return Weight(name, linear.role, linear.layer, linear.kind, tuple(pieces)), kernel


# ---- the running model


class Engine:
    """The streaming side of a loaded model, reached as `model.flexinfer`. `close()` or a `with` block ends it."""

    plan: Plan

    def __init__(
        self,
        skeleton: Skeleton,
        *,
        policy: str = "balanced",
        window: str | int | None = None,
        io_threads: int = 2,
        direct: bool = True,
        context: int = 2048,
        trace: bool = False,
    ) -> None:
        self._policy, self._window, self._io_threads = policy, window, io_threads
        self._direct, self._context = direct, context
        self._trace = Trace(max_events=200_000 if trace else 0)
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
        self._fixed = _fixed(skeleton, self._context)
        self._costs = Costs(bandwidth_bytes_per_s=1.0, compute_s=1.0)
        self._make_plan(budget_bytes, skeleton)
        self._reader = FileReader(skeleton.checkpoint.files, direct=self._direct)
        self._costs = measure_costs(
            self._weights, self._kernels, self._reader, skeleton.dtype, max(1, self._io_threads)
        )
        plan = self._make_plan(budget_bytes, skeleton)
        self._kv = KVReserve(skeleton.cache_layers, self._context, skeleton.dtype)
        self._place_modules(skeleton)
        self._apply(plan)
        skeleton.model.register_forward_pre_hook(self._before_pass, with_kwargs=True)
        skeleton.model.register_forward_hook(self._after_pass, always_call=True)

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
        for name, spec in skeleton.resident.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            stock = getattr(module, leaf)
            tensor = _read_tensor(self._reader, spec, stock.dtype)
            if isinstance(stock, nn.Parameter):
                module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                module.register_buffer(leaf, tensor)
        for weight in self._weights:
            path = weight.name.removesuffix(".weight")
            module = model.get_submodule(path)
            linear = StreamedLinear(
                weight, self._kernels[weight.name], module.weight.shape, dtype, module.bias, self._trace
            )
            model.set_submodule(path, linear)
            self._linears[weight.name] = linear
        embedding, name = model.get_input_embeddings(), skeleton.embedding_name
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
            for weight, rows in zip(
                changed,
                pool.map(lambda w, n: lock_rows(w, n, self._kernels[w.name], reader), changed, counts),
                strict=True,
            ):
                self._locked[weight.name] = rows
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

    def _before_pass(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        if self._closed:
            raise RuntimeError("this model is closed; load it again with flexinfer.from_pretrained()")
        self._pass_start_s = perf_counter()
        inputs = next(
            (x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None),
            None,
        )
        if inputs is not None:
            self._trace.tokens += inputs.shape[0] * inputs.shape[1]
        cache = kwargs.get("past_key_values")
        if self._kv is not None and isinstance(cache, DynamicCache):
            self._kv.adopt(cache)
        return args, kwargs

    def _after_pass(self, model: nn.Module, args: Any, output: Any) -> None:
        self._trace.passes += 1
        self._trace.pass_s += perf_counter() - self._pass_start_s

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
            "peak_bytes": _peak_bytes(),
            "resyncs": trace.resyncs,
        }

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
        self._closed = True
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


def _fixed(skeleton: Skeleton, context: int) -> Fixed:
    """What the process takes besides the weights of linears, with `context` tokens in the cache and in one pass."""
    config = skeleton.model.config.get_text_config()
    state = skeleton.model.state_dict()
    itemsize = skeleton.dtype.itemsize
    widest = max(
        (max(w.pieces[-1].row_stop for w in skeleton.weights if w.kind != "head"), config.hidden_size)
    )
    per_row_bytes = itemsize * (6 * config.hidden_size + 3 * widest) + 4 * 3 * config.hidden_size
    head_bytes = config.vocab_size * (itemsize + 4) * 4
    return Fixed(
        process_bytes=psutil.Process().memory_info().rss,
        resident_bytes=sum(state[name].numel() * state[name].dtype.itemsize for name in skeleton.resident),
        kv_bytes=sum(layer.nbytes(context, itemsize) for layer in skeleton.cache_layers),
        activation_bytes=context * per_row_bytes + head_bytes,
        margin_bytes=MARGIN_BYTES,
    )


def measure_costs(
    weights: list[Weight], kernels: dict[str, Kernel], reader: FileReader, dtype: torch.dtype, io_threads: int
) -> Costs:
    """Bandwidth of reading the first 64 MiB of weights, and the compute time of a pass from one piece of each role."""
    pieces = [piece for weight in weights for piece in weight.pieces]
    sample = [piece for i, piece in enumerate(pieces) if sum(p.nbytes for p in pieces[:i]) < 64 << 20]
    start_s = perf_counter()
    with ThreadPoolExecutor(io_threads) as pool:
        buffers = [Buffer(max(p.memory_bytes for p in sample), lock=False) for _ in range(io_threads)]

        def read_every(worker: int) -> None:
            for piece in sample[worker::io_threads]:
                reader.read(
                    piece.file,
                    piece.offset_bytes,
                    piece.nbytes,
                    buffers[worker].memory(0, buffers[worker].nbytes),
                )

        list(pool.map(read_every, range(io_threads)))
    bandwidth = sum(piece.nbytes for piece in sample) / (perf_counter() - start_s)
    seconds_per_byte = {}
    for weight in weights:
        if weight.role not in seconds_per_byte:
            piece = weight.pieces[0]
            seconds_per_byte[weight.role] = (
                measure_compute_s(kernels[weight.name], piece, dtype) / piece.nbytes
            )
    return Costs(bandwidth, sum(w.nbytes * seconds_per_byte[w.role] for w in weights))


def _peak_bytes() -> int:
    """The most memory this process ever had resident (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
