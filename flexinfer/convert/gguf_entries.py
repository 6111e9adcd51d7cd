"""What a quantised copy is made of: its tensors by name, each with its type, its shape and where
its numbers come from.

In llama.cpp's names where the family is known, else in transformers'. Reads no weights.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

from flexinfer.convert.gguf_header import (
    HeaderError,
    Take,
    add,
    add_model,
    difference,
    rope_tensors,
    stored_as,
)
from flexinfer.convert.gguf_vocabulary import add_vocabulary
from flexinfer.formats.ggml_types import TYPES, kind_for
from flexinfer.formats.gguf import ENCODING_OF, read_gguf
from flexinfer.formats.gguf_config import config_of
from flexinfer.formats.gguf_families import FAMILIES, Family
from flexinfer.formats.gguf_model import NAMES_KEY
from flexinfer.formats.tensors import CheckpointError, TensorSpec
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import ColumnsKernel, Conv1DKernel, DenseKernel
from flexinfer.kernels.input_rows import QuantisedKernel
from flexinfer.model.gguf_tensors import expert_tensors, tensor_names
from flexinfer.model.skeleton import Skeleton
from flexinfer.plan.weights import Weight

# Of the output head, tied or not, where fewer bits are asked for: it costs little and gives most.
HEAD_KIND = "Q6_K"
ENCODING_BY_NAME = {encoding.name: encoding for encoding in ENCODING_OF.values()}

# A tensor of the source, and what is made of its numbers; None: nothing.
Part = tuple[TensorSpec, Take | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the copy; its parts follow one another along its rows."""

    # Name in the model.
    parameter: str
    # ggml's name of its type.
    kind: str
    shape: tuple[int, ...]
    parts: list[Part]
    # Why a weight is not quantised.
    kept: str = ""

    @property
    def nbytes(self) -> int:
        return ENCODING_BY_NAME[self.kind].nbytes(math.prod(self.shape))


def lay_out(
    skeleton: Skeleton, kind: str, file: Path
) -> tuple[dict[str, Entry], str | None, list[str]]:
    """Write `file` without the weights' bytes; returns its tensors in order, llama.cpp's name of
    the model, and notes.

    The name is None where only flexinfer can read the file; the first note says why.
    """
    family = FAMILIES.get(skeleton.config.model_type)
    try:
        if family is None:
            raise HeaderError(
                f"llama.cpp's header of a {skeleton.config.model_type} is not known here"
            )
        entries = _entries(skeleton, kind, family)
        notes = _write_header(file, skeleton, kind, family, entries)
        if lost := difference(skeleton.config, config_of(read_gguf(file))):
            raise HeaderError(lost)
        return entries, family.architecture, notes
    except (HeaderError, CheckpointError) as error:
        entries = _entries(skeleton, kind, None)
        _write_header(file, skeleton, kind, None, entries)
        return entries, None, [f"only flexinfer reads it: {error}"]


def _write_header(
    file: Path, skeleton: Skeleton, kind: str, family: Family | None, entries: dict[str, Entry]
) -> list[str]:
    """Write a GGUF file of full length that holds the header and the tensors of the rotation;
    returns notes.
    """
    writer = GGUFWriter(file, family.architecture if family else skeleton.config.model_type)
    names = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", f"MOSTLY_{kind}_S")
    file_type = next(LlamaFileType[name] for name in names if name in LlamaFileType.__members__)
    add(writer, "general.file_type", int(file_type))
    add(writer, "general.quantization_version", 2)
    add(writer, "general.name", skeleton.checkpoint.path.resolve().name)
    add(writer, NAMES_KEY, "llama.cpp" if family else "transformers")
    notes: list[str] = []
    if family:
        add_model(writer, skeleton.config, family)
        notes = add_vocabulary(writer, skeleton.checkpoint.config_dir, skeleton.config.vocab_size)
    known = rope_tensors(skeleton.config) if family else {}
    for name, numbers in known.items():
        writer.add_tensor_info(name, numbers.shape, numbers.dtype, numbers.nbytes)
    for name, entry in entries.items():
        number = GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), entry.nbytes, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    sizes = [file.stat().st_size, *(numbers.nbytes for numbers in known.values())]
    sizes += [entry.nbytes for entry in entries.values()]
    with file.open("r+b") as stream:
        stream.truncate(sum(writer.ggml_pad(size, writer.data_alignment) for size in sizes))
        places = read_gguf(file).tensors
        for name, numbers in known.items():
            stream.seek(places[name].offset_bytes)
            stream.write(numbers.tobytes())
    return notes


def _entries(skeleton: Skeleton, kind: str, family: Family | None) -> dict[str, Entry]:
    """The tensors of the copy by name, in order of use: in llama.cpp's names, or without a family
    in transformers'.

    Raises CheckpointError for a source that is quantised already.
    """
    if any(isinstance(kernel, QuantisedKernel) for _, kernel in skeleton.used):
        raise CheckpointError(
            f"{skeleton.checkpoint.path}: quantised already, and runs as it is; to make another "
            "copy, start from the original checkpoint"
        )
    experts = dict(_expert_entries(skeleton, kind, apart=family is not None))
    # Biases of experts among them.
    of_experts = {entry.parameter for entry in experts.values()}
    name_of = tensor_names(family.architecture, skeleton.model) if family else None
    heads = {
        skeleton.specs[weight.name].name for weight in skeleton.weights if weight.kind == "head"
    }
    head_kind = max(
        kind, HEAD_KIND, key=lambda name: TYPES[name].block_bytes / TYPES[name].block_elements
    )
    entries = {}
    for parameter in _in_order_of_use(skeleton):
        if parameter in of_experts:
            continue
        name = name_of(parameter) if name_of else parameter
        if name is None:
            raise HeaderError(
                f"llama.cpp's {family and family.architecture} has no name for {parameter}"
            )
        wanted = head_kind if skeleton.specs[parameter].name in heads else kind
        entries[name] = _entry(skeleton, parameter, wanted, name if family else None)
    return entries | experts


def _in_order_of_use(skeleton: Skeleton) -> list[str]:
    """The parameters, each tensor of the source once: the embedding, what is not a linear, then the
    linears.
    """
    weights = (weight.name for weight in skeleton.weights)
    order = (f"{skeleton.embedding_name}.weight", *skeleton.unstreamed, *weights)
    first = {skeleton.specs[parameter].name: parameter for parameter in reversed(order)}
    return [parameter for parameter in order if first[skeleton.specs[parameter].name] == parameter]


def _entry(skeleton: Skeleton, parameter: str, kind: str, tensor: str | None) -> Entry:
    """The entry of a parameter, in blocks of `kind` where it is a weight. `tensor`: llama.cpp's
    name of it.
    """
    spec, kernel = skeleton.specs[parameter], skeleton.kernels.get(parameter)
    # Its weight is [in, out].
    by_columns = isinstance(kernel, Conv1DKernel)
    take: Take | None = torch.t if by_columns else None
    if tensor and not by_columns:
        take = stored_as(tensor, spec.shape, skeleton.config)
    shape = _shape((spec, take))
    if len(shape) != 2 or (kernel is None and parameter != f"{skeleton.embedding_name}.weight"):
        # Numbers that are not weights are float32, as llama.cpp wants them.
        plain = (
            "F32"
            if spec.encoding.is_float
            else {"U8": "I8", "BOOL": "I8"}.get(spec.dtype, spec.dtype)
        )
        return Entry(parameter, plain, shape, [(one, take) for one in spec.parts])
    packed, kept = _packed(kind, shape[-1])
    if packed is None and tensor is None:
        shape, take = spec.shape, None
    return Entry(parameter, packed or spec.dtype, shape, [(spec, take)], kept)


def _packed(kind: str, in_features: int) -> tuple[str | None, str]:
    """The type of blocks for rows of `in_features`, or None and the reason."""
    packed = kind_for(kind, in_features)
    return packed, "" if packed else f"its rows of {in_features} weights are no multiple of 32"


def _expert_entries(skeleton: Skeleton, kind: str, *, apart: bool) -> Iterator[tuple[str, Entry]]:
    """The entries of experts by name, layer by layer: weights [experts, rows, in], biases [experts,
    rows].

    apart: in llama.cpp's names, with gate and up in two tensors, and biases apart; else by the
    model's parameters.
    """
    if skeleton.experts is None:
        return
    for layer in skeleton.experts.mixture.layers:
        module: Any = skeleton.model.get_submodule(layer.name)
        kernels = skeleton.experts.kernels[layer.name]
        experts = [list(map(_expert_part, expert, kernels)) for expert in layer.experts]
        for parameter, names in expert_tensors(layer.name, module).items():
            of_each = [e[-1:] if parameter.endswith("down_proj") else e[:-1] for e in experts]
            rows = sum(_shape(part)[0] for part in of_each[0])
            for number, name in enumerate(names if apart else (parameter,)):
                cut = slice(None)
                if apart and len(names) == 2:
                    half = slice(number * rows // 2, (number + 1) * rows // 2)
                    cut = half if module.is_concatenated else slice(number, None, 2)
                if apart and len(names) == len(of_each[0]) == 2:
                    parts = [expert[number] for expert in of_each]
                else:
                    parts = [_cut(part, cut) for expert in of_each for part in expert]
                shape = (len(experts), len(range(rows)[cut]), _shape(parts[0])[1])
                packed, kept = _packed(kind, shape[-1])
                weight = Entry(parameter, packed or parts[0][0].dtype, shape, parts, kept)
                yield f"{name}.weight" if apart else name, weight
                if apart and module.has_bias:
                    bias = (skeleton.specs[f"{parameter}_bias"], itemgetter((slice(None), cut)))
                    yield f"{name}.bias", Entry(f"{parameter}_bias", "F32", _shape(bias), [bias])


def _expert_part(weight: Weight, kernel: Kernel) -> Part:
    """The weight of one expert, as rows of outputs."""
    assert isinstance(kernel, DenseKernel)
    first, last = weight.pieces[0], weight.pieces[-1]
    dtype = str(kernel.file_dtype).removeprefix("torch.")
    encoding = next(one for one in ENCODING_BY_NAME.values() if one.torch_name == dtype)
    shape = (last.row_stop - first.row_start, kernel.in_features)
    spec = TensorSpec(weight.name, first.file, first.offset_bytes, weight.nbytes, encoding, shape)
    if isinstance(kernel, ColumnsKernel):
        return replace(spec, shape=shape[::-1]), torch.t
    return spec, None


def _cut(part: Part, rows: slice) -> Part:
    """Some rows of a part; where they lie together nothing else is read."""
    spec, take = part
    if take is not None:
        return spec, lambda weight: take(weight)[rows]
    if rows.step is not None:
        return spec, itemgetter(rows)
    start, stop, _ = rows.indices(spec.shape[0])
    row_bytes = spec.nbytes // spec.shape[0]
    spec = replace(
        spec, offset_bytes=spec.offset_bytes + start * row_bytes, nbytes=(stop - start) * row_bytes
    )
    return replace(spec, shape=(stop - start, *spec.shape[1:])), None


def _shape(part: Part) -> tuple[int, ...]:
    spec, take = part
    return tuple(take(torch.empty(spec.shape, device="meta")).shape) if take else spec.shape


# ---- reading


def blocks(parts: Iterable[Part], weights: int) -> Iterator[Callable[[], torch.Tensor]]:
    """Functions that read the rows of `parts`, at most `weights` numbers at a time (a row at
    least).
    """
    for spec, take in parts:
        # Another order of rows: read whole, once.
        whole = take(_read(spec, 0, spec.shape[0])) if take else None
        rows, *rest = spec.shape if whole is None else whole.shape
        step = max(1, weights // max(1, math.prod(rest)))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield (
                partial(_read, spec, start, stop)
                if whole is None
                else partial(_rows, whole, start, stop)
            )


def _rows(whole: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return whole[start:stop]


def _read(spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a tensor of the source."""
    row_bytes = spec.nbytes // spec.shape[0]
    data = bytearray((stop - start) * row_bytes)
    with spec.file.open("rb") as file:
        file.seek(spec.offset_bytes + start * row_bytes)
        if file.readinto(data) != len(data):
            raise CheckpointError(
                f"{spec.file}: ends within tensor {spec.name!r}; it was changed while it was read"
            )
    return torch.frombuffer(data, dtype=spec.torch_dtype).view(stop - start, *spec.shape[1:])
