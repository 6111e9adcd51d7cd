"""Which tensor of a GGUF file is which parameter: by llama.cpp's names, put right where it stores
rows in another order.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from flexinfer.formats.gguf import AGAIN
from flexinfer.formats.gguf_families import FAMILIES
from flexinfer.formats.tensors import Checkpoint, CheckpointError, TensorSpec
from flexinfer.messages import shown
from flexinfer.model.experts import Parts, parameters_of, split_stacked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}

# Of a tensor; the largest vocabularies have a quarter of it.
MAX_ROWS = 1 << 20


def specs_of(
    model: "PreTrainedModel", checkpoint: Checkpoint, experts: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensor of each parameter that the file has; and of the parameters of the modules
    `experts`, by name, those of each expert.

    Raises CheckpointError when the file has tensors that the model has no place for.
    """
    parts: dict[str, Parts] = {}
    specs: dict[str, TensorSpec] = {}
    for name, module in experts.items():
        of_module, biases = _experts_of(name, module, checkpoint.tensors)
        parts |= of_module
        specs |= biases
    name_of = tensor_names(str(checkpoint.architecture), model)
    for parameter, value in model.state_dict().items():
        tensor = name_of(parameter)
        if parameter not in parts | specs and tensor in checkpoint.tensors:
            module = model.get_submodule(parameter.rpartition(".")[0])
            specs[parameter] = _corrected(
                checkpoint.tensors[tensor], module, value.shape, model.config
            )
    used = {
        spec.name for one in specs.values() for spec in (one, one.alternate) if spec
    } | ROPE_TENSORS
    used |= {spec.name for of_parameter in parts.values() for spec in of_parameter[0]}
    if unused := [name for name in checkpoint.tensors if name not in used]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unused)} tensors have no place in {type(model).__name__}, "
            f"such as {shown(unused[0])}; this kind of model cannot be run yet"
        )
    return specs, parts


def tensor_names(architecture: str, model: "PreTrainedModel") -> Callable[[str], str | None]:
    """A function from a parameter's name to that of its tensor; None where llama.cpp has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)

    def name_of(parameter: str) -> str | None:
        module, _, leaf = parameter.rpartition(".")
        if leaf in {"weight", "bias"}:
            # As it once was in transformers.
            found = names.get_name(module) or names.get_name(f"{module}.layer")
            return f"{found}.{leaf}" if found else None
        # A parameter of the layer itself.
        found = names.get_name(parameter)
        return f"{found}.weight" if found else None

    return name_of


def expert_tensors(name: str, module: Any) -> dict[str, tuple[str, ...]]:
    """Of each parameter of an experts module the tensors that llama.cpp keeps its rows in, one
    after another.
    """
    up, down = parameters_of(name, module)
    place = re.search(r"\.(\d+)\.", name)
    block = f"blk.{place[1] if place else ''}.ffn_"
    ways = ("gate", "up") if module.has_gate else ("up",)
    return {up: tuple(f"{block}{way}_exps" for way in ways), down: (f"{block}down_exps",)}


def _experts_of(
    name: str, module: Any, tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, Parts], dict[str, TensorSpec]]:
    """By parameter the tensors of each expert, and the biases."""
    parts: dict[str, Parts] = {}
    biases: dict[str, TensorSpec] = {}
    for parameter, names in expert_tensors(name, module).items():
        joined = names[0].replace("_gate_", "_gate_up_")
        names = (joined,) if f"{joined}.weight" in tensors else names
        found = [tensors[f"{one}.weight"] for one in names if f"{one}.weight" in tensors]
        alike = {spec.shape[0] for spec in found if len(spec.shape) == 3}
        if len(found) == len(names) and len(alike) == 1:
            stacked = [
                split_stacked(replace(spec, transposed=module.is_transposed)) for spec in found
            ]
            parts[parameter] = [[*chain(*of_expert)] for of_expert in zip(*stacked, strict=True)]
        bias = [tensors[f"{one}.bias"] for one in names if f"{one}.bias" in tensors]
        if module.has_bias and len(bias) == len(names):
            first, other = bias[0], bias[1] if len(bias) > 1 else None
            shape = (*first.shape[:-1], sum(spec.shape[-1] for spec in bias))
            biases[f"{parameter}_bias"] = replace(first, shape=shape, alternate=other)
    return parts, biases


def _corrected(
    spec: TensorSpec, module: Any, shape: Sequence[int], config: "PretrainedConfig"
) -> TensorSpec:
    """`spec` with how it differs from its parameter, which has `shape` in `module`."""
    from transformers.pytorch_utils import Conv1D

    family = FAMILIES[config.model_type]
    if isinstance(module, Conv1D) and len(spec.shape) == 2:
        return replace(spec, transposed=True)
    if spec.name.endswith(family.flat) and spec.shape == tuple(n for n in shape if n != 1):
        return replace(spec, shape=tuple(shape))
    if family.norms_plus_one and spec.name.endswith("norm.weight"):
        return replace(spec, added=-1.0)
    heads = rotated_heads(spec.name, config)
    # The bias of such a weight is added before the rows are put in order: both are in the file's.
    if heads and len(spec.shape) == 2:
        if spec.shape[0] > MAX_ROWS or spec.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{spec.file}: {spec.name} has {spec.shape[0]} rows for {heads} heads: {AGAIN}"
            )
        return replace(spec, row_order=_by_halves(spec.shape[0], heads))
    return spec


def rotated_heads(tensor: str, config: "PretrainedConfig") -> int:
    """The heads of a tensor whose rows llama.cpp has by pairs, transformers by halves; 0 where it
    is no such tensor.
    """
    if not FAMILIES[config.model_type].rows_by_pairs:
        return 0
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(heads.get(tensor.split(".")[-2], 0))


# Once for each shape: all layers share the order.
@lru_cache
def _by_halves(rows: int, heads: int) -> tuple[int, ...]:
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2)
    return tuple(order.ravel().tolist())
