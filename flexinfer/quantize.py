"""Make a packed (int4 or int8) copy of a safetensors checkpoint, tensor by tensor.

Every linear of the decoder, and lm_head, becomes one packed tensor (packed.py); embeddings, norms and biases
are copied byte for byte. The copy is again a safetensors directory: tensors in order of use, packed ones first
in each shard and aligned to pages, so that a block is one direct read.

The source is read one block of rows at a time; memory holds that block and its float32 copy, whatever the size
of the model. Work is written to DST.partial and renamed to DST when complete; a run that was killed goes on
after its last finished shard when the same command is given again. Cost: reading the source once, writing the
copy once, and quantising (round to nearest, asymmetric groups) at some 100 MB of bf16 a second on two cores.

Not here: calibrated methods such as GPTQ and AWQ. What the copy costs in quality is reported per tensor, and as
perplexity by flexinfer/bench/perplexity.py.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexinfer.checkpoint import INDEX_FILE
from flexinfer.packed import ALIGNMENT_BYTES, PackedFormat, packed_nbytes


class QuantizeError(ValueError):
    """A checkpoint that cannot be quantised, or a destination that cannot take the copy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written."""

    name: str
    dtype: str  # safetensors' name of the type
    shape: tuple[int, ...]
    nbytes: int


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
    path: Path, entries: Sequence[Entry], chunks: Callable[[Entry], Iterable[memoryview | bytes]]
) -> None:
    """Write one safetensors file whose data starts at a page; `path` appears only when it is complete and on disk.

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
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("wb", buffering=0) as file:
        _write_all(file.fileno(), struct.pack("<Q", len(text)) + text)
        for entry in entries:
            written_bytes = 0
            for chunk in chunks(entry):
                _write_all(file.fileno(), chunk)
                written_bytes += len(chunk)
            assert written_bytes == entry.nbytes, (entry, written_bytes)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    unfinished.rename(path)


def write_index(directory: Path, shards: Sequence[Sequence[Entry]]) -> None:
    """Write model.safetensors.index.json for shards named by shard_names."""
    weight_map = {
        entry.name: name
        for name, shard in zip(shard_names(len(shards)), shards, strict=True)
        for entry in shard
    }
    total_bytes = sum(entry.nbytes for shard in shards for entry in shard)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def check_free_disk(directory: Path, needed_bytes: int) -> None:
    """Raises QuantizeError when `needed_bytes` and a margin do not fit on the disk of `directory`."""
    stat = os.statvfs(directory)
    free_bytes = stat.f_bavail * stat.f_frsize
    if needed_bytes + 64 * 2**20 > free_bytes:
        raise QuantizeError(
            f"{directory}: needs {needed_bytes / 2**30:.2f} GiB, {free_bytes / 2**30:.2f} GiB are free; "
            "make room there, or choose a directory on another disk"
        )


def _item_bytes(entry: Entry) -> int:
    count = 1
    for size in entry.shape:
        count *= size
    return entry.nbytes // max(1, count)


def _write_all(descriptor: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[os.write(descriptor, view) :]
