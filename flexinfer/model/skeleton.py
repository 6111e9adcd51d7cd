"""The empty model: a stock transformers model without weights, and where each of its weights lies
in the checkpoint.

Works for any causal LM whose decoder layers are made of `nn.Linear` (or GPT-2's `Conv1D`); there is
no file per family. The decoder stack and its linears are found by their types, tensors are matched
to parameters by transformers' own renaming rules, and the order of use and the shape of the KV
cache are learnt from one pass on the meta device, which computes nothing. Reads headers, never
weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from flexinfer.formats.config import load_config, refusing, set_generation_config
from flexinfer.formats.quantized import unpacked
from flexinfer.formats.tensors import Checkpoint, CheckpointError, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import DenseKernel
from flexinfer.kernels.input_rows import QuantisedKernel
from flexinfer.model.cache_form import CacheForm
from flexinfer.model.dry_run import dry_run
from flexinfer.model.experts import Experts
from flexinfer.model.linears import find_linears, row_orders_of, weight_of
from flexinfer.model.match import experts_of, match_tensors
from flexinfer.model.pass_memory import ComputedLinear, PassMeter, meta_model
from flexinfer.modules.experts import IMPLEMENTATION, register
from flexinfer.plan.experts import Mixture
from flexinfer.plan.weights import Weight

# That masks, positions and other tables of a model may take, whatever its weights.
TABLES_BYTES = 64 << 20


@dataclass(slots=True)
class Skeleton:
    """A model with no weights yet, and where each of them is."""

    model: PreTrainedModel
    checkpoint: Checkpoint
    # By parameter name.
    specs: dict[str, TensorSpec]
    # Streamable weights that every token needs, in order of use.
    weights: list[Weight]
    # Experts of a mixture.
    experts: Experts | None
    # By weight name.
    kernels: dict[str, Kernel]
    # Row orders of weights that the file stores in another order.
    row_orders: dict[str, torch.Tensor]
    # Weights that get the same input, one after another.
    together: list[list[str]]
    cache: CacheForm
    # Dtype of the KV cache.
    kv_dtype: torch.dtype
    meter: PassMeter
    # Of a model that cannot be streamed: its weights, which transformers loads whole, and their
    # dtype.
    whole_bytes: int = 0
    whole_dtype: torch.dtype | None = None

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
        return any(isinstance(kernel, DenseKernel | QuantisedKernel) for _, kernel in self.used)

    @property
    def in_blocks(self) -> bool:
        """Whether weights lie in ggml's blocks."""
        return any(
            spec.encoding.torch_name is None and spec.packed is None for spec in self.specs.values()
        )

    @property
    def mixture(self) -> Mixture | None:
        """The experts, for a plan."""
        return self.experts.mixture if self.experts is not None else None

    @property
    def used(self) -> list[tuple[Weight, Kernel]]:
        """The weights that a token uses: those that every token needs, and as many experts of each
        layer as one does.
        """
        dense = [(weight, self.kernels[weight.name]) for weight in self.weights]
        return dense + (self.experts.of_a_token() if self.experts is not None else [])

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self.whole_dtype or self.model.dtype

    @property
    def unstreamed(self) -> dict[str, TensorSpec]:
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

    Sizes are compared on the meta device, before anything is allocated by them. Raises
    CheckpointError when config.json is of no causal LM, tensors are missing or have the wrong
    shape, or the weights would have to be converted to fit.
    """
    file = checkpoint.config_file
    config = load_config(checkpoint)
    checkpoint = _unpacked(checkpoint, config)
    compute_dtype = compute_dtype_of(dtype, config, checkpoint)
    kept_dtype = _dtype(kv_dtype) or (torch.float16 if checkpoint.in_gguf else compute_dtype)
    if kept_dtype.itemsize > compute_dtype.itemsize:
        kept_dtype = compute_dtype
    register()
    config._experts_implementation = IMPLEMENTATION
    with refusing(file, "no causal LM"):
        shapes = meta_model(config, compute_dtype)
    with refusing(file, "a model that cannot be streamed"):
        specs, expert_parts = match_tensors(shapes, checkpoint)
        _check_tables(shapes, checkpoint, file)
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config, dtype=compute_dtype, trust_remote_code=False
            )
        # Tables are made anew in float32, as when transformers loads a checkpoint.
        for module in model.modules():
            if module._non_persistent_buffers_set:
                model._init_weights(module)
        model.eval().requires_grad_(False)
        set_generation_config(model, checkpoint)
        linears = {linear.name: linear for linear in find_linears(model)}
        order, together, cache, routes = dry_run(shapes, linears.keys())
        experts = experts_of(shapes, expert_parts, routes, compute_dtype)
        parts = [weight_of(linears[name], specs) for name in order]
    weights = [weight for weight, _ in parts]
    row_orders = row_orders_of(specs, weights)
    products = [
        ComputedLinear(weight, kernel, weight.name in row_orders) for weight, kernel in parts
    ]
    if experts is not None:
        products.extend(
            ComputedLinear(weight, kernel, False) for weight, kernel in experts.of_a_token()
        )
    skeleton = Skeleton(
        model=model,
        checkpoint=checkpoint,
        specs=specs,
        weights=weights,
        experts=experts,
        kernels={weight.name: kernel for weight, kernel in parts},
        row_orders=row_orders,
        together=[[f"{name}.weight" for name in names] for names in together],
        cache=cache,
        kv_dtype=kept_dtype,
        meter=PassMeter(config, compute_dtype, cache, products, kv_dtype=kept_dtype),
    )
    embedding = f"{skeleton.embedding_name}.weight"
    for name, spec in (skeleton.unstreamed | {embedding: skeleton.specs[embedding]}).items():
        in_blocks = spec.encoding.torch_name is None and name != embedding
        if in_blocks or spec.transposed or spec.packed is not None:
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} ({name}) is {spec.dtype} and no weight of a linear; "
                "this kind of model cannot be run yet"
            )
    return skeleton


def _check_tables(model: PreTrainedModel, checkpoint: Checkpoint, file: Path) -> None:
    """Refuse tables that are out of proportion to the weights: they are computed, and no tensor
    vouches for their size.
    """
    tables_bytes = sum(buffer.nbytes for buffer in model.buffers())
    limit_bytes = TABLES_BYTES + sum(spec.nbytes for spec in checkpoint.tensors.values())
    if tables_bytes > limit_bytes:
        raise CheckpointError(
            f"{file}: masks, positions and other tables would take {tables_bytes} bytes, at most "
            f"{limit_bytes} go with these weights; the two do not belong together"
        )


def _unpacked(checkpoint: Checkpoint, config: PretrainedConfig) -> Checkpoint:
    """`checkpoint` with its quantisation understood; `config` is then that of the model in floats.

    Raises CheckpointError for a method that is not known here.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return checkpoint
    del config.quantization_config
    if not quantization:
        return checkpoint
    with refusing(checkpoint.config_file, "a quantisation that cannot be read"):
        return replace(checkpoint, tensors=unpacked(checkpoint.tensors, quantization))


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of that name (flexinfer.options.DTYPES); None for "auto"."""
    if dtype == "auto":
        return None
    named: torch.dtype = getattr(torch, str(dtype).removeprefix("torch."))
    return named


def compute_dtype_of(
    dtype: str | torch.dtype, config: PretrainedConfig, checkpoint: Checkpoint
) -> torch.dtype:
    if (asked := _dtype(dtype)) is not None:
        return asked
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next(
        (spec.torch_dtype for spec in checkpoint.tensors.values() if spec.encoding.is_float),
        torch.float32,
    )
