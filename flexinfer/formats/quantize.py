"""Make a packed (int4 or int8) copy of a safetensors checkpoint, tensor by tensor.

Every linear of the decoder, and lm_head, becomes one packed tensor (packed.py); embeddings, norms and biases
are copied byte for byte. The copy is again a safetensors directory: tensors in order of use, packed ones first
in each shard and aligned to pages, so that a block is one direct read.

The source is read one block of rows a core at a time; memory holds these blocks and their float32 copies, whatever
the size of the model. Work is written to DST.partial and renamed to DST when complete; a run that was killed goes on
after its last finished shard when the same command is given again, and so does one whose disk became full. Cost: reading the source once, writing the
copy once, and quantising (round to nearest, in the range that fits each group best) at some 100 MB of bf16 a second
on two cores.

Not here: calibrated methods such as GPTQ and AWQ. What the copy costs in quality is reported per tensor, and as
perplexity by flexinfer/bench/perplexity.py.
"""

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import shutil
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from flexinfer.formats.checkpoint import INDEX_FILE, Checkpoint, TensorSpec, read_json
from flexinfer.formats.skeleton import Skeleton, build_skeleton
from flexinfer.kernels.dense import Conv1DKernel
from flexinfer.kernels.packed import (
    ALIGNMENT_BYTES,
    Block,
    PackedFormat,
    blocks,
    can_pack,
    dequantize,
    measure_dequantize_rows,
    pack_rows,
    packed_nbytes,
)
from flexinfer.plan import format_size

SHARD_BYTES = 512 * 2**20  # what a killed run loses at most
COPY_BYTES = 4 * 2**20
MARGIN_BYTES = 64 * 2**20  # of the disk that stay free: headers, tokenizer files, the file system's own
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
STATE_FILE = "quantize_state.json"  # in DST.partial: what is being made of what
REPORT_FILE = "quantize_report.json"
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}
NOT_COPIED = {"config.json", INDEX_FILE, REPORT_FILE}


class QuantizeError(ValueError):
    """A checkpoint that cannot be quantised, or a destination that cannot take the copy."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What quantising one linear did to its weights."""

    name: str
    shape: tuple[int, int]  # (out_features, in_features)
    nbytes: int  # packed
    relative_error: float  # Frobenius norm of the difference over that of the weights
    max_error: float  # largest absolute difference


@dataclass(frozen=True, slots=True)
class Report:
    """What `quantize` made; kept as quantize_report.json beside the weights."""

    path: Path
    format: PackedFormat
    source_bytes: int  # of the tensors the model uses
    nbytes: int  # of the copy
    seconds: float  # of the last run
    packed: list[TensorReport]
    kept: dict[str, str]  # linears left as they are: name -> reason

    @property
    def worst(self) -> TensorReport:
        """The packed tensor with the largest relative error."""
        return max(self.packed, key=lambda tensor: tensor.relative_error)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: str  # safetensors' name of the type
    shape: tuple[int, ...]
    nbytes: int


def quantize(
    src: str | Path, dst: str | Path, bits: int = 4, group_size: int | None = None, progress: bool = True
) -> Report:
    """Write a packed copy of checkpoint directory `src` to directory `dst`, which must not exist yet.

    bits: 4 or 8. group_size: weights that share a scale and a zero, 4 bit only; 64 unless given. progress: show a bar, where
    stderr is a terminal.

    Raises: QuantizeError or PackedError (both ValueError) for arguments that do not go together, a destination that
    exists or is too full (or becomes so: the same call goes on later), a checkpoint that is quantised already or whose linears the kernels cannot take;
    CheckpointError when `src` is no checkpoint, or a damaged one.
    """
    start_s = time.perf_counter()
    src, dst = Path(src), Path(dst)
    if bits == 8 and group_size is not None:
        raise QuantizeError(
            f"group_size: got {group_size} with bits=8, which scales whole rows; leave it out"
        )
    fmt = PackedFormat.for_this_cpu(bits, group_size or 64)
    if dst.exists():
        raise QuantizeError(f"{dst}: exists already; choose another directory, or remove it first")
    config = read_json(src / "config.json") if (src / "config.json").is_file() else {}
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise QuantizeError(
            f"{src}: is quantised already (by {method!r}); start from the original checkpoint"
        )
    source = Checkpoint.open(src)
    if source.architecture is not None:
        raise QuantizeError(
            f"{src}: a GGUF file runs as it is; to make a smaller copy, start from the original checkpoint"
        )
    job = _Job(fmt, build_skeleton(source))
    if not job.linears:
        raise QuantizeError(
            f"{src}: none of its linears can be packed: {next(iter(job.kept.values()), 'it has none')}"
        )

    partial = dst.with_name(dst.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / STATE_FILE).open("a+", encoding="utf-8") as state_file:
        try:
            fcntl.flock(state_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizeError(f"{partial}: another run is writing it; wait for it to finish") from error
        fmt = _resume(partial, state_file, src, fmt)
        names = shard_names(len(job.shards))
        notes = {name: _read_notes(partial / name) for name in names}
        missing_bytes = sum(
            entry.nbytes
            for name, shard in zip(names, job.shards, strict=True)
            if notes[name] is None
            for entry in shard
        )
        nbytes = sum(entry.nbytes for shard in job.shards for entry in shard)
        check_free_disk(partial, missing_bytes)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TimeRemainingColumn())
        shown = Progress(
            *columns, console=Console(stderr=True), disable=not (progress and sys.stderr.isatty())
        )
        with shown as bar, _one_thread_each() as pool:
            task = bar.add_task(f"{bits} bit", total=nbytes, completed=nbytes - missing_bytes)
            for name, shard in zip(names, job.shards, strict=True):
                if notes[name] is None:
                    with _full_disk_explained(partial, missing_bytes):
                        notes[name] = job.write(
                            partial / name, shard, pool, functools.partial(bar.advance, task)
                        )
                    missing_bytes -= sum(entry.nbytes for entry in shard)
        report_of = {report.name: report for reports in notes.values() for report in reports or []}
        report = Report(
            path=dst,
            format=fmt,
            source_bytes=job.source_bytes,
            nbytes=nbytes,
            seconds=time.perf_counter() - start_s,
            packed=[report_of[name] for name in job.linears],
            kept=job.kept,
        )
        with _full_disk_explained(partial, 0):
            _finish(partial, src, config, job, report)
        (partial / STATE_FILE).unlink()
        partial.rename(dst)
    return report


class _Job:
    """What is to be written, and the bytes of each entry."""

    def __init__(self, fmt: PackedFormat, skeleton: Skeleton) -> None:
        self._fmt = fmt
        self.linears: dict[str, tuple[int, int]] = {}  # name in the copy -> (out_features, in_features)
        self.kept: dict[str, str] = {}
        self._sources: dict[str, TensorSpec] = {}  # by the name in the copy
        self._transposed: set[str] = set()
        parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
        embedding = skeleton.specs[skeleton.embedding_name + ".weight"]
        entries = [_copied_entry(embedding)]
        self._sources[embedding.name] = embedding
        for weight in skeleton.weights:
            spec = skeleton.specs[weight.name]
            size = tuple(parameters[weight.name].shape)
            transposed = isinstance(skeleton.kernels[weight.name], Conv1DKernel)
            out_features, in_features = size[::-1] if transposed else size
            if not can_pack(fmt, in_features):
                unit = fmt.group_size if fmt.bits == 4 else 32
                self.kept[weight.name] = f"its rows of {in_features} weights are no multiple of {unit}"
                continue
            tied = spec.name == embedding.name
            name = weight.name if tied else spec.name
            self.linears[name] = (out_features, in_features)
            self._sources[name] = spec
            if transposed:
                self._transposed.add(name)
            entries.append(packed_entry(fmt, name, out_features, in_features))
        for spec in skeleton.specs.values():
            if spec.name not in self._sources:
                self._sources[spec.name] = spec
                entries.append(_copied_entry(spec))
        self.source_bytes = sum(
            spec.nbytes for spec in {spec.name: spec for spec in skeleton.specs.values()}.values()
        )
        self.shards = plan_shards(entries, SHARD_BYTES)

    def write(
        self, path: Path, shard: Sequence[Entry], pool: ThreadPoolExecutor, advance: Callable[[int], None]
    ) -> list[TensorReport]:
        """Write a shard, and beside it what packing did to its tensors; `path` appears when both are complete."""
        reports: list[TensorReport] = []

        def chunks(entry: Entry) -> Iterator[memoryview]:
            for chunk in self._chunks(entry, reports, pool):
                yield chunk
                advance(len(chunk))

        unfinished = _unfinished(path)
        try:
            write_shard(unfinished, shard, chunks)
            _write_json(_notes_path(path), [asdict(report) for report in reports])
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.rename(path)
        return reports

    def _chunks(
        self, entry: Entry, reports: list[TensorReport], pool: ThreadPoolExecutor
    ) -> Iterator[memoryview]:
        """The bytes of one entry; adds to `reports` what packing did to it."""
        spec = self._sources[entry.name]
        if entry.name not in self.linears:
            for start in range(0, spec.nbytes, COPY_BYTES):
                yield memoryview(_read(spec, start, min(COPY_BYTES, spec.nbytes - start)))
            return
        out_features, in_features = self.linears[entry.name]
        squared_error = squared_norm = max_error = 0.0
        todo = iter(blocks(self._fmt, out_features, in_features))
        running = deque(
            pool.submit(self._pack, entry.name, block) for block in itertools.islice(todo, _cores())
        )
        while running:
            data, block_error, block_norm, block_max = running.popleft().result()
            running.extend(pool.submit(self._pack, entry.name, block) for block in itertools.islice(todo, 1))
            squared_error, squared_norm = squared_error + block_error**2, squared_norm + block_norm**2
            max_error = max(max_error, block_max)
            yield data.numpy().data
        relative_error = math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
        reports.append(
            TensorReport(entry.name, (out_features, in_features), entry.nbytes, relative_error, max_error)
        )

    def _pack(self, name: str, block: Block) -> tuple[torch.Tensor, float, float, float]:
        """A packed block; the norms of its error and of its weights, and the largest error."""
        weight = self._rows(name, block.row_start, block.row_stop).float()
        data, norm = pack_rows(self._fmt, weight), float(weight.norm())
        error = weight.sub_(dequantize(self._fmt, data, *weight.shape))
        return data, float(error.norm()), norm, float(error.abs_().max())

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Output rows [start, stop) of a weight: [stop - start, in_features]."""
        spec = self._sources[name]
        if name in self._transposed:  # the rows of the file are inputs: read it whole
            data = torch.frombuffer(_read(spec, 0, spec.nbytes), dtype=spec.torch_dtype)
            return data.view(spec.shape)[:, start:stop].T
        row_bytes = spec.nbytes // spec.shape[0]
        data = torch.frombuffer(
            _read(spec, start * row_bytes, (stop - start) * row_bytes), dtype=spec.torch_dtype
        )
        return data.view(stop - start, -1)


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
            "it goes on after the last finished file"
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


def _resume(partial: Path, state_file: Any, src: Path, fmt: PackedFormat) -> PackedFormat:
    """Make `partial` hold only what an earlier run of the same job left; returns the format of that job."""
    state: dict[str, Any] = {
        "source": str(src.resolve()),
        "files": {
            file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in Checkpoint.open(src).files
        },
        "format": fmt.to_config(),
    }
    (partial / "config.json").unlink(missing_ok=True)  # until it is complete, nothing may load it
    for file in partial.glob("*" + _unfinished(partial).suffix):
        file.unlink()
    state_file.seek(0)
    try:
        earlier = json.loads(state_file.read())
        rows = earlier["format"]["dequantize_rows"]  # measured, so it may differ from run to run
        if earlier == state | {"format": state["format"] | {"dequantize_rows": rows}}:
            return PackedFormat.from_config(earlier["format"])
    except (ValueError, KeyError, TypeError):
        pass  # a new directory, or a state cut off while it was written
    for file in partial.iterdir():
        if file.name != STATE_FILE:
            file.unlink()
    fmt = measure_dequantize_rows(fmt)
    state_file.truncate(0)
    json.dump(state | {"format": fmt.to_config()}, state_file)
    state_file.flush()
    return fmt


def _notes_path(shard: Path) -> Path:
    return shard.with_name(shard.name + ".json")


def _read_notes(shard: Path) -> list[TensorReport] | None:
    """What packing did to the tensors of a shard that an earlier run finished; None if it did not."""
    try:
        rows = json.loads(_notes_path(shard).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [TensorReport(**row | {"shape": tuple(row["shape"])}) for row in rows] if shard.exists() else None


def _finish(partial: Path, src: Path, config: dict[str, Any], job: _Job, report: Report) -> None:
    """Write everything but the weights; config.json, without which nothing loads, last. Notes of shards go after that, so
    that a run which ends before finds them.
    """
    for file in src.iterdir():
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED:
            shutil.copyfile(file, partial / file.name)
    write_index(partial, job.shards)
    _write_json(partial / REPORT_FILE, asdict(report) | {"path": str(report.path)})
    _write_json(partial / "config.json", config | {"quantization_config": report.format.to_config()})
    for name in shard_names(len(job.shards)):
        _notes_path(partial / name).unlink()


def packed_entry(fmt: PackedFormat, name: str, out_features: int, in_features: int) -> Entry:
    """The entry of a packed linear."""
    nbytes = packed_nbytes(fmt, out_features, in_features)
    return Entry(name, "U8", (nbytes,), nbytes)


def plan_shards(entries: Iterable[Entry], shard_bytes: int) -> list[list[Entry]]:
    """Cut the tensors, given in order of use, into shards of about `shard_bytes`.

    Within a shard, tensors that fill whole pages come first, so that all of them start at a page; the others
    follow, wider dtypes first, so that each is aligned to its own.
    """
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + entry.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    return [
        sorted(shard, key=lambda entry: (entry.nbytes % ALIGNMENT_BYTES != 0, -_item_bytes(entry)))
        for shard in shards
    ]


def shard_names(count: int) -> list[str]:
    """File names of a checkpoint of `count` shards, as transformers names them."""
    return [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


def write_shard(
    path: Path,
    entries: Sequence[Entry],
    chunks: Callable[[Entry], Iterable[memoryview | bytes]],
) -> None:
    """Write one safetensors file whose data starts at a page, and wait until it is on disk.

    chunks: yields the bytes of an entry, piece by piece.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset_bytes = 0
    for entry in entries:
        stop_bytes = offset_bytes + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset_bytes, stop_bytes],
        }
        offset_bytes = stop_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), struct.pack("<Q", len(text)) + text)
        for entry in entries:
            written_bytes = 0
            for chunk in chunks(entry):
                _write_all(file.fileno(), chunk)
                written_bytes += len(chunk)
            assert written_bytes == entry.nbytes, (entry, written_bytes)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_index(directory: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write model.safetensors.index.json for shards named by shard_names."""
    weight_map = {
        entry.name: name
        for name, shard in zip(shard_names(len(shards)), shards, strict=True)
        for entry in shard
    }
    total_bytes = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(directory / INDEX_FILE, index)


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


def _copied_entry(spec: TensorSpec) -> Entry:
    return Entry(spec.name, spec.dtype, spec.shape, spec.nbytes)


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


def _unfinished(path: Path) -> Path:
    """Where a file is written until it is complete."""
    return path.with_name(path.name + ".unfinished")


def _write_json(path: Path, value: object) -> None:
    unfinished = _unfinished(path)
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(path)


def _item_bytes(entry: Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return entry.nbytes // max(1, count)


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]
