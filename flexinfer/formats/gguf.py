"""Read-only index of GGUF files: what the header says of the model, and where each tensor lies.

A GGUF file is metadata (typed values by name, the vocabulary among them), then a table of tensors,
then their bytes, each at a multiple of the alignment. The header is read forward; every count and
size in it is compared with the size of the file before anything is made of it, and long arrays are
skipped, not built, unless they are asked for (the `gguf` package's reader maps the file, trusts it
and makes an object of every token). Numbers are little-endian. A model may be split over files
-00001-of-000NN, of which the first has the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Not here: what the metadata means
for transformers (flexinfer.formats.gguf_config).
"""

import importlib.util
import math
import os
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from flexinfer.formats.ggml_types import INSTALL
from flexinfer.formats.ggml_types import TYPES as BLOCKS
from flexinfer.formats.tensors import ENCODINGS, CheckpointError, Encoding, TensorSpec
from flexinfer.messages import shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
CHUNK_BYTES = 1 << 18
# Most values, and most tensors.
MAX_ENTRIES = 1 << 16
# Most strings of an array; a vocabulary and its merges have some hundred thousand.
MAX_STRINGS = 1 << 22
# Strings and numbers, with vocabulary and merges where they are asked for.
MAX_KEPT_BYTES = 32 << 20
# Longest array of numbers that is kept: one for each layer, or each frequency.
MAX_KEPT_NUMBERS = 4096
# A name's length, a type and a value.
SMALLEST_VALUE_BYTES = 8 + 4 + 1
# A name's length, dimensions, type and offset.
SMALLEST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
# Architectures that turn images and sound into tokens.
PROJECTORS = {"clip"}
AGAIN = "damaged; download it again"
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}

# Packages of the extra `ggml`.
PACKAGES = ("gguf", "transcribe_cpp_native")

# Numbers and names of the types that are not in ggml's blocks.
PLAIN_TYPES = {0: "F32", 1: "F16", 30: "BF16", 28: "F64", 24: "I8", 25: "I16", 26: "I32", 27: "I64"}
# ggml's number of a type -> how its numbers are stored.
ENCODING_OF = {
    one.id: Encoding(one.name, one.block_elements, one.block_bytes) for one in BLOCKS.values()
} | {number: ENCODINGS[name] for number, name in PLAIN_TYPES.items()}


@dataclass(frozen=True, slots=True)
class LongArray:
    """An array of the metadata that was skipped."""

    count: int


@dataclass(frozen=True, slots=True)
class GGUF:
    """A model's metadata and tensors, from all its files."""

    files: tuple[Path, ...]
    # Numbers, strings and short arrays of numbers; LongArray for the others.
    metadata: dict[str, Any]
    tensors: dict[str, TensorSpec]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """The value of `key` for this architecture; None where there is none."""
        return self.metadata.get(f"{self.architecture}.{key}")

    def refuse(self, what: str) -> NoReturn:
        """Raises CheckpointError with the file and `what` is wrong with it."""
        _refuse(self.files[0], what)


def check_installed() -> None:
    """Raises CheckpointError, with the command that installs them, where packages for GGUF files
    are missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f"GGUF files need {' and '.join(missing)}: {INSTALL}")


def read_gguf(file: Path, arrays: Collection[str] = ()) -> GGUF:
    """The model in `file`, or in the files of which it is one. `arrays`: names of long arrays to be
    read whole.

    Raises CheckpointError when a header is damaged or a part is missing.
    """
    files = _parts(file)
    metadata, specs = _read_header(files[0], arrays)
    for number, part in enumerate(files):
        facts = metadata
        if number:
            facts, more = _read_header(part, ())
            specs = specs + more
        no, count = _count(part, facts, "split.no", 0), _count(part, facts, "split.count", 1)
        if no != number or count not in {len(files), 0}:
            _refuse(
                part,
                f"says it is part {no + 1} of {count} and is named as part {number + 1} of "
                f"{len(files)}; give the files the names they were published with",
            )
    tensors = {spec.name: spec for spec in specs}
    if len(tensors) < len(specs):
        _refuse(file, f"has two tensors of one name: {AGAIN}")
    expected = _count(file, metadata, "split.tensors.count", len(specs))
    if len(files) > 1 and expected != len(specs):
        _refuse(file, f"its parts have {len(specs)} tensors, not {expected}; download them again")
    if not isinstance(metadata.get("general.architecture"), str):
        _refuse(file, "has no general.architecture: not a model; convert it again with llama.cpp")
    return GGUF(files, metadata, tensors)


def is_gguf(file: Path) -> bool:
    """Whether `file` is to be read as GGUF: by its first bytes, since Ollama's have no suffix, or
    by its suffix.
    """
    if not file.is_file():
        return False
    if file.suffix.lower() == ".gguf":
        return True
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def is_model(file: Path) -> bool:
    """Whether a GGUF file is, by its header, a language model.

    A file that cannot be read counts as one, so that its error is shown.
    """
    try:
        metadata, _ = _read_header(file, ())
    except CheckpointError:
        return True
    architecture = metadata.get("general.architecture")
    kind = metadata.get("general.type", "model")
    return kind == "model" and architecture is not None and architecture not in PROJECTORS


def _count(file: Path, metadata: dict[str, Any], key: str, default: int) -> int:
    """A whole number of the metadata."""
    value = metadata.get(key, default)
    if type(value) is not int:
        _refuse(file, f"{key} is {shown(value)}, no whole number: {AGAIN}")
    return value


def part_name(name: str, number: int) -> str:
    """The name of part `number` of the model that the file called `name` is a part of; `name` where
    it is no part.
    """
    named = SPLIT_NAME.fullmatch(name)
    return f"{name[: named.start(2)]}{number:05d}{name[named.end(2) :]}" if named else name


def _parts(file: Path) -> tuple[Path, ...]:
    """The files of the model that `file` is a part of, in order. Raises CheckpointError when one is
    missing.
    """
    named = SPLIT_NAME.fullmatch(file.name)
    if named is None:
        return (file,)
    count = int(named[3])
    if not 1 <= int(named[2]) <= count:
        _refuse(
            file,
            f"is named as part {int(named[2])} of {count}; give it the name it was published with",
        )
    parts = tuple(file.with_name(part_name(file.name, i)) for i in range(1, count + 1))
    if missing := [part.name for part in parts if not part.is_file()]:
        lost = f"{len(missing)} of its {count} parts are not beside it, such as {missing[0]}"
        _refuse(file, f"{lost}; download them")
    return parts


def _refuse(file: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{file}: {what}")


def _read_header(file: Path, arrays: Collection[str]) -> tuple[dict[str, Any], list[TensorSpec]]:
    with file.open("rb", buffering=CHUNK_BYTES) as stream:
        assert isinstance(stream, BufferedReader)
        source = _Source(file, stream, file.stat().st_size)
        _check_start(source)
        tensor_count = source.number("Q", "the number of tensors")
        value_count = source.number("Q", "the number of values")
        entries = f"{value_count} values and {tensor_count} tensors"
        source.expect(
            value_count * SMALLEST_VALUE_BYTES + tensor_count * SMALLEST_TENSOR_BYTES, entries
        )
        if max(value_count, tensor_count) > MAX_ENTRIES:
            _refuse(file, f"{entries}, at most {MAX_ENTRIES} are read: {AGAIN}")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = source.string("the name of a value")
            if key in metadata:
                _refuse(file, f"{shown(key)} is there twice: {AGAIN}")
            metadata[key] = _value(source, shown(key), key in arrays)
        alignment = _count(file, metadata, "general.alignment", DEFAULT_ALIGNMENT)
        if alignment < 1 or alignment & (alignment - 1):
            _refuse(file, f"general.alignment is {alignment}, no power of two: {AGAIN}")
        specs = [_tensor(source, alignment) for _ in range(tensor_count)]
        data_start = -(-source.position // alignment) * alignment
    specs = [replace(spec, offset_bytes=data_start + spec.offset_bytes) for spec in specs]
    specs.sort(key=lambda spec: spec.offset_bytes)
    _check_places(file, specs, data_start, source.size_bytes)
    return metadata, specs


def _check_start(source: "_Source") -> None:
    file = source.file
    start = source.take(8, "the first bytes") if source.size_bytes >= 24 else b""
    if start[:4] != MAGIC:
        _refuse(file, f"no GGUF file ({source.size_bytes} bytes); download it again")
    (version,) = struct.unpack("<I", start[4:])
    if version and not version & 0xFFFF:
        _refuse(file, "big-endian; take the little-endian file of this model, or convert it again")
    if version not in VERSIONS:
        supported = f"supported are {VERSIONS[0]} and {VERSIONS[1]}"
        _refuse(
            file,
            f"GGUF version {version}, {supported}; take a newer file of this model, or convert it "
            "again",
        )


def _value(source: "_Source", key: str, whole: bool) -> Any:
    """One value of the metadata. `key`: as a message shows it. `whole`: build even long arrays."""
    kind = source.number("I", key)
    if kind == STRING:
        return source.string(key)
    if kind in SCALARS:
        return source.number(SCALARS[kind], key)
    if kind != ARRAY:
        _refuse(source.file, f"{key} is of type {kind}, which there is not: {AGAIN}")
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
            most = f"at most {MAX_STRINGS} are read"
            _refuse(source.file, f"the array {key} has {count} strings, {most}: {AGAIN}")
        if whole:
            return [source.string(key) for _ in range(count)]
        source.skip_strings(count, key)
    else:
        _refuse(
            source.file,
            f"{key} is an array of type {kind}, which cannot be read; download it again",
        )
    return LongArray(count)


def _tensor(source: "_Source", alignment: int) -> TensorSpec:
    """One tensor of the table, plausible by itself; its offset is from the start of the data."""
    name = source.string("the name of a tensor")
    named = f"tensor {shown(name)}"
    dimensions = source.number("I", named)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        _refuse(source.file, f"{named} has {dimensions} dimensions, not 1 to 4: {AGAIN}")
    shape = tuple(source.number("Q", named) for _ in range(dimensions))[::-1]
    kind, offset_bytes = source.number("I", named), source.number("Q", named)
    encoding = ENCODING_OF.get(kind)
    if encoding is None:
        known = ", ".join(one.name for one in ENCODING_OF.values())
        what = f"{named} is of ggml's type {kind}, supported are {known}"
        _refuse(source.file, f"{what}; take another file of this model")
    if 0 in shape or shape[-1] % encoding.block_elements:
        what = f"{named} of shape {list(shape)} is no whole number of {encoding.name} blocks"
        _refuse(source.file, f"{what}: {AGAIN}")
    if offset_bytes % alignment:
        what = f"{named} begins at byte {offset_bytes} of the data, no multiple of {alignment}"
        _refuse(source.file, f"{what}: {AGAIN}")
    nbytes = encoding.nbytes(math.prod(shape))
    return TensorSpec(name, source.file, offset_bytes, nbytes, encoding, shape)


def _check_places(file: Path, specs: list[TensorSpec], data_start: int, size_bytes: int) -> None:
    """Refuse a tensor beyond the end of the file or over another. `specs`: in order of offset."""
    end_bytes = data_start
    for spec in specs:
        if spec.offset_bytes < end_bytes:
            _refuse(file, f"tensor {shown(spec.name)} overlaps the one before it: {AGAIN}")
        end_bytes = spec.offset_bytes + spec.nbytes
        if end_bytes > size_bytes:
            what = f"tensor {shown(spec.name)} ends at byte {end_bytes}, the file at {size_bytes}"
            _refuse(file, f"truncated: {what}; download it again")


class _Source:
    """Reads a file forward, never past its end."""

    def __init__(self, file: Path, stream: BufferedReader, size_bytes: int) -> None:
        self.file, self.size_bytes, self.position = file, size_bytes, 0
        self._stream = stream
        self._kept_bytes = 0

    def expect(self, nbytes: int, what: str) -> None:
        """Raise CheckpointError when the file has no `nbytes` left for `what`."""
        if nbytes > self.size_bytes - self.position:
            left = f"{nbytes} bytes at {self.position}, the file has {self.size_bytes}"
            _refuse(self.file, f"truncated or damaged: {what} would take {left}; download it again")

    def keep(self, nbytes: int, what: str) -> None:
        """Count what stays in memory.

        Raises CheckpointError when that is more than a header has.
        """
        self._kept_bytes += nbytes
        if self._kept_bytes > MAX_KEPT_BYTES:
            much = f"more than {MAX_KEPT_BYTES} bytes of strings and numbers, up to {what}"
            _refuse(self.file, f"its header has {much}: {AGAIN}")

    def take(self, nbytes: int, what: str) -> bytes:
        self.expect(nbytes, what)
        taken = self._stream.read(nbytes)
        if len(taken) < nbytes:
            _refuse(self.file, f"ends within {what}: truncated while it was read?")
        self.position += nbytes
        return taken

    def skip(self, nbytes: int, what: str) -> None:
        self.expect(nbytes, what)
        self._stream.seek(nbytes, os.SEEK_CUR)
        self.position += nbytes

    def number(self, kind: str, what: str) -> Any:
        """One number, in struct's letter for its type."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))[0]

    def string(self, what: str) -> str:
        nbytes = self.number("Q", f"the length of {what}")
        self.expect(nbytes, what)
        self.keep(8 + nbytes, what)
        return self.take(nbytes, what).decode("utf-8", errors="replace")

    def skip_strings(self, count: int, what: str) -> None:
        """Skip `count` strings, a vocabulary's hundred thousands: those within what is buffered in
        one go.
        """
        length_at = struct.Struct("<Q").unpack_from
        while count:
            chunk, at = self._stream.peek(), 0
            last = len(chunk) - 8
            while count and at <= last:
                at += 8 + length_at(chunk, at)[0]
                count -= 1
            self.skip(at, what)
            # The next string's length may lie across two chunks.
            if count:
                self.skip(self.number("Q", what), what)
                count -= 1
