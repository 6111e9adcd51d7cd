"""Changes of a GGUF file for fuzzing: in what it says (an entry dropped or doubled, a value of
another type, another architecture, a dimension, a tensor's place) and in how it is written (a
count, a length, a type or an offset that does not hold).

The first kind is written as a right file again, data laid out anew, so that it passes the checks of
the header and reaches what is made of it; the second is a number overwritten afterwards. The parser
here is its own, not the reader that is tested.
"""

import copy
import io
import random
import struct
from dataclasses import dataclass
from typing import Any

from tests.stress.json_changes import MAX_INPUT_BYTES, WILD, Keys

START = b"GGUF"
ALIGNMENT, MAX_ALIGNMENT = 32, 4096
ARCHITECTURE = "{arch}"  # stands for that of the file in a key
U32, F32, BOOL, STRING, ARRAY, U64, I64 = 4, 6, 7, 8, 9, 10, 11
LETTERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    U32: "I",
    5: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    12: "d",
}
WILD_NUMBERS = [one for one in WILD if isinstance(one, int)] + [
    4,
    9,
    31,
    2**16,
    2**40,
    2**62,
    2**64 - 1,
]
WILD_FLOATS = [one for one in WILD if isinstance(one, float)] + [1.0, 3e38, 1e-45]
TENSOR_NAMES = [
    f"{name}.weight" for name in ("output", "rope_freqs", "rope_factors_long", "blk.0.ffn_up_exps")
]
WILD_STRINGS = [one for one in WILD if isinstance(one, str)]


@dataclass(slots=True)
class Value:
    """An entry of the metadata."""

    key: str
    kind: int
    value: Any  # of an array: its items
    item_kind: int = 0  # of an array


@dataclass(slots=True)
class Tensor:
    """An entry of the table of tensors."""

    name: str
    shape: list[int]  # as in the file: the innermost dimension first
    kind: int
    offset: int


@dataclass(slots=True)
class File:
    """What a GGUF file says."""

    version: int
    values: list[Value]
    tensors: list[Tensor]
    data: bytes

    def find(self, key: str) -> Value | None:
        return next((one for one in self.values if one.key == key), None)


def change_gguf(data: bytes, seed: int, keys: Keys) -> bytes | None:
    """`data` with one to four changes; None where it cannot be parsed."""
    chance = random.Random(seed)
    try:
        file = parse(data)
    except (ValueError, struct.error, RecursionError):
        return None
    lies = chance.random() < 0.25
    for _ in range(chance.choice((0, 1) if lies else (1, 1, 1, 2, 4))):
        _change_once(file, chance, keys)
    written, numbers = write(file)
    if lies:
        position, letter = chance.choice(numbers)
        size = struct.calcsize(letter)
        now = int.from_bytes(written[position : position + size], "little")
        written[position : position + size] = _packed(letter, _another_number(now, chance))
    return bytes(written)


# ---- the format


def parse(data: bytes) -> File:
    """Raises ValueError or struct.error for what is no GGUF file, RecursionError for one nested too
    deep.
    """
    stream = io.BytesIO(data)

    def number(letter: str) -> Any:
        return struct.unpack(f"<{letter}", stream.read(struct.calcsize(letter)))[0]

    def count() -> int:
        found: int = number("Q")
        if found > len(data):
            raise ValueError(f"{found} of {len(data)} bytes")
        return found

    def string() -> str:
        return stream.read(count()).decode("utf-8", errors="surrogateescape")

    def value(kind: int) -> Any:
        if kind == STRING:
            return string()
        if kind not in LETTERS:
            raise ValueError(f"type {kind}")
        return number(LETTERS[kind])

    def entry() -> Value:
        key, kind = string(), number("I")
        if kind != ARRAY:
            return Value(key, kind, value(kind))
        item_kind = number("I")
        return Value(key, kind, [value(item_kind) for _ in range(count())], item_kind)

    def tensor() -> Tensor:
        name, dimensions = string(), number("I")
        if dimensions > 8:
            raise ValueError(f"{dimensions} dimensions")
        return Tensor(name, [number("Q") for _ in range(dimensions)], number("I"), number("Q"))

    if stream.read(4) != START:
        raise ValueError("no GGUF file")
    version, tensors, values = number("I"), count(), count()
    file = File(version, [entry() for _ in range(values)], [tensor() for _ in range(tensors)], b"")
    file.data = data[stream.tell() + -stream.tell() % _alignment(file) :]
    return file


def write(file: File) -> tuple[bytearray, list[tuple[int, str]]]:
    """The bytes of `file`.

    And position and struct's letter of each count, length, type, dimension and offset in it.
    """
    out, numbers = bytearray(START), []

    def number(letter: str, value: Any) -> None:
        numbers.append((len(out), letter))
        out.extend(_packed(letter, value))

    def value(kind: int, value: Any) -> None:
        if kind == STRING:
            text = _encoded(value if isinstance(value, str) else str(value))
            number("Q", len(text))
            out.extend(text)
        else:
            out.extend(_packed(LETTERS.get(kind, "I"), value))

    number("I", file.version)
    number("Q", len(file.tensors))
    number("Q", len(file.values))
    for entry in file.values:
        value(STRING, entry.key)
        number("I", entry.kind)
        if entry.kind == ARRAY:
            items = entry.value if isinstance(entry.value, list) else [entry.value]
            number("I", entry.item_kind)
            number("Q", len(items))
            for item in items:
                value(entry.item_kind, item)
        else:
            value(entry.kind, entry.value)
    for tensor in file.tensors:
        value(STRING, tensor.name)
        number("I", len(tensor.shape))
        for size in tensor.shape:
            number("Q", size)
        number("I", tensor.kind)
        number("Q", tensor.offset)
    out.extend(bytes(-len(out) % _alignment(file)))
    return out + file.data, numbers


def _alignment(file: File) -> int:
    """What the file says, within reason."""
    found = file.find("general.alignment")
    alignment = found.value if found is not None and isinstance(found.value, int) else ALIGNMENT
    return alignment if 0 < alignment <= MAX_ALIGNMENT else ALIGNMENT


def _packed(letter: str, value: Any) -> bytes:
    """Any value, as the number that it is nearest to in bytes."""
    if letter in "fd":
        try:
            return struct.pack(f"<{letter}", value)
        except (struct.error, OverflowError):
            value = 0
    size = struct.calcsize(letter)
    whole = value if isinstance(value, int) else 0
    return (whole & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _encoded(text: str) -> bytes:
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="surrogatepass")


# ---- one change


def _change_once(file: File, chance: random.Random, keys: Keys) -> None:
    change = chance.choice(
        (
            *(_set_value, _set_value, _change_value, _change_value, _change_value),
            *(_change_type, _rename_value, _drop_or_double, _drop_or_double, _change_architecture),
            *(_change_tensor, _change_tensor, _change_tensor, _change_data),
        )
    )
    change(file, chance, keys)


def _set_value(file: File, chance: random.Random, keys: Keys) -> None:
    """A value worth trying, or a wild one, for a key of the format."""
    name = chance.choice(list(keys))
    value = copy.deepcopy(chance.choice(keys[name] if chance.random() < 0.7 else WILD))
    entry = _entry(name.replace(ARCHITECTURE, _architecture(file)), value)
    file.values = [one for one in file.values if one.key != entry.key]
    file.values.insert(chance.randint(0, len(file.values)), entry)


def _entry(key: str, value: Any) -> Value:
    """`value` in the type that fits."""
    if isinstance(value, list):
        items = [_entry("", item) for item in value]
        return Value(key, ARRAY, value, items[0].kind if items else U32)
    if isinstance(value, bool):
        return Value(key, BOOL, value)
    if isinstance(value, int):
        return Value(key, U32 if 0 <= value < 2**32 else I64 if value < 0 else U64, value)
    return Value(key, F32, value) if isinstance(value, float) else Value(key, STRING, str(value))


def _change_value(file: File, chance: random.Random, keys: Keys) -> None:
    """Another value of the same type."""
    if not file.values:
        return
    entry = chance.choice(file.values)
    if entry.kind != ARRAY:
        entry.value = _another(entry.kind, entry.value, chance, [one.value for one in file.values])
    elif entry.value and chance.random() < 0.7:
        i = chance.randrange(len(entry.value))
        entry.value[i] = _another(entry.item_kind, entry.value[i], chance, entry.value)
    else:
        entry.value = chance.choice(([], entry.value[:1], entry.value * 2, entry.value[:1] * 300))


def _another(kind: int, value: Any, chance: random.Random, others: list[Any]) -> Any:
    if kind == STRING:
        strings = [one for one in others if isinstance(one, str)]
        return chance.choice([*WILD_STRINGS, *strings, str(value) * 2, str(value)[:-1], "x" * 5000])
    if LETTERS.get(kind) in ("f", "d"):
        return chance.choice(
            [*WILD_FLOATS, *(one for one in others if isinstance(one, float)), value * 2]
        )
    return _another_number(value, chance)


def _another_number(value: Any, chance: random.Random) -> int:
    value = value if isinstance(value, int) else 0
    near = [value + 1, value - 1, value * 2, value // 2, -value, value * 1000]
    return int(chance.choice(near if chance.random() < 0.6 else WILD_NUMBERS))


def _change_type(file: File, chance: random.Random, keys: Keys) -> None:
    """Another type for a value, which is written as it may be."""
    if file.values:
        entry = chance.choice(file.values)
        kind = chance.choice([*LETTERS, STRING, ARRAY, ARRAY, 13, 2**31])
        if kind == ARRAY:
            entry.item_kind = (
                chance.choice([*LETTERS, STRING, ARRAY]) if entry.kind == ARRAY else entry.kind
            )
            entry.value = [entry.value] * 2 if entry.kind != ARRAY else entry.value
        elif entry.kind == ARRAY:
            entry.value = entry.value[0] if entry.value else 0
        entry.kind = kind


def _rename_value(file: File, chance: random.Random, keys: Keys) -> None:
    if file.values:
        known = [key.replace(ARCHITECTURE, _architecture(file)) for key in keys]
        here = [one.key for one in file.values]
        chance.choice(file.values).key = chance.choice([*known, *here, *WILD_STRINGS, "k" * 5000])


def _drop_or_double(file: File, chance: random.Random, keys: Keys) -> None:
    entries: list[Any] = chance.choice((file.values, file.tensors))
    if not entries:
        return
    i = chance.randrange(len(entries))
    if chance.random() < 0.6:
        del entries[i]
    else:
        entries.insert(chance.randint(0, len(entries)), copy.deepcopy(entries[i]))
        if chance.random() < 0.5:
            return
    _lay_out(file)


def _change_architecture(file: File, chance: random.Random, keys: Keys) -> None:
    """Another architecture, in all keys that name it."""
    before, after = _architecture(file), chance.choice(keys["general.architecture"])
    for entry in file.values:
        if entry.key == "general.architecture":
            entry.value = after
        elif entry.key.startswith(f"{before}."):
            entry.key = after + entry.key[len(before) :]


def _change_tensor(file: File, chance: random.Random, keys: Keys) -> None:
    """Name, dimensions, type or place of a tensor."""
    if not file.tensors:
        return
    tensor, other = chance.choice(file.tensors), chance.choice(file.tensors)
    what = chance.choice(("name", "size", "size", "dimensions", "kind", "offset"))
    if what == "name":
        layer = f"blk.{chance.choice((1, 2, 10**9))}."
        moved = tensor.name.replace("blk.0.", layer)
        names = [
            other.name,
            moved,
            *TENSOR_NAMES,
            tensor.name.replace(".weight", ".bias"),
            *WILD_STRINGS,
        ]
        tensor.name = chance.choice([*names, "t" * 5000])
    elif what == "size" and tensor.shape:
        i = chance.randrange(len(tensor.shape))
        tensor.shape[i] = _another_number(tensor.shape[i], chance)
    elif what == "dimensions":
        shapes = [
            tensor.shape[1:],
            tensor.shape[::-1],
            [*tensor.shape, 1],
            [1, *tensor.shape],
            other.shape,
        ]
        tensor.shape = list(chance.choice(shapes))
    elif what == "kind":
        tensor.kind = chance.choice([*_block_sizes(), 31, 40, 99, 2**31])
    else:
        near = [
            tensor.offset + ALIGNMENT,
            tensor.offset - ALIGNMENT,
            other.offset,
            tensor.offset + 1,
        ]
        tensor.offset = chance.choice([*near, *WILD_NUMBERS])
        return
    if chance.random() < 0.8:
        _lay_out(file)


def _change_data(file: File, chance: random.Random, keys: Keys) -> None:
    """A number of a tensor of float32, or the end of the data."""
    numbers = [
        one for one in file.tensors if one.kind == 0 and 0 <= one.offset < len(file.data) - 4
    ]
    if numbers and chance.random() < 0.8:
        tensor = chance.choice(numbers)
        at = tensor.offset + 4 * chance.randrange(8)
        file.data = file.data[:at] + _packed("f", chance.choice(WILD_FLOATS)) + file.data[at + 4 :]
    else:
        file.data = file.data[: chance.randint(0, len(file.data))]


def _architecture(file: File) -> str:
    found = file.find("general.architecture")
    return str(found.value) if found is not None else ""


def _lay_out(file: File) -> None:
    """Give each tensor a place of its own, and its bytes with it.

    Not where that would take more than an input may have.
    """
    sizes, data, offsets = _block_sizes(), bytearray(), []
    for tensor in file.tensors:
        elements, (block_elements, block_bytes) = 1, sizes.get(tensor.kind, (1, 4))
        for size in tensor.shape:
            elements *= size
        nbytes = elements // block_elements * block_bytes
        if not 0 <= nbytes <= MAX_INPUT_BYTES - len(data):
            return
        offsets.append(len(data))
        start = max(tensor.offset, 0)
        data += file.data[start : start + nbytes].ljust(nbytes, b"\0")
        data += bytes(-len(data) % _alignment(file))
    file.data = bytes(data)
    for tensor, offset in zip(file.tensors, offsets, strict=True):
        tensor.offset = offset


def _block_sizes() -> dict[int, tuple[int, int]]:
    """Elements and bytes of a block, by ggml's number of the type."""
    from gguf import GGML_QUANT_SIZES

    return {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
