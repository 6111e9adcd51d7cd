"""safetensors files: their headers, and the index of a checkpoint in shards. Checked before
anything is read.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON
header, data).
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

from flexinfer.formats.tensors import (
    ENCODINGS,
    MAX_HEADER_BYTES,
    CheckpointError,
    TensorSpec,
    read_json,
)
from flexinfer.messages import shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Most dimensions of a tensor: torch takes no more.
MAX_DIMENSIONS = 64


def tensors_by_name(file: Path) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in read_header(file)}


def read_index(index: Path) -> dict[str, TensorSpec]:
    """The tensors of all shards that `index` names. As with transformers, also those that it does
    not list, and of two with one name that of the last shard.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            f"{index}: no 'weight_map' from tensor to file; download the file again"
        )
    shards: dict[str, dict[str, TensorSpec]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise CheckpointError(
                f"{index}: points outside the checkpoint: {shown(shard)}; do not load this "
                "checkpoint"
            )
        if not is_file(index.parent / shard):
            raise CheckpointError(
                f"{index}: the shard {shown(shard)} that it names is missing; download it again"
            )
        shards[shard] = tensors_by_name(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: tensor {shown(name)} is not in it, though {index.name} "
                "says so; download both again"
            )
    return {name: spec for shard in shards.values() for name, spec in shard.items()}


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # A name that no file can have.
        return False


def read_header(file: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file, in order of offset.

    Raises CheckpointError when the header does not hold.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{file}: {size_bytes} bytes are no safetensors file (truncated?); download it "
                "again"
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise CheckpointError(
                f"{file}: header claims {header_bytes} bytes in a file of {size_bytes}: truncated, "
                "or not safetensors; download it again"
            )
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw.decode("utf-8"))
        assert isinstance(header, dict)
    except (ValueError, AssertionError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: header is not a JSON object: damaged, or not safetensors; download it again"
        ) from error

    header.pop("__metadata__", None)
    data_bytes = size_bytes - 8 - header_bytes
    specs = sorted(
        (_tensor_spec(file, name, entry, 8 + header_bytes) for name, entry in header.items()),
        key=lambda spec: (spec.offset_bytes, spec.nbytes),
    )
    end_bytes = 8 + header_bytes
    for spec in specs:
        if spec.offset_bytes < end_bytes and spec.nbytes:
            raise CheckpointError(
                f"{file}: tensor {shown(spec.name)} overlaps the one before it: damaged header; "
                "download it again"
            )
        end_bytes = max(end_bytes, spec.offset_bytes + spec.nbytes)
        if end_bytes > size_bytes:
            raise CheckpointError(
                f"{file}: truncated: tensor {shown(spec.name)} ends at byte "
                f"{end_bytes - 8 - header_bytes} of the data, which has {data_bytes}; download it "
                "again"
            )
    return specs


def _tensor_spec(file: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = (*shape, start, stop)
        valid = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**63 for n in sizes)
        valid = valid and start <= stop and len(shape) <= MAX_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} has no proper dtype, shape and data_offsets; download "
            "it again"
        )
    if dtype not in ENCODINGS:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} has dtype {shown(dtype)}, supported are "
            f"{', '.join(ENCODINGS)}; convert the checkpoint"
        )
    expected = ENCODINGS[dtype].nbytes(math.prod(shape))
    if stop - start != expected:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} of shape {shown(list(shape))} and {dtype} needs "
            f"{shown(expected)} bytes, the header gives it {stop - start}; download it again"
        )
    return TensorSpec(name, file, data_start + start, expected, ENCODINGS[dtype], shape)
