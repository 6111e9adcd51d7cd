"""Experts of a mixture: which modules they are, and where the weights of each expert lie.

transformers keeps the experts of a layer in one module with parameters for all of them
(`gate_up_proj` [experts, rows, in] and `down_proj`), and lets another implementation compute it
(its ExpertsInterface): modules that can be are found by that. In a checkpoint the experts lie in
one tensor too, or each by itself (`experts.7.gate_proj.weight`) to be joined when they are loaded,
by rules of transformers' own; in a GGUF file in one tensor for each of gate, up and down. Either
way the rows of an expert follow one another, so nothing is joined here: an expert's weights are
read from where they lie, as one or two parts of `gate_up_proj` and one of `down_proj`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from flexinfer.formats.tensors import CheckpointError, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.model import pieces
from flexinfer.plan.experts import ExpertLayer, Mixture, even_piece_bytes
from flexinfer.plan.weights import Weight

# For each expert of a parameter, the tensors that follow one another along its rows.
Parts = list[list[TensorSpec]]

KernelOf = Callable[["Matrix"], Kernel]


@dataclass(frozen=True, slots=True)
class Router:
    """What chooses the experts of a layer."""

    # Name of the module.
    name: str
    # Index of the chosen experts [tokens, k] among its outputs.
    place: int


@dataclass(frozen=True, slots=True)
class Route:
    """How tokens come to the experts of a layer, as seen in a dry run."""

    # Experts per token.
    used: int
    # None if the model changes its choice on the way.
    router: Router | None


@dataclass(slots=True)
class Experts:
    """The mixture of a model, and what multiplies its weights."""

    mixture: Mixture
    # By the name of the module: of the weights of any of its experts.
    kernels: dict[str, tuple[Kernel, ...]]
    # By name of the module, where the router is known.
    routers: dict[str, Router]
    # Modules whose outputs on the way up alternate between two weights.
    alternate: frozenset[str]

    def of_a_token(self) -> list[tuple[Weight, Kernel]]:
        """What a token may use: as many experts of each layer."""
        return [
            (weight, kernel)
            for layer in self.mixture.layers
            for expert in layer.experts[: layer.used]
            for weight, kernel in zip(expert, self.kernels[layer.name], strict=True)
        ]


def parameters_of(name: str, module: Any) -> tuple[str, str]:
    """The names of an experts module's parameters: of the way up, and of the way down."""
    return f"{name}.{'gate_up_proj' if module.has_gate else 'up_proj'}", f"{name}.down_proj"


class JoinedTensors:
    """Collects tensors that transformers would join into the parameters of experts."""

    def __init__(self, converters: Sequence[WeightConverter]) -> None:
        self._converters = converters
        self._found: dict[str, dict[int, dict[int, TensorSpec]]] = defaultdict(
            lambda: defaultdict(dict)
        )

    def add(self, target: str, source_pattern: str, name: str, spec: TensorSpec) -> bool:
        """Take the tensor that `source_pattern` of a converter matched; False where the rule is not
        of the kind known here.

        name: of the tensor, renamed.
        """
        converter = next(one for one in self._converters if source_pattern in one.source_patterns)
        number = re.search(re.escape(source_pattern).replace(r"\*\.", r"(\d+)\."), name)
        if number is None or not _only_joins(converter):
            return False
        part = converter.source_patterns.index(source_pattern)
        self._found[target][int(number[1])][part] = spec
        return True

    def parts(self) -> dict[str, Parts]:
        """By the parameter: the tensors of each expert, in the order in which they are joined.

        Raises CheckpointError for gaps.
        """
        joined = {}
        for target, experts in self._found.items():
            most = max(len(parts) for parts in experts.values())
            if sorted(experts) != list(range(len(experts))) or any(
                len(p) < most for p in experts.values()
            ):
                spec = next(iter(next(iter(experts.values())).values()))
                raise CheckpointError(
                    f"{spec.file}: experts of {target!r} are not all there; the checkpoint is "
                    "incomplete, download it again"
                )
            joined[target] = [
                [parts[i] for i in sorted(parts)]
                for _, parts in sorted(experts.items(), key=lambda e: e[0])
            ]
        return joined


def _only_joins(converter: WeightConverter) -> bool:
    """Whether experts are stacked and their parts concatenated, with no number changed."""
    operations = converter.operations
    stacked = type(operations[0]) is MergeModulelist and operations[0].dim == 0
    parts = len(converter.source_patterns)
    if parts == 1:
        return stacked and len(operations) == 1
    return (
        stacked
        and len(operations) == 2
        and type(operations[1]) is Concatenate
        and operations[1].dim == 1
    )


def split_stacked(spec: TensorSpec) -> Parts:
    """The experts of one tensor [experts, ...]."""
    return [[_one_of(spec, i)] for i in range(spec.shape[0])]


def _one_of(spec: TensorSpec, i: int) -> TensorSpec:
    """Number `i` along the first dimension; of what lies beside, too."""
    nbytes, packed = spec.nbytes // spec.shape[0], spec.packed
    if packed is not None:
        beside = tuple(replace(one, spec=_one_of(one.spec, i)) for one in packed.beside)
        packed = replace(packed, beside=beside)
    return replace(
        spec,
        offset_bytes=spec.offset_bytes + i * nbytes,
        nbytes=nbytes,
        shape=tuple(spec.shape[1:]),
        packed=packed,
    )


@dataclass(frozen=True, slots=True)
class Matrix:
    """A part of the parameter of one expert."""

    role: str
    spec: TensorSpec
    # Number of output rows.
    rows: int
    in_features: int
    # First row in the parameter.
    row_start: int
    # Whether rows in the file are inputs.
    by_columns: bool
    # Whether it is stored apart, and transformers copies it into the parameter.
    joined: bool


def check_shapes(name: str, parts: Parts, shape: Sequence[int]) -> None:
    """Raise CheckpointError where the experts do not make a parameter of `shape` [experts, rows,
    width].
    """
    for part in parts:
        spec, rows = part[0], sum(spec.shape[0] for spec in part)
        wanted = shape[::-1][:2] if spec.transposed else shape[1:]
        widths = {tuple(one.shape[1:]) for one in part}
        if len(parts) != shape[0] or rows != wanted[0] or widths != {(wanted[1],)}:
            raise CheckpointError(
                f"{spec.file}: {spec.name!r} and the other experts of {name} make "
                f"{[len(parts), rows, *spec.shape[1:]]}, config.json says {list(shape)}; the two "
                "do not belong together"
            )


def build_experts(
    modules: Mapping[str, Any],
    parts: Mapping[str, Parts],
    routes: Mapping[str, Route],
    stack_name: str,
    kernel_of: KernelOf,
) -> Experts:
    """The mixture of `modules`. `parts` by parameter, `routes` by module.

    Raises CheckpointError for experts outside of the decoder layers, or some in another encoding
    than the others.
    """
    matrices = {name: _matrices(name, module, parts) for name, module in modules.items()}
    sizes = Counter(
        m.spec.nbytes
        for experts in matrices.values()
        for expert in experts
        for m in expert
        if m.spec.nbytes
    )
    piece_bytes = even_piece_bytes(sizes, pieces.PIECE_BYTES)
    layers, kernels = [], {}
    for name in modules:
        place = re.match(re.escape(stack_name) + r"\.(\d+)\.", name)
        if place is None:
            raise CheckpointError(
                f"{name}: experts outside of the decoder layers cannot be streamed"
            )
        of_each = {tuple(kernel_of(m) for m in expert) for expert in matrices[name]}
        if len(of_each) > 1:
            raise CheckpointError(
                f"{name}: its experts have different encodings, which cannot be streamed yet"
            )
        kernels[name] = of_each.pop()
        prefix, layer = name[place.end() :], int(place[1])
        # A cut by columns would change the order of sums.
        largest_bytes = None if matrices[name][0][0].by_columns else piece_bytes
        experts = tuple(
            tuple(
                _weight(
                    m,
                    kernel,
                    f"{name}.{number}.{m.role}",
                    f"{prefix}.{m.role}",
                    layer,
                    largest_bytes,
                )
                for m, kernel in zip(expert, kernels[name], strict=True)
            )
            for number, expert in enumerate(matrices[name])
        )
        layers.append(ExpertLayer(name, layer, routes[name].used, experts))
    alternate = {
        n for n, module in modules.items() if not module.is_concatenated and len(matrices[n][0]) > 2
    }
    routers = {n: r.router for n, r in routes.items() if r.router}
    return Experts(Mixture(tuple(layers)), kernels, routers, frozenset(alternate))


def _weight(
    matrix: Matrix, kernel: Kernel, name: str, role: str, layer: int, piece_bytes: int | None
) -> Weight:
    cuts = pieces.cut(
        matrix.spec,
        matrix.rows,
        kernel,
        piece_bytes,
        name=name,
        layer=layer,
        row_start=matrix.row_start,
    )
    return Weight(name, role, layer, "ffn", cuts)


def _matrices(name: str, module: Any, parts: Mapping[str, Parts]) -> list[list[Matrix]]:
    up, down = parameters_of(name, module)
    experts: list[list[Matrix]] = [[] for _ in parts[up]]
    for parameter in (up, down):
        role = parameter.rpartition(".")[2]
        joined = len({spec.name for expert in parts[parameter] for spec in expert}) > 1
        for found, of_expert in zip(experts, parts[parameter], strict=True):
            start = 0
            for spec in of_expert:
                by_columns = module.is_transposed and not spec.transposed
                rows, width = spec.shape[::-1] if by_columns else spec.shape
                found.append(Matrix(role, spec, rows, width, start, by_columns, joined))
                start += rows
    return experts
