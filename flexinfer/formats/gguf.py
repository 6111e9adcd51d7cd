"""Read-only index of GGUF files: what the header says of the model, and which tensor lies where.

A GGUF file is metadata (typed values by name, the vocabulary among them), then a table of tensors, then their bytes, each at a multiple
of the alignment. The header is read forward, a chunk at a time; every count and size in it is held against the size of the file before
anything is made of it, and long arrays are walked over, not built, unless they are asked for. Numbers are little-endian. A model may be
split over files -00001-of-000NN, of which the first has the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows nothing of transformers (flexinfer.formats.gguf_model does).
"""

import importlib.util
import math
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from flexinfer.formats.tensors import ENCODINGS, CheckpointError, Encoding, TensorSpec
from flexinfer.messages import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
CHUNK_BYTES = 1 << 18
MAX_ENTRIES = 1 << 16  # values, and tensors
MAX_STRINGS = 1 << 22  # of an array: of a vocabulary and its merges there are some hundred thousand
MAX_KEPT_BYTES = 32 << 20  # strings and numbers, vocabulary and merges among them where they are asked for
MAX_KEPT_NUMBERS = 4096  # of an array: one for each layer, or each frequency
SMALLEST_VALUE_BYTES = 8 + 4 + 1  # a name's length, a type and a value
SMALLEST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # a name's length, dimensions, type and offset
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

PACKAGES = ("gguf", "transcribe_cpp_native")  # of the extra `ggml`
INSTALL = "pip install 'flexinfer[ggml]'"

BLOCKS = {  # of ggml's types of weights: elements and bytes of a block
    2: Encoding("Q4_0", 32, 18),
    3: Encoding("Q4_1", 32, 20),
    6: Encoding("Q5_0", 32, 22),
    7: Encoding("Q5_1", 32, 24),
    8: Encoding("Q8_0", 32, 34),
    10: Encoding("Q2_K", 256, 84),
    11: Encoding("Q3_K", 256, 110),
    12: Encoding("Q4_K", 256, 144),
    13: Encoding("Q5_K", 256, 176),
    14: Encoding("Q6_K", 256, 210),
    16: Encoding("IQ2_XXS", 256, 66),
    17: Encoding("IQ2_XS", 256, 74),
    18: Encoding("IQ3_XXS", 256, 98),
    19: Encoding("IQ1_S", 256, 50),
    20: Encoding("IQ4_NL", 32, 18),
    21: Encoding("IQ3_S", 256, 110),
    22: Encoding("IQ2_S", 256, 82),
    23: Encoding("IQ4_XS", 256, 136),
    29: Encoding("IQ1_M", 256, 56),
    34: Encoding("TQ1_0", 256, 54),
    35: Encoding("TQ2_0", 256, 66),
    39: Encoding("MXFP4", 32, 17),
    40: Encoding("NVFP4", 64, 36),
}
TYPES = BLOCKS | {0: ENCODINGS["F32"], 1: ENCODINGS["F16"], 30: ENCODINGS["BF16"], 28: ENCODINGS["F64"]}
TYPES |= {24: ENCODINGS["I8"], 25: ENCODINGS["I16"], 26: ENCODINGS["I32"], 27: ENCODINGS["I64"]}


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array of the metadata that was walked over."""

    count: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """A model's metadata and tensors, from all its files."""

    files: tuple[Path, ...]
    metadata: dict[str, Any]  # numbers, strings and short arrays of numbers; LongArray for the others
    tensors: dict[str, TensorSpec]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """The value of `key` for this architecture; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")


def check_installed() -> None:
    """Raises CheckpointError, with the command that installs them, where packages are missing that GGUF files need."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"GGUF files need {' and '.join(missing)}: {INSTALL}")


def read_gguf(file: Path, arrays: Collection[str] = ()) -> GGUF:
    """The model in `file`, or in the files of which it is one. `arrays`: names of long arrays that are wanted whole.

    Raises CheckpointError when a header does not hold or a part is missing.
    """
    files = _parts(file)
    metadata, specs = _read_header(files[0], arrays)
    for number, part in enumerate(files):
        if number:
            facts, more = _read_header(part, ())
            specs = specs + more
        else:
            facts = metadata
        no, count = _count(part, facts, "split.no", 0), _count(part, facts, "split.count", 1)
        if no != number or count not in {len(files), 0}:
            _refuse(
                part,
                f"says it is part {no + 1} of {count} and is named as part {number + 1} of {len(files)}; "
                "give the files the names they were published with",
            )
    tensors = {spec.name: spec for spec in specs}
    if len(tensors) < len(specs):
        _refuse(file, "has two tensors of one name: damaged; download it again")
    expected = _count(file, metadata, "split.tensors.count", len(specs))
    if len(files) > 1 and expected != len(specs):
        _refuse(file, f"its parts have {len(specs)} tensors, not {expected}; download them again")
    if not isinstance(metadata.get("general.architecture"), str):
        _refuse(file, "has no general.architecture: not a model; convert it again with llama.cpp")
    return GGUF(files, metadata, tensors)


def _count(file: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    """A whole number of the metadata."""
    value = metadata.get(key, default)
    if type(value) is not int:
        _refuse(file, f"{key} is {shown(value)}, no whole number: damaged; download it again")
    return value


def _parts(file: Path) -> tuple[Path, ...]:
    """The files of the model that `file` is, or is a part of, in order. Raises CheckpointError when one is missing."""
    named = SPLIT_NAME.fullmatch(file.name)
    if named is None:
        return (file,)
    count = int(named[3])
    if not 1 <= int(named[2]) <= count:
        _refuse(file, f"is named as part {int(named[2])} of {count}; give it the name it was published with")
    parts = tuple(file.with_name(f"{named[1]}-{i:05d}-of-{named[3]}.gguf") for i in range(1, count + 1))
    if missing := [part.name for part in parts if not part.is_file()]:
        _refuse(
            file,
            f"{len(missing)} of its {count} parts are not beside it, such as {missing[0]}; download them",
        )
    return parts


def _refuse(file: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{file}: {what}")


def _read_header(file: Path, arrays: Collection[str]) -> tuple[dict[str, Any], list[TensorSpec]]:
    with file.open("rb", buffering=0) as stream:
        source = _Source(file, stream, file.stat().st_size)
        start = source.take(8, "the first bytes") if source.size_bytes >= 24 else b""
        if start[:4] != MAGIC:
            _refuse(file, f"no GGUF file ({source.size_bytes} bytes); download it again")
        (version,) = struct.unpack("<I", start[4:])
        if version not in VERSIONS:
            if version and not version & 0xFFFF:
                _refuse(file, "big-endian; take the little-endian file of this model, or convert it again")
            _refuse(
                file,
                f"GGUF version {version}, supported are {VERSIONS[0]} and {VERSIONS[1]}; take a newer file of this model, or convert it again",
            )
        tensor_count = source.number("Q", "the number of tensors")
        value_count = source.number("Q", "the number of values")
        entries = f"{value_count} values and {tensor_count} tensors"
        source.expect(value_count * SMALLEST_VALUE_BYTES + tensor_count * SMALLEST_TENSOR_BYTES, entries)
        if max(value_count, tensor_count) > MAX_ENTRIES:
            _refuse(file, f"{entries}, at most {MAX_ENTRIES} are read: damaged; download it again")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = source.string("the name of a value")
            if key in metadata:
                _refuse(file, f"{shown(key)} is there twice: damaged; download it again")
            metadata[key] = _value(source, shown(key), key in arrays)
        alignment = _count(file, metadata, "general.alignment", DEFAULT_ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            _refuse(file, f"general.alignment is {alignment}, no power of two: damaged; download it again")
        found = [_tensor(source, alignment) for _ in range(tensor_count)]
        data_start = -(-source.position // alignment) * alignment
    return metadata, _placed(file, found, data_start, source.size_bytes)


def _value(source: "_Source", key: str, whole: bool) -> Any:
    """One value of the metadata. An array of strings, or a long one, is built only if `whole`. `key`: as a message shows it."""
    kind = source.number("I", key)
    if kind == STRING:
        return source.string(key)
    if kind in SCALARS:
        return source.number(SCALARS[kind], key)
    if kind != ARRAY:
        _refuse(source.file, f"{key} is of type {kind}, which there is not: damaged; download it again")
    kind, count = source.number("I", key), source.number("Q", key)
    if kind in SCALARS:
        nbytes = count * struct.calcsize(SCALARS[kind])
        source.expect(nbytes, f"the array {key}")
        if whole or count <= MAX_KEPT_NUMBERS:
            source.keep(8 * count, key)
            return list(struct.unpack(f"<{count}{SCALARS[kind]}", source.take(nbytes, key)))
        source.skip(nbytes, key)
    elif kind == STRING:
        source.expect(count * 8, f"the array {key}")
        if count > MAX_STRINGS:
            _refuse(
                source.file,
                f"the array {key} has {count} strings, at most {MAX_STRINGS} are read: damaged; download it again",
            )
        if whole:
            return [source.string(key) for _ in range(count)]
        source.skip_strings(count, key)
    else:
        _refuse(source.file, f"{key} is an array of type {kind}, which cannot be read; download it again")
    return LongArray(count)


def _tensor(source: "_Source", alignment: int) -> tuple[str, tuple[int, ...], Encoding, int]:
    """Name, shape, encoding and offset of one tensor, each plausible by itself."""
    name = source.string("the name of a tensor")
    named = shown(name)
    dimensions = source.number("I", named)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        _refuse(
            source.file,
            f"tensor {named} has {dimensions} dimensions, not 1 to 4: damaged; download it again",
        )
    shape = tuple(source.number("Q", named) for _ in range(dimensions))[::-1]
    kind, offset_bytes = source.number("I", named), source.number("Q", named)
    if kind not in TYPES:
        known = ", ".join(encoding.name for encoding in TYPES.values())
        _refuse(
            source.file,
            f"tensor {named} is of ggml's type {kind}, supported are {known}; take another file of this model",
        )
    if 0 in shape or shape[-1] % TYPES[kind].block_elements:
        _refuse(
            source.file,
            f"tensor {named} of shape {list(shape)} is no whole number of {TYPES[kind].name} blocks: damaged; download it again",
        )
    if offset_bytes % alignment:
        _refuse(
            source.file,
            f"tensor {named} begins at byte {offset_bytes} of the data, no multiple of {alignment}: damaged; download it again",
        )
    return name, shape, TYPES[kind], offset_bytes


def _placed(
    file: Path,
    found: list[tuple[str, tuple[int, ...], Encoding, int]],
    data_start: int,
    size_bytes: int,
) -> list[TensorSpec]:
    """The tensors in order of offset, none beyond the end of the file or over another."""
    specs = [
        TensorSpec(name, file, data_start + offset, encoding.nbytes(math.prod(shape)), encoding, shape)
        for name, shape, encoding, offset in found
    ]
    specs.sort(key=lambda spec: spec.offset_bytes)
    end_bytes = data_start
    for spec in specs:
        if spec.offset_bytes < end_bytes:
            _refuse(file, f"tensor {shown(spec.name)} overlaps the one before it: damaged; download it again")
        end_bytes = spec.offset_bytes + spec.nbytes
        if end_bytes > size_bytes:
            _refuse(
                file,
                f"truncated: tensor {shown(spec.name)} ends at byte {end_bytes}, the file at {size_bytes}; download it again",
            )
    return specs


class _Source:
    """Reads a file forward, a chunk at a time, and never past its end."""

    def __init__(self, file: Path, stream: BinaryIO, size_bytes: int) -> None:
        self.file, self.size_bytes = file, size_bytes
        self._stream = stream
        self._chunk, self._at = b"", 0
        self._chunk_start = 0  # where it lies in the file
        self._kept_bytes = 0

    @property
    def position(self) -> int:
        return self._chunk_start + self._at

    def expect(self, nbytes: int, what: str) -> None:
        """Raise CheckpointError when the file has no `nbytes` left for `what`."""
        if nbytes > self.size_bytes - self.position:
            _refuse(
                self.file,
                f"truncated or damaged: {what} would take {nbytes} bytes at {self.position}, the file has {self.size_bytes}; download it again",
            )

    def keep(self, nbytes: int, what: str) -> None:
        """Count what stays in memory. Raises CheckpointError when that is more than a header has."""
        self._kept_bytes += nbytes
        if self._kept_bytes > MAX_KEPT_BYTES:
            _refuse(
                self.file,
                f"its header has more than {MAX_KEPT_BYTES} bytes of strings and numbers, up to {what}: damaged; download it again",
            )

    def take(self, nbytes: int, what: str) -> bytes:
        if self._at + nbytes > len(self._chunk):
            self.expect(nbytes, what)
            self._go_to(self.position, max(nbytes, CHUNK_BYTES))
            if nbytes > len(self._chunk):
                _refuse(self.file, f"ends within {what}: truncated while it was read?")
        taken = self._chunk[self._at : self._at + nbytes]
        self._at += nbytes
        return taken

    def skip(self, nbytes: int, what: str) -> None:
        self.expect(nbytes, what)
        self._at += nbytes

    def number(self, kind: str, what: str) -> Any:
        """One number, in struct's letter for its type."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))[0]

    def string(self, what: str) -> str:
        nbytes = self.number("Q", f"the length of {what}")
        self.expect(nbytes, what)
        self.keep(8 + nbytes, what)
        return self.take(nbytes, what).decode("utf-8", errors="replace")

    def skip_strings(self, count: int, what: str) -> None:
        """Walk over `count` strings: of a vocabulary there are some hundred thousand."""
        length_at = struct.Struct("<Q").unpack_from
        while count:
            chunk, at, last = self._chunk, self._at, len(self._chunk) - 8
            while count and at <= last:
                at += 8 + length_at(chunk, at)[0]
                count -= 1
            self.skip(at - self._at, what)
            if count:
                self.expect(8 * count, what)
                self._go_to(self.position, CHUNK_BYTES)

    def _go_to(self, position: int, nbytes: int) -> None:
        """Have `nbytes` from `position` on at hand, or as many as there are."""
        self._stream.seek(position)
        parts = []
        while nbytes > 0 and (part := self._stream.read(nbytes)):
            parts.append(part)
            nbytes -= len(part)
        self._chunk, self._at, self._chunk_start = b"".join(parts), 0, position
