"""Which tensor of a checkpoint is which parameter of the model, by transformers' own renaming
rules.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    WeightConverter,
    WeightRenaming,
    apply_renamings,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from flexinfer.formats.tensors import Checkpoint, CheckpointError, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import ColumnsKernel, DenseKernel
from flexinfer.messages import shown
from flexinfer.model.experts import (
    Experts,
    JoinedTensors,
    Matrix,
    Parts,
    Route,
    build_experts,
    check_shapes,
    parameters_of,
    split_stacked,
)
from flexinfer.model.gguf_tensors import specs_of
from flexinfer.model.linears import decoder_stack, kernel_for
from flexinfer.modules.experts import expert_modules


class NotStreamableError(CheckpointError):
    """A checkpoint whose weights transformers has to convert before use.

    Names the first of them.
    """


def experts_of(
    model: PreTrainedModel, parts: dict[str, Parts], routes: dict[str, Route], dtype: torch.dtype
) -> Experts | None:
    """The experts of `model`, if it has some."""

    def kernel_of(matrix: Matrix) -> Kernel:
        if matrix.by_columns:
            if matrix.spec.packed is not None:
                raise CheckpointError(
                    f"{matrix.spec.file}: {shown(matrix.spec.name)} is quantised with inputs for "
                    "rows, which is not supported"
                )
            return ColumnsKernel(matrix.in_features, matrix.spec.torch_dtype, dtype)
        kernel = kernel_for(matrix.spec, matrix.in_features, dtype)
        return replace(kernel, aligned=matrix.joined) if type(kernel) is DenseKernel else kernel

    modules = expert_modules(model)
    if not modules:
        return None
    return build_experts(modules, parts, routes, decoder_stack(model)[0], kernel_of)


def match_tensors(
    model: PreTrainedModel, checkpoint: Checkpoint
) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensor of each parameter and persistent buffer; and by parameter those of each expert."""
    state = model.state_dict()
    modules = expert_modules(model)
    if checkpoint.architecture:
        specs, parts = specs_of(model, checkpoint, modules)
    else:
        specs, parts = _renamed(model, checkpoint)
    _tie(specs, {a: b for a, b in model.all_tied_weights_keys.items() if a in state and b in state})
    if missing := sorted(
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in specs | parts
    ):
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} tensors of {type(model).__name__} are not in it, "
            f"such as {missing[0]!r}; the checkpoint is incomplete or of another model"
        )
    for name, module in modules.items():
        for parameter in parameters_of(name, module):
            if parameter in specs:
                spec = specs.pop(parameter)
                # Of outputs, as blocks lie.
                in_rows = spec.encoding.torch_name is None and module.is_transposed
                parts[parameter] = split_stacked(replace(spec, transposed=in_rows))
            check_shapes(parameter, parts[parameter], state[parameter].shape)
    for name, spec in specs.items():
        shape = tuple(state[name].shape)
        if spec.shape != (shape[::-1] if spec.transposed else shape):
            raise CheckpointError(
                f"{spec.file}: {shown(spec.name)} has shape {shown(list(spec.shape))}, config.json "
                f"says {list(shape)}; the two do not belong together"
            )
    return specs, parts


def _tie(specs: dict[str, TensorSpec], sources: Mapping[str, str]) -> None:
    """Give each parameter that the file lacks the tensor of those that it is tied to; `sources`
    maps each to the one they have in common.

    Of two that the file has, each keeps its own: transformers ties them where they are equal, and
    then it makes no difference.
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
    """The tensors that the file has for the model, by transformers' own renaming rules; and those
    of experts, by parameter.
    """
    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    specs: dict[str, TensorSpec] = {}
    converted: list[str] = []
    modules = expert_modules(model)
    of_experts = {
        parameter for name, module in modules.items() for parameter in parameters_of(name, module)
    }
    joined = JoinedTensors(converters)
    # Of parameters that stay in memory, by their place among those that are joined.
    followers: dict[str, dict[int, TensorSpec]] = defaultdict(dict)
    for name, spec in checkpoint.tensors.items():
        target, converter = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if converter is not None and name not in state:
            renamed = apply_renamings(name, renamings)
            place = _place_along_rows(converters, converter)
            if place is not None and target in state and state[target].dim() != 2:
                followers[target][place] = spec
            elif target not in of_experts or not joined.add(target, converter, renamed, spec):
                converted.append(name)
        elif name in state:
            specs[name] = spec
        elif target in state:
            specs[target] = spec
    for target, parts in followers.items():
        first, *rest = (parts[place] for place in sorted(parts))
        shape = sum(part.shape[0] for part in parts.values()), *first.shape[1:]
        specs[target] = replace(first, shape=shape, followed_by=tuple(rest))
    # ggml's blocks run along output rows, whatever the module does.
    for name, spec in specs.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Conv1D) and spec.encoding.torch_name is None:
            specs[name] = replace(spec, transposed=True)
    if converted:
        raise NotStreamableError(
            f"{checkpoint.path}: {shown(converted[0])} and {len(converted) - 1} more tensors are "
            f"stored apart and joined when transformers loads {type(model).__name__} (experts of a "
            "mixture, as a rule); they cannot be streamed yet"
        )
    return specs, joined.parts()


def _place_along_rows(converters: list[WeightConverter], pattern: str) -> int | None:
    """Which of the tensors that are joined along their first dimension `pattern` stands for; None
    where they are not just joined.
    """
    converter = next(one for one in converters if pattern in one.source_patterns)
    first, *others = converter.operations
    if others or not isinstance(first, Concatenate) or first.dim != 0:
        return None
    return converter.source_patterns.index(pattern)
