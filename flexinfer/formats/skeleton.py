"""The empty model: a stock transformers model without weights, and where each of its weights lies in the checkpoint.

Works for any causal LM whose decoder layers are made of `nn.Linear` (or GPT-2's `Conv1D`); there is no file per family. The
decoder stack and its linears are found by their types, tensors are matched to parameters by transformers' own renaming
rules, and the order of use and the shape of the KV cache are learnt from one pass on the meta device, which computes
nothing. Reads headers, never weights.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexinfer.activations import PassMeter, Product, meta_model
from flexinfer.imports import deferred

with deferred():
    from accelerate import init_empty_weights
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import DynamicIndexedLayer
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_renamings,
        rename_source_key,
    )
    from transformers.pytorch_utils import Conv1D

from flexinfer.formats.checkpoint import (
    FLOAT_NAMES,
    Checkpoint,
    CheckpointError,
    TensorSpec,
    local_checkpoint,
)
from flexinfer.formats.config import (
    load_config,
    refusing,
    set_generation_config,
)
from flexinfer.formats.experts import (
    Experts,
    JoinedTensors,
    Matrix,
    Parts,
    Route,
    Router,
    build_experts,
    check_shapes,
    parameters_of,
    split_stacked,
)
from flexinfer.formats.gguf import SPLIT_NAME
from flexinfer.formats.gguf_model import specs_of
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import ColumnsKernel, Conv1DKernel, DenseKernel
from flexinfer.messages import cause, shown
from flexinfer.mixture import Mixture
from flexinfer.plan import Kind, Piece, Weight
from flexinfer.streaming.cache import LayerShape
from flexinfer.streaming.experts import IMPLEMENTATION, expert_modules, register
from flexinfer.streaming.memory import Buffer, round_up
from flexinfer.streaming.reader import padded_bytes

PIECE_BYTES = 4 << 20  # large enough for the disk, small enough that a window of several is little memory
ROW_MULTIPLE = 64  # pieces are cut at multiples of this many rows
TABLES_BYTES = 64 << 20  # that masks, positions and other tables of a model may take, whatever its weights


def resolve(
    path_or_hub_id: str | Path, gguf_file: str | None = None, fetching: Callable[[], None] | None = None
) -> Path:
    """The checkpoint directory, or the GGUF file: a local one, or in the Hugging Face cache (downloaded if need be).

    gguf_file: the file's name in the directory or on the Hub, as transformers' argument of that name.
    fetching: called before a download begins.
    """
    found = local_checkpoint(path_or_hub_id)
    if found is not None and found.is_dir():
        return found / (gguf_file or "")
    if found is not None:
        if gguf_file is not None:
            raise CheckpointError(f"{found}: a GGUF file already; leave gguf_file={gguf_file!r} out")
        return found
    name = str(path_or_hub_id)
    local = isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~", "file:"))
    local = local or name.lower().endswith((".gguf", ".safetensors"))
    if local or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: no such directory, and not a Hub id of the form 'owner/name'; nor is there a file of that name"
        )
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    if gguf_file is not None:
        wanted = [SPLIT_NAME.sub(r"\1-*-of-\3.[gG][gG][uU][fF]", gguf_file)]
    try:
        cached = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True)) / (
            gguf_file or ""
        )
        Checkpoint.open(cached)  # all of it: a tokenizer that was loaded alone leaves a part of a snapshot
        return cached
    except Exception as why:
        if fetching is not None:
            fetching()
        try:
            return Path(snapshot_download(name, allow_patterns=wanted)) / (gguf_file or "")
        except Exception as error:
            partial = f", nor whole in the Hub cache ({why})" if isinstance(why, CheckpointError) else ""
            raise CheckpointError(
                f"{name}: neither a directory{partial}, nor to be had from the Hub ({cause(error)}); check the name and the network"
            ) from error


class NotStreamableError(CheckpointError):
    """A checkpoint whose weights transformers has to convert before use. Names the first of them."""


@dataclass(slots=True)
class Skeleton:
    """A model with no weights yet, and where each of them is."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    specs: dict[str, TensorSpec]  # by the model's parameter name
    weights: list[Weight]  # the streamable ones that every token needs, in order of use
    experts: Experts | None  # those of a mixture
    kernels: dict[str, Kernel]  # by the name of the weight
    row_orders: dict[str, torch.Tensor]  # of weights whose rows the file has in another order
    together: list[list[str]]  # weights that are given the same input, one after another
    cache_layers: list[LayerShape]
    kv_dtype: torch.dtype  # what the KV cache is kept in
    meter: PassMeter

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def attention(self) -> str:
        """How attention is computed: transformers' name of it."""
        return self.model.config.get_text_config()._attn_implementation or "eager"

    @property
    def dense(self) -> bool:
        """Whether weights are multiplied as floats, by torch's own kernels."""
        return any(isinstance(kernel, DenseKernel | ColumnsKernel) for _, kernel in self.used)

    @property
    def in_blocks(self) -> bool:
        """Whether weights lie in ggml's blocks."""
        return any(spec.encoding.torch_name is None for spec in self.specs.values())

    @property
    def mixture(self) -> Mixture | None:
        """The experts, for a plan."""
        return self.experts.mixture if self.experts is not None else None

    @property
    def used(self) -> list[tuple[Weight, Kernel]]:
        """The weights that a token uses: those that every token needs, and as many experts of each layer as one does."""
        dense = [(weight, self.kernels[weight.name]) for weight in self.weights]
        return dense + (self.experts.of_a_token() if self.experts is not None else [])

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


def build_skeleton(
    checkpoint: Checkpoint, dtype: str | torch.dtype = "auto", kv_dtype: str | torch.dtype = "auto"
) -> Skeleton:
    """The empty model for `checkpoint`, with every parameter matched to a tensor. Reads no weights.

    Sizes are compared on the meta device, before anything is allocated by them. Raises CheckpointError when config.json is of no
    causal LM, tensors are missing or have the wrong shape, or the weights would have to be converted to fit.
    """
    file = checkpoint.config_file
    config = load_config(checkpoint)
    _refuse_quantized(config, file)
    compute_dtype = _compute_dtype(dtype, config, checkpoint)
    kept_dtype = _dtype(kv_dtype) or (torch.float16 if checkpoint.in_gguf else compute_dtype)
    if kept_dtype.itemsize > compute_dtype.itemsize:
        kept_dtype = compute_dtype
    register()
    config._experts_implementation = IMPLEMENTATION
    with refusing(file, "no causal LM"):
        shapes = meta_model(config, compute_dtype)
    with refusing(file, "a model that cannot be streamed"):
        specs, expert_parts = _match(shapes, checkpoint)
        _check_tables(shapes, checkpoint, file)
        with deferred(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=compute_dtype, trust_remote_code=False)
        model.eval().requires_grad_(False)
        set_generation_config(model, checkpoint)
        linears = {linear.name: linear for linear in find_linears(model)}
        order, together, cache_layers, routes = _dry_run(shapes, linears.keys())
        experts = _experts(shapes, expert_parts, routes, compute_dtype)
        parts = [_weight_of(linears[name], specs, compute_dtype) for name in order]
    weights = [weight for weight, _ in parts]
    row_orders = _row_orders(specs, weights)
    products = [Product(weight, kernel, weight.name in row_orders) for weight, kernel in parts]
    if experts is not None:
        products.extend(Product(weight, kernel, False) for weight, kernel in experts.of_a_token())
    skeleton = Skeleton(
        model=model,
        checkpoint=checkpoint,
        specs=specs,
        weights=weights,
        experts=experts,
        kernels={weight.name: kernel for weight, kernel in parts},
        row_orders=row_orders,
        together=[[f"{name}.weight" for name in names] for names in together],
        cache_layers=cache_layers,
        kv_dtype=kept_dtype,
        meter=PassMeter(config, compute_dtype, cache_layers, products, kv_dtype=kept_dtype),
    )
    for name, spec in skeleton.resident.items():
        if spec.encoding.torch_name is None or spec.transposed:
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} ({name}) is {spec.dtype} and no weight of a linear; this kind of model cannot be run yet"
            )
    return skeleton


def _row_orders(specs: dict[str, TensorSpec], weights: Sequence[Weight]) -> dict[str, torch.Tensor]:
    """An index of rows for each weight that wants one. Layers share them."""
    orders = {weight.name: specs[weight.name].row_order for weight in weights}
    indices = {order: torch.tensor(order) for order in set(orders.values()) if order is not None}
    return {name: indices[order] for name, order in orders.items() if order is not None}


def decoder_of(spec: TensorSpec) -> Callable[[Buffer, int], torch.Tensor]:
    """What makes numbers [in_features] of the bytes of one row of `spec`, which begin at a position of a buffer."""
    width = spec.shape[-1]
    if spec.encoding.torch_name is not None:
        return lambda buffer, position: buffer.tensor(position, spec.torch_dtype, (width,))
    from flexinfer.kernels.ggml import TYPES, dequantize_rows  # loads a library

    def decode(buffer: Buffer, position: int) -> torch.Tensor:
        row = buffer.tensor(position, torch.uint8, (1, spec.row_bytes))
        return dequantize_rows(TYPES[spec.encoding.name], row, width)[0]

    return decode


def _kernel(spec: TensorSpec, in_features: int, dtype: torch.dtype) -> Kernel:
    """What multiplies rows of `spec`."""
    if spec.encoding.is_float:
        return DenseKernel(in_features, spec.torch_dtype, dtype)
    if spec.encoding.torch_name is not None:
        raise CheckpointError(
            f"{spec.file}: {spec.name!r} has dtype {spec.dtype}; the weight of a linear can be {', '.join(sorted(FLOAT_NAMES))}"
        )
    from flexinfer.kernels.ggml import TYPES, GgmlKernel  # loads a library

    return GgmlKernel(in_features, TYPES[spec.encoding.name], dtype)


def _check_tables(model: PreTrainedModel, checkpoint: Checkpoint, file: Path) -> None:
    """Refuse tables that are out of proportion to the weights: they are computed, and no tensor vouches for their size."""
    tables_bytes = sum(buffer.nbytes for buffer in model.buffers())
    limit_bytes = TABLES_BYTES + sum(spec.nbytes for spec in checkpoint.tensors.values())
    if tables_bytes > limit_bytes:
        raise CheckpointError(
            f"{file}: masks, positions and other tables would take {tables_bytes} bytes, at most {limit_bytes} go with these "
            "weights; the two do not belong together"
        )


def _refuse_quantized(config: PretrainedConfig, file: Path) -> None:
    """Raise CheckpointError for safetensors that somebody's quantisation has changed."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
    by = "an earlier version of flexinfer" if method == "flexinfer" else shown(method)
    raise CheckpointError(
        f"{file}: quantization_config: this checkpoint is quantised by {by}, which is not supported; take the "
        "original checkpoint and, if it should be small, run `flexinfer quantize SRC DST --type q4_k`"
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of that name (flexinfer.options.DTYPES); None for "auto"."""
    if dtype == "auto":
        return None
    named: torch.dtype = getattr(torch, str(dtype).removeprefix("torch."))
    return named


def _compute_dtype(dtype: str | torch.dtype, config: PretrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    if (asked := _dtype(dtype)) is not None:
        return asked
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(
        (spec.torch_dtype for spec in checkpoint.tensors.values() if spec.encoding.is_float),
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


def resident_bytes(checkpoint: Checkpoint, dtype: str | torch.dtype, context: int | None) -> int:
    """What a checkpoint that cannot be streamed takes when transformers loads it whole: weights, KV cache and activations."""
    config, compute_dtype, layers = _resident_facts(checkpoint, dtype)
    context = context or 2048
    weights_bytes = sum(
        math.prod(spec.shape)
        * (compute_dtype.itemsize if spec.encoding.is_float else spec.torch_dtype.itemsize)
        for spec in checkpoint.tensors.values()
    )
    kv_bytes = sum(layer.nbytes(context, compute_dtype.itemsize) for layer in layers)
    meter = _resident_meter(config, compute_dtype, layers)
    return weights_bytes + kv_bytes + (meter.planned_bytes(context, 1) if layers else 0)


def _resident_facts(
    checkpoint: Checkpoint, dtype: str | torch.dtype
) -> tuple[PretrainedConfig, torch.dtype, list[LayerShape]]:
    config = load_config(checkpoint)
    compute_dtype = _compute_dtype(dtype, config, checkpoint)
    with refusing(checkpoint.config_file, "no causal LM"):
        return config, compute_dtype, _dry_run(meta_model(config, torch.bfloat16), ())[2]


def _resident_meter(config: PretrainedConfig, dtype: torch.dtype, layers: Sequence[LayerShape]) -> PassMeter:
    """In bfloat16, the one dtype in which torch's product for experts runs on the meta device, scaled to `dtype`."""
    return PassMeter(config, torch.bfloat16, layers, [], scale=dtype.itemsize // torch.bfloat16.itemsize)


def load_resident(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Skeleton:
    """A checkpoint that cannot be streamed, loaded whole by transformers: a model with no weights left to place."""
    config, compute_dtype, layers = _resident_facts(checkpoint, dtype)
    with refusing(checkpoint.path, "transformers cannot load it"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=compute_dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    return Skeleton(
        model.eval().requires_grad_(False),
        checkpoint,
        specs={},
        weights=[],
        experts=None,
        kernels={},
        row_orders={},
        together=[],
        cache_layers=layers,
        kv_dtype=compute_dtype,
        meter=_resident_meter(config, compute_dtype, layers),
    )


def find_linears(model: PreTrainedModel) -> list[Linear]:
    """The linears that can be streamed: those of the decoder stack, and the output head.

    Subclasses of `nn.Linear` may compute something else, so
    only `nn.Linear` itself, `Conv1D` and what is known to be the same are taken.
    """
    stack_name, stack = _decoder_stack(model)
    found = []
    for layer, decoder_layer in enumerate(stack):
        for role, module in decoder_layer.named_modules():
            if type(module) in {nn.Linear, Conv1D} or _multiplies_alike(module):
                kind: Kind = "attention" if "attn" in role or "attention" in role else "ffn"
                found.append(Linear(f"{stack_name}.{layer}.{role}", module, role, layer, kind))
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        name = next(name for name, module in model.named_modules() if module is head)
        found.append(Linear(name, head, name, len(stack), "head"))
    return found


def _decoder_stack(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The `nn.ModuleList` with the most parameters, and its name."""
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise CheckpointError(
            f"{type(model).__name__}: no stack of decoder layers found; this architecture cannot be streamed"
        )
    return max(stacks, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def _experts(
    model: PreTrainedModel, parts: dict[str, Parts], routes: dict[str, Route], dtype: torch.dtype
) -> Experts | None:
    """The experts of `model`, if it has some."""

    def kernel_of(matrix: Matrix) -> Kernel:
        if matrix.by_columns:
            return ColumnsKernel(matrix.in_features, matrix.spec.torch_dtype, dtype)
        kernel = _kernel(matrix.spec, matrix.in_features, dtype)
        return replace(kernel, aligned=matrix.joined) if isinstance(kernel, DenseKernel) else kernel

    modules = expert_modules(model)
    if not modules:
        return None
    return build_experts(
        modules,
        parts,
        routes,
        _decoder_stack(model)[0],
        kernel_of,
        piece_bytes=PIECE_BYTES,
        row_multiple=ROW_MULTIPLE,
    )


def _multiplies_alike(module: nn.Module) -> bool:
    """Whether a linear of another class is an `nn.Linear` in all but name: Falcon's is, without a bias."""
    return type(module).__name__ == "FalconLinear" and module.bias is None


def _match(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensor of each parameter and persistent buffer; and by parameter those of each expert."""
    state = model.state_dict()
    modules = expert_modules(model)
    if checkpoint.architecture:
        specs, parts = specs_of(model, checkpoint, modules)
    else:
        specs, parts = _renamed(model, checkpoint)
    _tie(specs, {a: b for a, b in model.all_tied_weights_keys.items() if a in state and b in state})
    if missing := sorted(
        name for name, _ in model.named_parameters(remove_duplicate=False) if name not in specs | parts
    ):
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors of {type(model).__name__} are not in it, such as {missing[0]!r}; "
            "the checkpoint is incomplete or of another model"
        )
    for name, module in modules.items():
        for parameter in parameters_of(name, module):
            if parameter in specs:
                spec = specs.pop(parameter)
                in_rows = (
                    spec.encoding.torch_name is None and module.is_transposed
                )  # of outputs, as blocks lie
                parts[parameter] = split_stacked(replace(spec, transposed=in_rows))
            check_shapes(parameter, parts[parameter], state[parameter].shape)
    for name, spec in specs.items():
        shape = tuple(state[name].shape)
        if spec.shape != (shape[::-1] if spec.transposed else shape):
            raise CheckpointError(
                f"{spec.file}: {shown(spec.name)} has shape {shown(list(spec.shape))}, config.json says {list(shape)}; "
                "the two do not belong together"
            )
    return specs, parts


def _tie(specs: dict[str, TensorSpec], sources: Mapping[str, str]) -> None:
    """Give each parameter that the file lacks the tensor of those that it is tied to; `sources` maps each to the one they have in common.

    Of two that the file has, each keeps its own: transformers ties them where they are equal, and then it makes no difference.
    """
    for target, source in sources.items():
        alike = [source, *(one for one, other in sources.items() if other == source)]
        spec = next((specs[name] for name in alike if name in specs), None)
        for name in (target, source):
            if spec is not None:
                specs.setdefault(name, spec)


def _renamed(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensors that the file has for the model, by transformers' own renaming rules; and those of experts, by parameter."""
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    specs: dict[str, TensorSpec] = {}
    converted: list[str] = []
    modules = expert_modules(model)
    of_experts = {parameter for name, module in modules.items() for parameter in parameters_of(name, module)}
    joined = JoinedTensors(converters)
    for name, spec in checkpoint.tensors.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is not None and name not in state:
            renamed = apply_renamings(name, renamings)
            if target not in of_experts or not joined.add(target, converter, renamed, spec):
                converted.append(name)
        elif name in state:
            specs[name] = spec
        elif target in state:
            specs[target] = spec
    for name, spec in specs.items():  # blocks lie by output rows, whatever the module does
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Conv1D) and spec.encoding.torch_name is None:
            specs[name] = replace(spec, transposed=True)
    if converted:
        raise NotStreamableError(
            f"{checkpoint.path}: {shown(converted[0])} and {len(converted) - 1} more tensors are stored apart and joined when "
            f"transformers loads {type(model).__name__} (experts of a mixture, as a rule); they cannot be streamed yet"
        )
    return specs, joined.parts()


def _dry_run(
    model: PreTrainedModel, linears: Collection[str]
) -> tuple[list[str], list[list[str]], list[LayerShape], dict[str, Route]]:
    """One pass on the meta device: the order in which the linears run, which of them are given the same input, what a token keeps in
    each cache layer, and how it comes to the experts of each module."""
    order: list[str] = []
    inputs: list[object] = []

    def note(name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append(name)
        inputs.append(args[0] if args else None)

    routes = _watch_routes(model)
    with deferred(), torch.device("meta"), torch.no_grad():
        for name, module in model.named_modules():
            if name in linears:
                module.register_forward_pre_hook(partial(note, name))
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=torch.zeros(1, 2, dtype=torch.long), cache=cache, use_cache=True)
    layers = []
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or isinstance(layer, DynamicIndexedLayer):
            raise CheckpointError(
                f"{type(model).__name__}: keeps a {type(layer).__name__} between tokens; only attention caches are supported (keys and values, nothing besides)"
            )
        layers.append(
            LayerShape(
                (keys.shape[1], keys.shape[3]),
                (values.shape[1], values.shape[3]),
                getattr(layer, "sliding_window", None),
            )
        )
    once = list(dict.fromkeys(order))
    together: list[list[str]] = []
    for i, name in enumerate(order):
        if order.count(name) == 1 and inputs[i] is not None and i and inputs[i] is inputs[i - 1]:
            together[-1].append(name)
        else:
            together.append([name])
    several = [names for names in together if len(names) > 1]
    return once + [name for name in linears if name not in once], several, layers, routes


def _watch_routes(model: PreTrainedModel) -> dict[str, Route]:
    """Filled by the next pass of `model`: by the name of an experts module, how tokens come to it."""
    routes: dict[str, Route] = {}
    chosen: list[tuple[torch.Tensor, Router]] = []  # what modules beside the experts have returned

    def note_output(
        name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        if len(args) == 1 and not kwargs:  # chooses by the hidden states alone
            chosen.extend(
                (one, Router(name, i)) for i, one in enumerate(outputs) if isinstance(one, torch.Tensor)
            )

    def note_route(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = [*args, *kwargs.values()][1]
        router = next((router for one, router in chosen if one is index), None)
        routes[name] = Route(index.shape[-1], router)
        chosen.clear()

    for name, module in expert_modules(model).items():
        for sibling, beside in model.get_submodule(name.rpartition(".")[0]).named_children():
            if beside is not module:
                note = partial(note_output, f"{name.rpartition('.')[0]}.{sibling}")
                beside.register_forward_hook(note, with_kwargs=True)
        module.register_forward_pre_hook(partial(note_route, name), with_kwargs=True)
    return routes


def _weight_of(linear: Linear, specs: dict[str, TensorSpec], dtype: torch.dtype) -> tuple[Weight, Kernel]:
    name = linear.name + ".weight"
    spec = specs[name]
    out_features, in_features = linear.features
    row_bytes = spec.encoding.nbytes(in_features)
    if isinstance(linear.module, Conv1D) and not spec.transposed:
        kernel: Kernel = Conv1DKernel(in_features, spec.torch_dtype, dtype)
        rows = out_features
    else:
        kernel = _kernel(spec, in_features, dtype)
        count = -(-out_features * row_bytes // PIECE_BYTES)
        rows = round_up(-(-out_features // count), ROW_MULTIPLE)
    pieces = []
    for start in range(0, out_features, rows):
        stop = min(start + rows, out_features)
        offset_bytes, nbytes = spec.offset_bytes + start * row_bytes, (stop - start) * row_bytes
        memory_bytes = padded_bytes(offset_bytes, nbytes)
        stays = kernel.resident is kernel
        pieces.append(
            Piece(
                name,
                linear.layer,
                start,
                stop,
                spec.file,
                offset_bytes,
                nbytes,
                memory_bytes,
                locked_bytes=memory_bytes if stays else round_up(kernel.resident_bytes(nbytes)),
                copied_bytes=kernel.copied_bytes(nbytes),
            )
        )
    return Weight(name, linear.role, linear.layer, linear.kind, tuple(pieces)), kernel
