"""Changes of an input for fuzzing: a JSON document with a wild number, a key of another file, a
value moved.

Each follows from a seed, and leaves most of the input right, so that readers are taken beyond their
first check. GGUF files have tests.stress.gguf_changes.
"""

import copy
import json
import random
import re
import struct
from collections.abc import Iterator
from typing import Any

Keys = dict[str, list[Any]]  # key of a format -> values worth trying

WILD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        255,
        2**31,
        2**32,
        2**63,
        -(2**63),
        2**64,
        10**9,
        10**12,
        10**400,
    ),
    *(0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "0",
        "1e9",
        "../x",
        "/etc/passwd",
        "owner/name",
        "a\0b",
        "\x1b[2J",
        "\ud800",
        "é" * 300,
        ".",
    ),
    *([], {}, [[]], [0] * 300, [None], {"": ""}, {"a": {"a": {"a": []}}}),
]
MAX_INPUT_BYTES = 16_384
LONG_NUMBER = "9" * 5000  # more digits than Python turns into an int


def framed(document: bytes, data: bytes) -> bytes:
    """A document as a safetensors header: its length before it, data behind it."""
    return struct.pack("<Q", len(document)) + document + data


def change_framed(data: bytes, seed: int, keys: Keys) -> bytes | None:
    """`data` with one to four changes to its header; None where that is no JSON."""
    length = int.from_bytes(data[:8], "little")
    document = _changed(data[8 : 8 + length], random.Random(seed), keys)
    return None if document is None else framed(document, data[8 + length :])


def change_lines(data: bytes, seed: int, keys: Keys) -> bytes | None:
    """`data`, a JSON document a line, with one to four changes to one of them.

    None where that is no JSON.
    """
    chance = random.Random(seed)
    lines = data.split(b"\n")
    i = chance.choice([i for i, line in enumerate(lines) if line] or [0])
    document = _changed(lines[i], chance, keys)
    return None if document is None else b"\n".join([*lines[:i], document, *lines[i + 1 :]])


def _changed(document: bytes, chance: random.Random, keys: Keys) -> bytes | None:
    try:
        value = [json.loads(document)]
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            _change_once(value, chance, keys)
        document = json.dumps(value[0]).encode()
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        return None
    if chance.random() < 0.02 and (numbers := list(re.finditer(rb"\d+", document))):
        start, stop = chance.choice(numbers).span()
        document = document[:start] + LONG_NUMBER.encode() + document[stop:]
    if chance.random() < 0.01:
        document = b"[" * 3000 + document
    return document


def _places(value: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in `value` and below it."""
    stack: list[Any] = [value]
    while stack:
        holder = stack.pop()
        for key, inner in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            yield holder, key
            if isinstance(inner, dict | list):
                stack.append(inner)


def _change_once(value: list[Any], chance: random.Random, keys: Keys) -> None:
    places = list(_places(value))
    holder, key = chance.choice(places)
    others = [holder[key] for holder, key in places]
    kind = chance.randrange(7)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[chance.choice([*keys, *(str(key) for _, key in places)])] = holder.pop(key)
    elif kind == 2:
        holder[key] = copy.deepcopy(chance.choice(others))
    elif kind in (3, 4) and keys:
        objects = [one for one in (value[0], *others) if isinstance(one, dict)]
        if objects:
            name = chance.choice(list(keys))
            where = objects[0] if chance.random() < 0.7 else chance.choice(objects)
            where[name] = copy.deepcopy(
                chance.choice(keys[name] if chance.random() < 0.7 else WILD)
            )
    elif isinstance(holder[key], int | float) and chance.random() < 0.5:
        number = holder[key]
        steps: list[Any] = [
            number + 1,
            number - 1,
            -number,
            float(number) if abs(number) < 1e300 else 0,
        ]
        holder[key] = chance.choice([*steps, number * 2, number * 1000, str(number)])
    else:
        holder[key] = copy.deepcopy(chance.choice(WILD))
