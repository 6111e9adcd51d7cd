"""Where tensors lie in files, and how their numbers are stored."""

import importlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"

# The limit of the safetensors format.
MAX_HEADER_BYTES = 100_000_000
MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Encoding:
    """How numbers are stored: `block_elements` of them in `block_bytes`."""

    name: str
    block_elements: int
    block_bytes: int
    # Torch's name of the dtype; None where it has none, as for blocks of ggml.
    torch_name: str | None = None

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
        ("F8_E4M3", 1, "float8_e4m3fn"),
        ("F8_E5M2", 1, "float8_e5m2"),
        ("F8_E8M0", 1, "float8_e8m0fnu"),
    )
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of a kind that cannot be run.

    Names the file and the remedy.
    """


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor that another needs to become floats: one of its numbers for so many rows and columns
    of the other.
    """

    spec: "TensorSpec"
    # None where one number is for all rows.
    rows: int | None
    columns: int


@dataclass(frozen=True, slots=True)
class Packed:
    """How floats are made of a tensor of somebody's quantisation."""

    # Its name in flexinfer.kernels.packed.
    scheme: str
    # Scales; then zeros, where there are some.
    beside: tuple[Beside, ...]
    # Whether floats are rounded to the dtype of the scales before anything else.
    in_scale_dtype: bool = False
    # Whether rows in the file are inputs, so that outputs cannot be read apart.
    by_inputs: bool = False


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor lies, and how it differs from the model's parameter.

    `offset_bytes` counts from the start of `file`.
    """

    # Name in the file.
    name: str
    file: Path
    offset_bytes: int
    nbytes: int
    encoding: Encoding
    # Shape in elements; the last dimension consists of whole blocks.
    shape: tuple[int, ...]
    # Added to each element to get the parameter.
    added: float = 0.0
    # Row i of the parameter is row row_order[i] in the file.
    row_order: tuple[int, ...] | None = None
    # Whether rows of the file are columns of the parameter.
    transposed: bool = False
    # A tensor whose columns alternate with those of this one.
    alternate: "TensorSpec | None" = None
    # Tensors that follow this one along the first dimension.
    followed_by: tuple["TensorSpec", ...] = ()
    # Of a quantised weight in safetensors.
    packed: Packed | None = None

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
    def parts(self) -> tuple["TensorSpec", ...]:
        """This tensor and those that follow it, each by itself."""
        if not self.followed_by:
            return (self,)
        rows = self.shape[0] - sum(one.shape[0] for one in self.followed_by)
        return replace(self, shape=(rows, *self.shape[1:]), followed_by=()), *self.followed_by

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.encoding.nbytes(self.shape[-1])


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint, by name."""

    # Of the directory, or of the (first) GGUF file.
    path: Path
    tensors: dict[str, TensorSpec]
    # Where config.json and the tokenizer lie.
    config_dir: Path
    # llama.cpp's name of it, where the tensors' names are llama.cpp's.
    architecture: str | None = None

    @property
    def in_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path != self.config_dir

    @property
    def config_file(self) -> Path:
        """The file that describes the model: config.json, or the GGUF file it was made of."""
        return self.path if self.architecture else self.config_dir / "config.json"

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, each once."""
        return sorted({spec.file for spec in self.tensors.values()})


def read_json(path: Path, most_bytes: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    """The JSON object in `path`; raises CheckpointError when it is none, or too large."""
    size_bytes = path.stat().st_size
    if size_bytes > most_bytes:
        raise CheckpointError(
            f"{path}: {size_bytes} bytes of JSON, at most {most_bytes} are read; download the file "
            "again"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # No UTF-8, no JSON, a number or a nesting without end.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not valid JSON ({error}); download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}; download the file again"
        )
    return value
