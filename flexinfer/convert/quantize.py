"""Make a smaller copy of a safetensors checkpoint: a GGUF file of ggml's blocks, tensor by tensor.

The copy is a directory: `model.gguf`, and beside it config.json and the tokenizer's files as they were. Where llama.cpp knows the architecture the
file has its names and a whole header, so that it can be read alone, by llama.cpp too; of other families it has
transformers' names, and only flexinfer reads it: which of the two, and why, is in the report. Every linear, lm_head and the embedding
become blocks of the type that is asked for, or of the nearest in blocks of 32 where their rows are no multiple of 256 (`kind_for`), the head of at
least Q6_K; norms and biases become float32. Tensors lie in order of use.

The source is read a block of rows a core at a time (a whole weight where rows have to be put in another order); memory holds these blocks and
their float32 copies, whatever the size of the model. ggml quantises the same on every CPU. Work is written to DST.partial and renamed to DST when complete; a run that was killed
goes on after its last finished tensor when the same command is given again, and so does one whose disk became full. Cost: reading the source
once, writing the copy once, and on two cores some 800 (Q4_0), 400 (Q8_0), 50 (Q6_K) or 25 (Q4_K) million weights a second.

Not here: importance matrices, and so the types that need one. What the copy costs in quality is reported per tensor, and as perplexity by
flexinfer/bench/perplexity.py.
"""

import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flexinfer.convert.gguf_header import (
    ARCHITECTURES,
    Entry,
    HeaderError,
    Stored,
    difference,
    header_values,
    rope_tensors,
    stored_tensors,
    write_header,
)
from flexinfer.convert.gguf_vocabulary import vocabulary
from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.gguf import TYPES, read_gguf
from flexinfer.formats.gguf_model import NAMES_KEY, config_of, expert_tensors
from flexinfer.formats.safetensors import INDEX_FILE
from flexinfer.formats.tensors import CheckpointError, TensorSpec, read_json
from flexinfer.kernels import Kernel
from flexinfer.kernels.dense import ColumnsKernel, Conv1DKernel, DenseKernel
from flexinfer.kernels.ggml import TYPES as GGML_TYPES
from flexinfer.kernels.ggml import dequantize_rows, quantize_rows
from flexinfer.model.skeleton import Skeleton, build_skeleton
from flexinfer.plan.weights import Weight
from flexinfer.sizes import format_size

MODEL_FILE = "model.gguf"

# Has all its length from the start, so it must not be taken for a model.
UNFINISHED_FILE = MODEL_FILE + ".unfinished"

DEFAULT_KIND = "Q4_K"

KINDS = (
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ4_NL",
    "IQ4_XS",
    "IQ3_S",
)

KINDS_OF_32 = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"} | dict.fromkeys(
    ("Q2_K", "Q3_K", "IQ3_S", "IQ4_XS"), "IQ4_NL"
)

# Of the output head, tied or not, where fewer bits are asked for: it costs little and gives most.
HEAD_KIND = "Q6_K"

ENCODING_OF = {encoding.name: encoding for encoding in TYPES.values()}

BLOCK_WEIGHTS = 1 << 20  # quantised at a time

SYNC_BYTES = 64 << 20  # of the copy: what a killed run loses at most, beside the tensor it was at

MARGIN_BYTES = 64 << 20  # of the disk that stay free: header, tokenizer files, the file system's own

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

STATE_FILE = "quantize_state.json"  # in DST.partial: what is being made of what, and how far it is

REPORT_FILE = "quantize_report.json"

COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}

NOT_COPIED = {"config.json", INDEX_FILE, REPORT_FILE}

ALL = slice(None)


class QuantizeError(ValueError):
    """A checkpoint that cannot be quantised, or a destination that cannot take the copy."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What quantising one tensor did to its weights."""

    name: str  # the model's, of the parameter
    kind: str  # ggml's type
    shape: tuple[int, int]  # (rows, in_features)
    nbytes: int
    relative_error: float  # Frobenius norm of the difference over that of the weights
    max_error: float  # largest absolute difference


@dataclass(frozen=True, slots=True)
class Report:
    """What `quantize` made; kept as quantize_report.json beside the weights."""

    path: Path
    kind: str
    source_bytes: int  # of the tensors the model uses
    nbytes: int  # of the copy's
    seconds: float  # of the last run
    packed: list[TensorReport]
    kept: dict[str, str]  # weights left as they are: name -> reason
    architecture: str | None  # llama.cpp's name, where it can read the file
    notes: list[str]  # why it cannot, or what it reads in another way

    @property
    def worst(self) -> TensorReport:
        """The tensor with the largest relative error."""
        return max(self.packed, key=lambda tensor: tensor.relative_error)


def kind_for(kind: str, in_features: int) -> str | None:
    """The type of blocks that rows of `in_features` can be cut into: `kind`, or the nearest of 32; None where there is none."""
    if in_features % ENCODING_OF[kind].block_elements == 0:
        return kind
    return KINDS_OF_32.get(kind) if in_features % 32 == 0 else None


def head_kind(kind: str) -> str:
    """The type of the output head in a copy of `kind`: at least HEAD_KIND."""
    bits = {
        name: ENCODING_OF[name].block_bytes / ENCODING_OF[name].block_elements for name in (kind, HEAD_KIND)
    }
    return max(bits, key=lambda name: bits[name])


def quantize(src: str | Path, dst: str | Path, kind: str = DEFAULT_KIND, progress: bool = True) -> Report:
    """Write a copy of checkpoint directory `src` in ggml's blocks to directory `dst`, which must not exist yet.

    kind: ggml's type, in any case, of KINDS. progress: show a bar, where stderr is a terminal.

    Raises: QuantizeError (a ValueError) for a type that there is not, a destination that exists or is too full (or becomes so: the same call goes on
    later), a checkpoint that is quantised already or has no weight that can be cut into blocks; CheckpointError when `src` is no checkpoint,
    or a damaged one; GgmlError for weights that are not finite.
    """
    start_s = time.perf_counter()
    src, dst = Path(src), Path(dst)
    kind = kind.upper()
    if kind not in KINDS:
        raise QuantizeError(f"type {kind!r}: there are {', '.join(KINDS).lower()}")
    if dst.suffix == ".gguf":
        raise QuantizeError(f"{dst}: DST is a directory, the file in it is {MODEL_FILE}; leave .gguf out")
    if dst.exists():
        raise QuantizeError(f"{dst}: exists already; choose another directory, or remove it first")
    config = read_json(src / "config.json") if (src / "config.json").is_file() else {}
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise QuantizeError(
            f"{src}: is quantised already (by {method!r}); start from the original checkpoint"
        )
    source = Checkpoint.open(src)
    if source.in_gguf:
        raise QuantizeError(
            f"{src}: a GGUF file runs as it is; to make a smaller copy, start from the original checkpoint"
        )
    skeleton = build_skeleton(source)
    partial = dst.with_name(dst.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / STATE_FILE).open("a+", encoding="utf-8") as state_file:
        try:
            fcntl.flock(state_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizeError(f"{partial}: another run is writing it; wait for it to finish") from error
        state = _State(state_file, source, kind)
        state.resume(partial)
        unfinished = partial / UNFINISHED_FILE
        job = _Job(skeleton, kind, unfinished)
        if not job.packed:
            raise QuantizeError(
                f"{src}: none of its weights can be packed: {next(iter(job.kept.values()), 'it has none')}"
            )
        missing_bytes = sum(entry.nbytes for entry in job.entries[len(state.done) :])
        nbytes = sum(entry.nbytes for entry in job.entries)
        check_free_disk(partial, missing_bytes)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        shown = Progress(
            *columns, console=Console(stderr=True), disable=not (progress and sys.stderr.isatty())
        )
        with (
            shown as bar,
            _one_thread_each() as pool,
            unfinished.open("r+b", buffering=0) as file,
        ):
            task = bar.add_task(kind, total=nbytes, completed=nbytes - missing_bytes)
            unsynced_bytes = 0
            for number, entry in enumerate(job.entries[len(state.done) :], start=len(state.done)):
                with _full_disk_explained(partial, missing_bytes):
                    state.done.append(job.write(file, entry, pool, lambda count: bar.advance(task, count)))
                    unsynced_bytes += entry.nbytes
                    if unsynced_bytes >= SYNC_BYTES or number == len(job.entries) - 1:
                        os.fsync(file.fileno())
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                        state.save()
                        unsynced_bytes = 0
                missing_bytes -= entry.nbytes
        report = Report(
            path=dst,
            kind=kind,
            source_bytes=sum(
                spec.nbytes for spec in {spec.name: spec for spec in skeleton.specs.values()}.values()
            )
            + (skeleton.mixture.nbytes if skeleton.mixture is not None else 0),
            nbytes=nbytes,
            seconds=time.perf_counter() - start_s,
            packed=[tensor for tensor in state.done if tensor is not None],
            kept=job.kept,
            architecture=job.architecture,
            notes=job.notes,
        )
        with _full_disk_explained(partial, 0):
            _finish(partial, src, config, report)
        (partial / STATE_FILE).unlink()
        partial.rename(dst)
    return report


class _State:
    """What an unfinished directory is being made of, and how far: kept in it, so that the same command goes on."""

    def __init__(self, file: Any, source: Checkpoint, kind: str) -> None:
        self._file = file
        self._facts: dict[str, Any] = {
            "source": str(source.path.resolve()),
            "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files},
            "kind": kind,
            "gguf": version("gguf"),  # which writes the header
        }
        self.done: list[TensorReport | None] = []  # for each tensor that is on disk

    def resume(self, partial: Path) -> None:
        """Take up what an earlier run of the same job left in `partial`; remove what one of another job did."""
        (partial / "config.json").unlink(missing_ok=True)  # until it is complete, nothing may load it
        self._file.seek(0)
        try:
            earlier = json.loads(self._file.read())
            if earlier["facts"] == self._facts and (partial / UNFINISHED_FILE).is_file():
                self.done = [
                    None if row is None else TensorReport(**row | {"shape": tuple(row["shape"])})
                    for row in earlier["done"]
                ]
                return
        except (ValueError, KeyError, TypeError):
            pass  # a new directory, or a state cut off while it was written
        for file in partial.iterdir():
            if file.name != STATE_FILE:
                file.unlink()
        self.save()

    def save(self) -> None:
        text = json.dumps({"facts": self._facts, "done": [row and asdict(row) for row in self.done]})
        self._file.seek(0)
        self._file.truncate(0)
        self._file.write(text)
        self._file.flush()


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the numbers of an entry come from."""

    parameter: str  # the model's name
    spec: TensorSpec
    transposed: bool = False  # the rows of the entry are the columns of the source
    order: tuple[int, ...] | None = None  # row i of the source is row order[i] of the entry
    added: float = 0.0  # what the source is more than the entry
    rows: slice = field(
        default_factory=lambda: ALL
    )  # those of the source, as the entry has them, that go into it
    columns: slice = field(default_factory=lambda: ALL)
    count: int | None = None  # rows that it gives; None: all of the entry


class _Job:
    """What is to be written, where it comes from, and the file's header, which is written by making a job."""

    def __init__(self, skeleton: Skeleton, kind: str, file: Path) -> None:
        self._skeleton, self._kind = skeleton, kind
        heads = [weight.name for weight in skeleton.weights if weight.kind == "head"]
        self._heads = {
            skeleton.specs[name].name for name in heads
        }  # the source's names: of a tied one the embedding's
        self.kept: dict[str, str] = {}
        self.packed: set[str] = set()  # names of entries in blocks
        self.notes: list[str] = []
        self._sources: dict[str, list[_Source]] = {}  # of an entry, one after another
        self._extra = rope_tensors(skeleton.config)
        self.architecture = ARCHITECTURES.get(skeleton.config.model_type)
        fresh = file.with_name(file.name + ".header")
        try:
            if self.architecture is None:
                raise HeaderError(f"llama.cpp's header of a {skeleton.config.model_type} is not known here")
            self.entries = self._write_header(fresh)
            self._fill_extra(fresh)
            if lost := difference(skeleton.config, config_of(read_gguf(fresh))):
                raise HeaderError(lost)
        except (HeaderError, CheckpointError) as error:
            self.notes = [f"only flexinfer reads it: {error}"]
            self.architecture, self._extra = None, {}
            self.entries = self._write_header(fresh)
        if file.exists():  # of an earlier run of the same job: the header is the same
            fresh.unlink()
        else:
            fresh.rename(file)

    def _write_header(self, file: Path) -> list[Entry]:
        """Write the header, in llama.cpp's words if `architecture` is one of its names, else in transformers'."""
        self._sources, self.packed, self.kept = {}, set(), {}
        skeleton, name = self._skeleton, self.architecture
        experts = list(_expert_sources(skeleton, apart=name is not None))
        among_them = {sources[0].parameter for _, _, sources in experts}  # biases
        order = [parameter for parameter in self._in_order_of_use() if parameter not in among_them]
        stored = stored_tensors(skeleton.model, name, order) if name else {}
        entries = [_entry(tensor, "F32", numbers.shape) for tensor, numbers in self._extra.items()]
        entries += [self._entry(parameter, stored.get(parameter, Stored(parameter))) for parameter in order]
        entries += [self._expert_entry(*one) for one in experts]
        values: dict[str, Any] = {
            "general.file_type": _file_type(self._kind),
            "general.quantization_version": 2,
        }
        values["general.name"] = skeleton.checkpoint.path.resolve().name
        values[NAMES_KEY] = "llama.cpp" if name else "transformers"
        if name:
            values |= header_values(skeleton.config, name)
            try:
                words, notes = vocabulary(skeleton.checkpoint.config_dir, skeleton.config.vocab_size)
                values, self.notes = values | words, notes
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                self.notes = [f"the file alone has no tokenizer ({error})"]
        return write_header(file, name or skeleton.config.model_type, values, entries)

    def _in_order_of_use(self) -> Iterator[str]:
        """The parameters, each tensor of the source once: the embedding, what is not a linear, then the linears."""
        specs, seen = self._skeleton.specs, set()
        embedding = self._skeleton.embedding_name + ".weight"
        for parameter in (
            embedding,
            *self._skeleton.resident,
            *(weight.name for weight in self._skeleton.weights),
        ):
            if specs[parameter].name not in seen:
                seen.add(specs[parameter].name)
                yield parameter

    def _entry(self, parameter: str, stored: Stored) -> Entry:
        spec, kernel = self._skeleton.specs[parameter], self._skeleton.kernels.get(parameter)
        if stored.flat:
            spec, kernel = replace(spec, shape=spec.shape[1:]), None
        matrix = kernel is not None or parameter == self._skeleton.embedding_name + ".weight"
        by_columns = isinstance(kernel, Conv1DKernel)  # its weight is [in, out]
        shape, kind = spec.shape, None
        if matrix:
            in_features = spec.shape[0] if by_columns else spec.shape[1]
            wanted = head_kind(self._kind) if spec.name in self._heads else self._kind
            kind = kind_for(wanted, in_features)
            if kind is None:
                self.kept[parameter] = f"its rows of {in_features} weights are no multiple of 32"
        transposed = stored.transposed or (by_columns and kind is not None)
        if transposed:
            shape = shape[::-1]
        if kind is not None:
            self.packed.add(stored.name)
        else:
            kind = _plain_kind(spec, matrix)
        self._sources[stored.name] = [_Source(parameter, spec, transposed, stored.order, stored.added)]
        return _entry(stored.name, kind, shape)

    def _expert_entry(self, name: str, shape: tuple[int, ...], sources: list[_Source]) -> Entry:
        self._sources[name] = sources
        kind: str | None = "F32"
        if len(shape) == 3:
            kind = kind_for(self._kind, shape[-1])
            if kind is None:
                self.kept[name] = f"its rows of {shape[-1]} weights are no multiple of 32"
                kind = sources[0].spec.encoding.name
            else:
                self.packed.add(name)
        assert kind is not None
        return _entry(name, kind, shape)

    def _fill_extra(self, file: Path) -> None:
        with file.open("r+b") as stream:
            for entry in self.entries[: len(self._extra)]:
                stream.seek(entry.offset_bytes)
                stream.write(self._extra[entry.name].tobytes())

    def write(
        self, file: BinaryIO, entry: Entry, pool: ThreadPoolExecutor, advance: Callable[[int], object]
    ) -> TensorReport | None:
        """Write the bytes of one entry; what packing did to it, if it is packed."""
        offset_bytes = entry.offset_bytes
        errors = _Errors()
        for chunk in self._chunks(entry, pool, errors):
            _write_all(file.fileno(), chunk, offset_bytes)
            offset_bytes += len(chunk)
            advance(len(chunk))
        assert offset_bytes == entry.offset_bytes + entry.nbytes, entry
        if entry.name not in self.packed:
            return None
        shape = (math.prod(entry.shape[:-1]), entry.shape[-1])
        parameter = self._sources[entry.name][0].parameter
        return TensorReport(parameter, entry.kind, shape, entry.nbytes, errors.relative, errors.largest)

    def _chunks(self, entry: Entry, pool: ThreadPoolExecutor, errors: "_Errors") -> Iterator[memoryview]:
        if entry.name in self._extra:
            yield memoryview(self._extra[entry.name].tobytes())
            return
        todo = _cuts(self._sources[entry.name], entry.shape[0])
        if entry.name not in self.packed:
            dtype: torch.dtype = getattr(torch, str(ENCODING_OF[entry.kind].torch_name))
            for rows_of, start, stop in todo:
                yield rows_of(start, stop).to(dtype).contiguous().view(torch.uint8).numpy().data.cast("B")
            return
        running = deque(pool.submit(_pack, entry.kind, *cut) for cut in itertools.islice(todo, _cores()))
        while running:
            data, *found = running.popleft().result()
            running.extend(pool.submit(_pack, entry.kind, *cut) for cut in itertools.islice(todo, 1))
            errors.add(*found)
            yield data.numpy().data.cast("B")


@dataclass(slots=True)
class _Errors:
    """Sums over the blocks of a tensor."""

    squared_error: float = 0.0
    squared_norm: float = 0.0
    largest: float = 0.0

    def add(self, error: float, norm: float, largest: float) -> None:
        self.squared_error += error**2
        self.squared_norm += norm**2
        self.largest = max(self.largest, largest)

    @property
    def relative(self) -> float:
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def _pack(
    kind: str, rows_of: Callable[[int, int], torch.Tensor], start: int, stop: int
) -> tuple[torch.Tensor, float, float, float]:
    """Rows in blocks; the norms of the error and of the weights, and the largest error."""
    weight = rows_of(start, stop).float()
    data, norm = quantize_rows(GGML_TYPES[kind], weight), float(weight.norm())
    error = weight - dequantize_rows(GGML_TYPES[kind], data, weight.shape[1])
    return data, float(error.norm()), norm, float(error.abs().max())


def _expert_sources(
    skeleton: Skeleton, *, apart: bool
) -> Iterator[tuple[str, tuple[int, ...], list[_Source]]]:
    """Name, shape and sources of the entries of experts, layer by layer: weights [experts, rows, in], biases [experts, rows].

    apart: in llama.cpp's names, which has gate and up in two tensors, and biases beside them; else by the model's parameters.
    """
    if skeleton.experts is None:
        return
    for layer in skeleton.experts.mixture.layers:
        module: Any = skeleton.model.get_submodule(layer.name)
        kernels, experts = skeleton.experts.kernels[layer.name], layer.experts
        for parameter, names in expert_tensors(layer.name, module).items():
            down = parameter.endswith("down_proj")
            own = range(len(kernels) - 1, len(kernels)) if down else range(len(kernels) - 1)
            count = sum(_rows(experts[0][i]) for i in own)
            halves = [slice(0, count // 2), slice(count // 2, None)]
            if not module.is_concatenated:
                halves = [slice(0, None, 2), slice(1, None, 2)]
            entries: list[
                tuple[str, Sequence[int], slice, slice]
            ]  # name, weights, rows of them, columns of the bias
            if not apart or len(names) == 1:
                entries = [(f"{names[0]}.weight" if apart else parameter, own, ALL, ALL)]
            elif len(own) == 2:  # the source has them apart too
                entries = [(f"{names[n]}.weight", own[n : n + 1], ALL, halves[n]) for n in range(2)]
            else:
                entries = [(f"{names[n]}.weight", own, halves[n], halves[n]) for n in range(2)]
            rows = count // len(entries)
            for name, weights, cut, columns in entries:
                sources = [
                    _expert_source(expert[i], kernels[i], parameter, cut, rows // len(weights))
                    for expert in experts
                    for i in weights
                ]
                yield name, (len(experts), rows, kernels[weights[0]].in_features), sources
                if apart and module.has_bias:
                    bias = f"{parameter}_bias"
                    source = _Source(bias, skeleton.specs[bias], columns=columns, count=len(experts))
                    yield name.replace(".weight", ".bias"), (len(experts), rows), [source]


def _rows(weight: Weight) -> int:
    return weight.pieces[-1].row_stop - weight.pieces[0].row_start


def _expert_source(weight: Weight, kernel: Kernel, parameter: str, rows: slice, count: int) -> _Source:
    """`rows` of the weight of one expert, as the entry has them."""
    assert isinstance(kernel, DenseKernel | ColumnsKernel)
    by_columns = isinstance(kernel, ColumnsKernel)
    encoding = next(
        one for one in ENCODING_OF.values() if one.torch_name == str(kernel.file_dtype).removeprefix("torch.")
    )
    shape = (_rows(weight), kernel.in_features)
    first = weight.pieces[0]
    spec = TensorSpec(
        weight.name,
        first.file,
        first.offset_bytes,
        weight.nbytes,
        encoding,
        shape[::-1] if by_columns else shape,
    )
    return _Source(parameter, spec, transposed=by_columns, rows=rows, count=count)


def _cuts(sources: list[_Source], rows: int) -> Iterator[tuple[Callable[[int, int], torch.Tensor], int, int]]:
    """What an entry is made of: a function that reads rows, and which of them; a block of weights at a time.

    rows: of the entry, where a source does not say how many it gives.
    """
    for source in sources:
        rows_of, count = _rows_of(source), source.count or rows
        width = (
            math.prod(source.spec.shape) // source.spec.shape[-1 if source.transposed else 0] if rows else 1
        )
        step = max(1, BLOCK_WEIGHTS // max(1, width))
        for start in range(0, count, step):
            yield rows_of, start, min(start + step, count)


def _rows_of(source: _Source) -> Callable[[int, int], torch.Tensor]:
    """A function that reads rows [start, stop) of what `source` gives."""
    spec = source.spec
    row_bytes = spec.nbytes // spec.shape[0] if spec.shape[0] else 0

    def read(start: int, stop: int) -> torch.Tensor:
        data = _read(spec, start * row_bytes, (stop - start) * row_bytes)
        rows = (
            torch.frombuffer(data, dtype=spec.torch_dtype) if data else torch.empty(0, dtype=spec.torch_dtype)
        )
        return rows.view(stop - start, *spec.shape[1:])

    if (
        source.transposed or source.order is not None or source.rows.step
    ):  # another order of rows: read it whole, once
        whole = read(0, spec.shape[0])
        whole = whole.T.contiguous() if source.transposed else whole
        if source.order is not None:
            whole = whole[torch.tensor(source.order).argsort()]
        whole = whole[source.rows]
        return lambda start, stop: whole[start:stop]
    if source.added:
        return lambda start, stop: read(start, stop).float() - source.added
    first = source.rows.start or 0
    return lambda start, stop: read(first + start, first + stop)[..., source.columns]


def _entry(name: str, kind: str, shape: tuple[int, ...]) -> Entry:
    return Entry(name, kind, shape, ENCODING_OF[kind].nbytes(math.prod(shape)))


def _plain_kind(spec: TensorSpec, matrix: bool) -> str:
    """The type of what is not packed: weights of linears as they are, other numbers as float32, which llama.cpp wants of them."""
    if spec.encoding.is_float:
        return spec.encoding.name if matrix else "F32"
    return {"U8": "I8", "BOOL": "I8"}.get(spec.encoding.name, spec.encoding.name)


def _file_type(kind: str) -> int:
    from gguf import LlamaFileType

    names = (f"MOSTLY_{kind}", f"MOSTLY_{kind}_M", f"MOSTLY_{kind}_S")
    return int(next(LlamaFileType[name] for name in names if name in LlamaFileType.__members__))


@contextmanager
def _full_disk_explained(partial: Path, missing_bytes: int) -> Iterator[None]:
    """Raises QuantizeError for a disk that becomes full while the last `missing_bytes` of a copy are written."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        short_bytes = missing_bytes + MARGIN_BYTES - free_disk_bytes(partial)
        how_much = (
            f"{short_bytes} bytes ({format_size(short_bytes)}) are missing; " if short_bytes > 0 else ""
        )
        raise QuantizeError(
            f"{partial}: {error.strerror}: {how_much}make room there and give the same command again, "
            "it goes on after the last finished tensor"
        ) from error


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """One worker a core, each computing on its own: small operations shared by all cores mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            initializer=torch.set_num_threads, initargs=(1,), max_workers=_cores()
        ) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _finish(partial: Path, src: Path, config: dict[str, Any], report: Report) -> None:
    """Write everything but the weights, and at last let the file have its name: until then nothing loads."""
    for file in src.iterdir():
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED:
            shutil.copyfile(file, partial / file.name)
    _write_json(partial / REPORT_FILE, asdict(report) | {"path": str(report.path)})
    _write_json(
        partial / "config.json",
        {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": "float32"},
    )
    (partial / UNFINISHED_FILE).rename(partial / MODEL_FILE)


def free_disk_bytes(directory: Path) -> int:
    """What an ordinary user may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def check_free_disk(directory: Path, needed_bytes: int) -> None:
    """Raises QuantizeError when `needed_bytes` and a margin do not fit on the disk of `directory`."""
    free_bytes = free_disk_bytes(directory)
    short_bytes = needed_bytes + MARGIN_BYTES - free_bytes
    if short_bytes > 0:
        raise QuantizeError(
            f"{directory}: needs {format_size(needed_bytes)} and {format_size(MARGIN_BYTES)} to spare, "
            f"{format_size(free_bytes)} are free: {short_bytes} bytes ({format_size(short_bytes)}) are missing; "
            "make room there, or choose a directory on another disk"
        )


def _read(spec: TensorSpec, start: int, nbytes: int) -> bytearray:
    """Bytes [start, start + nbytes) of a tensor."""
    data = bytearray(nbytes)
    with spec.file.open("rb") as file:
        file.seek(spec.offset_bytes + start)
        if file.readinto(data) != nbytes:
            raise QuantizeError(
                f"{spec.file}: ends within tensor {spec.name!r}; it was changed while it was read"
            )
    return data


def _write_json(path: Path, value: object) -> None:
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(path)


def _write_all(descriptor: int, data: memoryview, offset_bytes: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(descriptor, view, offset_bytes)
        view, offset_bytes = view[written:], offset_bytes + written
