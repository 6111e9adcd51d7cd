"""Make a smaller copy of a safetensors checkpoint: a GGUF file of ggml's blocks, tensor by tensor.

The copy is a directory of `model.gguf`, config.json and the tokenizer's files. If llama.cpp knows
the architecture, the file has its names and a whole header, and llama.cpp reads it alone. Otherwise
it has transformers' names, and only flexinfer reads it; the report says why. Linears, lm_head and
the embedding become blocks of the requested type, or of the nearest in blocks of 32 if their rows
are no multiple of 256, the head at least Q6_K. Norms and biases become float32. Tensors are written
in order of use.

The source is read a block of rows a core at a time (a whole weight where its rows are put in
another order): memory holds these blocks and their float32 copies, whatever the size of the model.
ggml quantises the same on every CPU. Work is written to DST.partial and renamed to DST when
complete; a run that was killed goes on after its last finished tensor when the same command is
given again, and so does one whose disk became full. Cost: reading the source once, writing the copy
once, and on two cores some 800 (Q4_0), 400 (Q8_0), 50 (Q6_K) or 25 (Q4_K) million weights a second.

Not here: importance matrices, and so the types that need one.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from tqdm import tqdm

from flexinfer.cache_dir import user_path
from flexinfer.convert.gguf_entries import ENCODING_BY_NAME, Entry, blocks, lay_out
from flexinfer.formats.checkpoint import local_checkpoint, open_checkpoint
from flexinfer.formats.ggml_types import KINDS, TYPES
from flexinfer.formats.gguf import read_gguf
from flexinfer.formats.safetensors import INDEX_FILE
from flexinfer.formats.tensors import Checkpoint, TensorSpec, read_json
from flexinfer.kernels.ggml import dequantize_rows, quantize_rows
from flexinfer.model.skeleton import Skeleton, build_skeleton
from flexinfer.sizes import format_size

MODEL_FILE = "model.gguf"

# Has all its length from the start, so it must not be taken for a model.
UNFINISHED_FILE = MODEL_FILE + ".unfinished"
HEADER_FILE = MODEL_FILE + ".header"
DEFAULT_KIND = "Q4_K"
# Weights quantised at a time.
BLOCK_WEIGHTS = 1 << 20

# Disk that stays free: for header, tokenizer files and the file system.
MARGIN_BYTES = 64 << 20
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

# In DST.partial: what it is made of, then a line for each finished tensor.
STATE_FILE = "quantize_state.json"
REPORT_FILE = "quantize_report.json"
COPIED_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".md"}
NOT_COPIED = {"config.json", INDEX_FILE, REPORT_FILE}


class QuantizeError(ValueError):
    """A checkpoint that cannot be quantised, or a destination that cannot take the copy."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What quantising one tensor did to its weights."""

    name: str
    kind: str
    nbytes: int
    # Frobenius norm of the difference over that of the weights.
    relative_error: float


@dataclass(frozen=True, slots=True)
class Report:
    """What `quantize` made: sizes of tensors, seconds of the last run. Kept beside the weights."""

    path: Path
    kind: str
    source_bytes: int
    nbytes: int
    seconds: float
    packed: list[TensorReport]
    # Weight that is not quantised -> why.
    kept: dict[str, str]
    # llama.cpp's name, where it can read the file.
    architecture: str | None
    # Why it cannot, or what it reads in another way.
    notes: list[str]

    @property
    def worst(self) -> TensorReport:
        """The tensor with the largest relative error."""
        return max(self.packed, key=lambda tensor: tensor.relative_error)


# What is known of the finished tensors; None for one that is not in blocks.
Done = list[TensorReport | None]


def quantize(
    src: str | Path, dst: str | Path, kind: str = DEFAULT_KIND, progress: bool = True
) -> Report:
    """Write a copy of checkpoint directory `src` in ggml's blocks to directory `dst`, which must
    not exist yet.

    kind: ggml's type, in any case, of KINDS. progress: show a bar, where stderr is a terminal.

    Raises: QuantizeError (a ValueError) for a type that does not exist, a destination that exists
    or is too full (or becomes so: the same call goes on later), a checkpoint that has no weight
    that can be cut into blocks; CheckpointError when `src` is no checkpoint, a quantised one or a
    damaged one; GgmlError for weights that are not finite.
    """
    start_s = time.perf_counter()
    src, dst, kind = local_checkpoint(src) or Path(src), user_path(dst), kind.upper()
    skeleton = _open(src, dst, kind)
    partial = dst.with_name(dst.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / STATE_FILE).open("a+", encoding="utf-8") as state:
        try:
            fcntl.flock(state, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QuantizeError(
                f"{partial}: another run is writing it; wait for it to finish"
            ) from error
        entries, architecture, notes = lay_out(skeleton, kind, partial / HEADER_FILE)
        kept = {entry.parameter: entry.kept for entry in entries.values() if entry.kept}
        if not any(entry.kind in TYPES for entry in entries.values()):
            why = next(iter(kept.values()), "it has none")
            raise QuantizeError(f"{src}: none of its weights can be packed: {why}")
        done = _resume(state, skeleton.checkpoint, partial)
        places = read_gguf(partial / UNFINISHED_FILE).tensors
        _write_missing(partial, entries, places, done, state, progress)
        report = Report(
            path=dst,
            kind=kind,
            source_bytes=sum(spec.nbytes for spec in skeleton.checkpoint.tensors.values()),
            nbytes=sum(spec.nbytes for spec in places.values()),
            seconds=time.perf_counter() - start_s,
            packed=[tensor for tensor in done if tensor is not None],
            kept=kept,
            architecture=architecture,
            notes=notes,
        )
        with _full_disk_explained(partial, 0):
            _finish(partial, src, report)
        (partial / STATE_FILE).unlink()
        partial.rename(dst)
    return report


def _open(src: Path, dst: Path, kind: str) -> Skeleton:
    """The model in `src`. Raises QuantizeError for what cannot be quantised, or not to `dst`."""
    if kind not in KINDS:
        raise QuantizeError(f"type {kind!r}: there are {', '.join(KINDS).lower()}")
    if dst.suffix.lower() == ".gguf":
        raise QuantizeError(
            f"{dst}: DST is a directory, the file in it is {MODEL_FILE}; leave .gguf out"
        )
    if dst.exists():
        raise QuantizeError(f"{dst}: exists already; choose another directory, or remove it first")
    source = open_checkpoint(src)
    if source.in_gguf:
        raise QuantizeError(
            f"{src}: a GGUF file runs as it is; to make a smaller copy, start from the original "
            "checkpoint"
        )
    skeleton = build_skeleton(source)
    specs = skeleton.specs
    for target, origin in skeleton.model.all_tied_weights_keys.items():
        # Of tied weights that the source has twice, one is written if they are equal.
        if specs.get(target) != specs.get(origin) and _equal(specs[target], specs[origin]):
            specs[target] = specs[origin]
    return skeleton


def _equal(one: TensorSpec, other: TensorSpec) -> bool:
    """Whether two tensors hold the same numbers. Reads a block at a time."""
    if one.shape != other.shape:
        return False
    elements = math.prod(one.shape)
    with one.file.open("rb") as mine, other.file.open("rb") as theirs:
        mine.seek(one.offset_bytes)
        theirs.seek(other.offset_bytes)
        for start in range(0, elements, BLOCK_WEIGHTS):
            count = min(BLOCK_WEIGHTS, elements - start)
            numbers = [
                torch.frombuffer(
                    bytearray(file.read(spec.encoding.nbytes(count))), dtype=spec.torch_dtype
                ).float()
                for file, spec in ((mine, one), (theirs, other))
            ]
            if not torch.equal(*numbers):
                return False
    return True


def _resume(state: TextIO, source: Checkpoint, partial: Path) -> Done:
    """What an earlier run of the same job finished. Where there was none, begin: remove what
    another job left.
    """
    header, unfinished = partial / HEADER_FILE, partial / UNFINISHED_FILE
    with header.open("rb") as stream:
        first = min(spec.offset_bytes for spec in read_gguf(header).tensors.values())
        digest = hashlib.sha256(stream.read(first)).hexdigest()
    files = {
        str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files
    }
    facts = {"header": digest, "files": files}
    state.seek(0)
    lines = [line for line in state if line.endswith("\n")]
    # A last line that was cut off when the disk became full.
    state.truncate(sum(map(len, lines)))
    try:
        earlier, *rows = map(json.loads, lines)
        if earlier == facts and unfinished.is_file():
            done: Done = [row and TensorReport(**row) for row in rows]
            header.unlink()
            return done
    except (ValueError, TypeError):
        pass
    for file in partial.iterdir():
        if file.name not in {STATE_FILE, HEADER_FILE}:
            file.unlink()
    header.rename(unfinished)
    state.truncate(0)
    print(json.dumps(facts), file=state, flush=True)
    return []


def _write_missing(
    partial: Path,
    entries: dict[str, Entry],
    places: dict[str, TensorSpec],
    done: Done,
    state: TextIO,
    progress: bool,
) -> None:
    """Write the entries that are not done yet, and note each in `done` and `state`."""
    names = list(entries)[len(done) :]
    total_bytes = sum(entry.nbytes for entry in entries.values())
    missing_bytes = sum(entries[name].nbytes for name in names)
    check_free_disk(partial, missing_bytes)
    # disable=None: no bar where stderr is no terminal.
    bar = tqdm(
        desc="quantize",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        total=total_bytes,
    )
    bar.update(total_bytes - missing_bytes)
    with (
        bar,
        _one_thread_each() as pool,
        (partial / UNFINISHED_FILE).open("r+b", buffering=0) as file,
    ):
        for name in names:
            with _full_disk_explained(partial, missing_bytes):
                done.append(
                    _write(file, entries[name], places[name].offset_bytes, pool, bar.update)
                )
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                print(json.dumps(done[-1] and asdict(done[-1])), file=state, flush=True)
            missing_bytes -= entries[name].nbytes


def _write(
    file: BinaryIO,
    entry: Entry,
    offset_bytes: int,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], object],
) -> TensorReport | None:
    """Write the bytes of one entry; returns what packing did to it, if it is packed."""
    squared_error = squared_norm = 0.0
    end_bytes = offset_bytes + entry.nbytes
    for data, error, norm in _packed(entry, pool):
        chunk = data.view(torch.uint8).numpy().data.cast("B")
        while len(chunk):
            written = os.pwrite(file.fileno(), chunk, offset_bytes)
            chunk, offset_bytes = chunk[written:], offset_bytes + written
            advance(written)
        squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
    assert offset_bytes == end_bytes, entry
    if entry.kind not in TYPES:
        return None
    relative = math.sqrt(squared_error / squared_norm) if squared_norm else 0.0
    return TensorReport(entry.parameter, entry.kind, entry.nbytes, relative)


def _packed(entry: Entry, pool: ThreadPoolExecutor) -> Iterator[tuple[torch.Tensor, float, float]]:
    """The rows of an entry as they are stored, some at a time; the norms of the error and of the
    weights.
    """
    todo = blocks(entry.parts, BLOCK_WEIGHTS)
    if entry.kind not in TYPES:
        dtype: torch.dtype = getattr(torch, str(ENCODING_BY_NAME[entry.kind].torch_name))
        yield from ((rows_of().to(dtype).contiguous(), 0.0, 0.0) for rows_of in todo)
        return
    running = deque(pool.submit(_pack, entry.kind, rows_of) for rows_of in islice(todo, _cores()))
    while running:
        found = running.popleft().result()
        running.extend(pool.submit(_pack, entry.kind, rows_of) for rows_of in islice(todo, 1))
        yield found


def _pack(kind: str, rows_of: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    weight = rows_of().float()
    data = quantize_rows(TYPES[kind], weight)
    error = weight - dequantize_rows(TYPES[kind], data, weight.shape[1])
    return data, float(error.norm()), float(weight.norm())


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@contextmanager
def _one_thread_each() -> Iterator[ThreadPoolExecutor]:
    """One worker a core, each computing on its own: small operations shared by all cores mostly
    wait for one another.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _finish(partial: Path, src: Path, report: Report) -> None:
    """Write everything but the weights, and at last let the file have its name: until then nothing
    loads.
    """
    for file in src.iterdir():
        if file.is_file() and file.suffix in COPIED_SUFFIXES and file.name not in NOT_COPIED:
            shutil.copyfile(file, partial / file.name)
    config = {
        key: value for key, value in read_json(src / "config.json").items() if key != "torch_dtype"
    }
    facts: dict[str, Any] = asdict(report) | {"path": str(report.path)}
    for name, value in ((REPORT_FILE, facts), ("config.json", config | {"dtype": "float32"})):
        (partial / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    (partial / UNFINISHED_FILE).rename(partial / MODEL_FILE)


@contextmanager
def _full_disk_explained(partial: Path, missing_bytes: int) -> Iterator[None]:
    """Raises QuantizeError for a disk that becomes full while the last `missing_bytes` of a copy
    are written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        short_bytes = missing_bytes + MARGIN_BYTES - free_disk_bytes(partial)
        short = (
            f"{short_bytes} bytes ({format_size(short_bytes)}) are missing; "
            if short_bytes > 0
            else ""
        )
        raise QuantizeError(
            f"{partial}: {error.strerror}: {short}make room there and give the same command again, "
            "it goes on after the last finished tensor"
        ) from error


def free_disk_bytes(directory: Path) -> int:
    """What an ordinary user may still write there."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def check_free_disk(directory: Path, needed_bytes: int) -> None:
    """Raises QuantizeError when `needed_bytes` and a margin do not fit on that disk."""
    free_bytes = free_disk_bytes(directory)
    short_bytes = needed_bytes + MARGIN_BYTES - free_bytes
    if short_bytes > 0:
        raise QuantizeError(
            f"{directory}: needs {format_size(needed_bytes)} and {format_size(MARGIN_BYTES)} to "
            f"spare, {format_size(free_bytes)} are free: {short_bytes} bytes "
            f"({format_size(short_bytes)}) are missing; make room there, or choose a directory on "
            "another disk"
        )
