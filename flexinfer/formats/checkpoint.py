"""Read-only index of a checkpoint: which tensor lies where.

A checkpoint is a directory with `config.json` and either `model.safetensors` or, where there is none, shards named by
`model.safetensors.index.json`, or the file that config.json names as `transformers_weights`; or a GGUF file (flexinfer.formats.gguf). Opening one reads the headers alone (a few KB a file) and
checks every offset against the file, so that a damaged checkpoint is refused before memory is planned. The bytes themselves are read
later, by `flexinfer.streaming.prefetch`, straight from the offsets found here: nothing is converted and no second copy is made.

Format: https://github.com/huggingface/safetensors#format (8 bytes little-endian header length, JSON header, data).
"""

import importlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:  # not for the process that makes a tokenizer
    import torch

from flexinfer.cache_dir import user_path
from flexinfer.messages import shown

CONFIG_FILE = "config.json"
GGUF_MAGIC = b"GGUF"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format; of any JSON that is read here
MAX_DIMENSIONS = 64  # of a tensor: as many as torch can take


@dataclass(frozen=True, slots=True)
class Encoding:
    """How numbers are stored: so many in so many bytes."""

    name: str
    block_elements: int
    block_bytes: int
    torch_name: str | None = None  # torch's name of the dtype; None where it has none, as for blocks of ggml

    @property
    def is_float(self) -> bool:
        """Whether torch computes with the numbers as they are stored."""
        return self.name in FLOAT_NAMES

    def nbytes(self, elements: int) -> int:
        """Bytes that `elements`, a multiple of the block, take."""
        return elements // self.block_elements * self.block_bytes


FLOAT_NAMES = frozenset({"BF16", "F16", "F32"})
ENCODINGS = {
    name: Encoding(name, 1, nbytes, torch_name)
    for name, nbytes, torch_name in (
        ("F64", 8, "float64"),
        ("F32", 4, "float32"),
        ("F16", 2, "float16"),
        ("BF16", 2, "bfloat16"),
        ("I64", 8, "int64"),
        ("I32", 4, "int32"),
        ("I16", 2, "int16"),
        ("I8", 1, "int8"),
        ("U8", 1, "uint8"),
        ("BOOL", 1, "bool"),
    )
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of a kind that cannot be run. Names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies, and how it differs from the model's parameter. `offset_bytes` counts from the start of `file`."""

    name: str  # in the file
    file: Path
    offset_bytes: int
    nbytes: int
    encoding: Encoding
    shape: tuple[int, ...]  # of its elements; its last dimension is made of whole blocks
    added: float = 0.0  # to each element, to get the parameter
    row_order: tuple[int, ...] | None = None  # row i of the parameter is row row_order[i] in the file
    transposed: bool = False  # the rows of the file are the columns of the parameter
    alternate: "TensorSpec | None" = None  # a tensor whose columns alternate with those of this one

    @property
    def dtype(self) -> str:
        """The name of the encoding, such as "BF16"."""
        return self.encoding.name

    @property
    def torch_dtype(self) -> "torch.dtype":
        assert self.encoding.torch_name is not None
        dtype: torch.dtype = getattr(importlib.import_module("torch"), self.encoding.torch_name)
        return dtype

    @property
    def row_bytes(self) -> int:
        return self.encoding.nbytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint, by name."""

    path: Path  # of the directory, or of the (first) GGUF file
    tensors: dict[str, TensorSpec]
    config_dir: Path  # where config.json and the tokenizer lie
    architecture: str | None = None  # llama.cpp's name of it, where the tensors' names are llama.cpp's

    @property
    def in_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path != self.config_dir

    @classmethod
    def open(cls, given: str | Path) -> "Checkpoint":
        """Index the checkpoint in directory `path` or that a file there belongs to, or the only GGUF file in the directory.

        Raises CheckpointError when it is not a checkpoint, a shard is missing or truncated, a header lies about sizes
        or overlaps, the index points outside the directory, or a tensor has a type that is not supported.
        """
        path = local_checkpoint(given)
        if path is None:
            raise CheckpointError(f"{given}: no such directory or file")
        from flexinfer.formats.gguf_model import gguf_in, open_gguf  # they need the classes above

        if (path / ADAPTER_FILE).is_file():
            raise CheckpointError(_adapter_refusal(path))
        gguf_file = gguf_in(path)
        if gguf_file is not None:
            return open_gguf(gguf_file)
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: not a checkpoint: config.json is missing; save it with model.save_pretrained()"
            )
        file = _weights_file(path)
        if file.is_file():
            read = _read_index if file.suffix == ".json" else _by_name
            return cls(path, read(file), path)
        other = sorted(
            p.name for p in path.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
        )
        found = f" (found {', '.join(other[:4])})" if other else ""
        raise CheckpointError(
            f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}; load the model with transformers and save it with "
            "model.save_pretrained(), which writes safetensors"
        )

    @property
    def config_file(self) -> Path:
        """The file that says what the model is: config.json, or the GGUF file that it was made of."""
        return self.path if self.architecture else self.config_dir / "config.json"

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, each once."""
        return sorted({spec.file for spec in self.tensors.values()})


def is_gguf(file: Path) -> bool:
    """Whether `file` is to be read as GGUF: by its first bytes, since Ollama's have no suffix, or by its suffix."""
    if not file.is_file():
        return False
    if file.suffix.lower() == ".gguf":
        return True
    with file.open("rb") as stream:
        return stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def local_checkpoint(given: str | Path) -> Path | None:
    """The directory or GGUF file on this disk that `given` means; None where there is nothing of that name.

    ~ is the home directory, and file:// may stand before a path. A file of a checkpoint stands for its directory.
    Raises CheckpointError for a file that belongs to no checkpoint, saying what it is.
    """
    text = os.fspath(given)
    if not text:
        raise CheckpointError(
            "the path of the checkpoint is empty; name a directory, a GGUF file or a Hub id"
        )
    path = user_path(unquote(urlsplit(text).path) if text.startswith("file://") else text)
    if path.is_dir() or is_gguf(path):
        return path
    if path.is_file():
        for file in (path, path.resolve()):
            if file.name in _own_files(file.parent):
                return file.parent
        raise CheckpointError(f"{path}: {_what_it_is(path)}")
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: a link to {os.readlink(path)}, which is not there; download the file again"
        )
    if path.exists():
        raise CheckpointError(
            f"{path}: neither a file nor a directory; name a checkpoint directory or a GGUF file"
        )
    return None


def _own_files(folder: Path) -> set[str]:
    """Names of the files that the checkpoint in `folder` is made of; none where there is no checkpoint."""
    if not (folder / CONFIG_FILE).is_file():
        return set()
    file = _weights_file(folder)
    if file.suffix != ".json" or not file.is_file():
        return {CONFIG_FILE, file.name}
    shards = read_json(file).get("weight_map")
    return {CONFIG_FILE, file.name, *(map(str, shards.values()) if isinstance(shards, dict) else ())}


def _weights_file(folder: Path) -> Path:
    """The file of weights, or their index, that transformers would read in `folder`; it may be missing."""
    file = folder / (_named_file(folder / CONFIG_FILE) or SINGLE_FILE)
    return folder / INDEX_FILE if not file.is_file() and file.name == SINGLE_FILE else file


def _what_it_is(file: Path) -> str:
    """Why `file` is no checkpoint, and what to do."""
    beside = (file.parent / CONFIG_FILE).is_file()
    if file.suffix.lower() in {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            "weights in PyTorch's format, which can hold code; load the model with transformers and save it with "
            "model.save_pretrained(), which writes safetensors"
        )
    if file.suffix.lower() != ".safetensors":
        return "not a checkpoint: neither a GGUF file nor safetensors; name a checkpoint directory or a GGUF file"
    if not beside:
        return (
            f"not a checkpoint by itself: there is no {CONFIG_FILE} beside it; download the whole directory"
        )
    return (
        f"not part of the checkpoint in {file.parent}, which is in {SINGLE_FILE} or the files that {INDEX_FILE} names; "
        "name the directory, or give the file that name"
    )


def _adapter_refusal(path: Path) -> str:
    """What to do about an adapter, which transformers would apply to the weights in `path`, or to others."""
    try:
        base = shown(read_json(path / ADAPTER_FILE).get("base_model_name_or_path"))
    except CheckpointError:
        base = "a model that it does not name"
    return (
        f"{path / ADAPTER_FILE}: an adapter (PEFT) of {base}, which is not applied here; merge it once: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload().save_pretrained(DST), and load "
        "DST; or, to run the weights beside it without it, move the file away (of a GGUF file: give its name)"
    )


def _named_file(config: Path) -> str | None:
    """The weights that config.json names, which transformers loads in place of the usual ones."""
    name = read_json(config).get("transformers_weights")
    if name is None:
        return None
    known = isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not known or Path(name).name != name or not _is_file(config.parent / name):
        raise CheckpointError(
            f"{config}: transformers_weights is {shown(name)}, no file of safetensors or index of some in this directory; "
            "correct the entry or remove it"
        )
    return str(name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; raises CheckpointError when it is not one, or too large to be one."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: {size_bytes} bytes of JSON, at most {MAX_HEADER_BYTES} are read; download the file again"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number or a nesting without end
        raise CheckpointError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}; download the file again"
        )
    return value


def _by_name(file: Path) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in read_header(file)}


def _read_index(index: Path) -> dict[str, TensorSpec]:
    """The tensors of all shards that `index` names. As with transformers, also those that it does not list, and of two with one name
    that of the last shard."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: no 'weight_map' from tensor to file; download the file again")
    shards: dict[str, dict[str, TensorSpec]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or shard in {"", ".", ".."}:
            raise CheckpointError(
                f"{index}: points outside the checkpoint: {shown(shard)}; do not load this checkpoint"
            )
        if not _is_file(index.parent / shard):
            raise CheckpointError(
                f"{index}: the shard {shown(shard)} that it names is missing; download it again"
            )
        shards[shard] = _by_name(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{index.parent / shard}: tensor {shown(name)} is not in it, though {index.name} says so; download both again"
            )
    return {name: spec for shard in shards.values() for name, spec in shard.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def read_header(file: Path) -> list[TensorSpec]:
    """The tensors of one safetensors file, in order of offset. Raises CheckpointError when the header does not hold."""
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise CheckpointError(
                f"{file}: {size_bytes} bytes are no safetensors file (truncated?); download it again"
            )
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
            raise CheckpointError(
                f"{file}: header claims {header_bytes} bytes in a file of {size_bytes}: truncated, or not safetensors; download it again"
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
                f"{file}: tensor {shown(spec.name)} overlaps the one before it: damaged header; download it again"
            )
        end_bytes = max(end_bytes, spec.offset_bytes + spec.nbytes)
        if end_bytes > size_bytes:
            raise CheckpointError(
                f"{file}: truncated: tensor {shown(spec.name)} ends at byte {end_bytes - 8 - header_bytes} of the data, "
                f"which has {data_bytes}; download it again"
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
            f"{file}: tensor {shown(name)} has no proper dtype, shape and data_offsets; download it again"
        )
    if dtype not in ENCODINGS:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} has dtype {shown(dtype)}, supported are {', '.join(ENCODINGS)}; "
            "convert the checkpoint"
        )
    expected = ENCODINGS[dtype].nbytes(math.prod(shape))
    if stop - start != expected:
        raise CheckpointError(
            f"{file}: tensor {shown(name)} of shape {shown(list(shape))} and {dtype} needs {shown(expected)} bytes, the "
            f"header gives it {stop - start}; download it again"
        )
    return TensorSpec(name, file, data_start + start, expected, ENCODINGS[dtype], shape)
