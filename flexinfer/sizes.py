"""Memory sizes as people write and read them, and how a budget is named."""

# Between processes of the same program, which are not always of the same size (docs/log.md).
SLACK_BYTES = 6 << 20
# More than any machine has.
MOST_BYTES = 1 << 60
# Units, in upper case.
UNITS_BYTES = {"": 1, "B": 1}

for _power, _letter in enumerate("KMGT", 1):
    # A letter alone is binary, as docker and systemd have it: a budget is often that of a
    # container.
    UNITS_BYTES |= dict.fromkeys((f"{_letter}iB", f"{_letter}i", _letter), 1 << 10 * _power)
    UNITS_BYTES[f"{_letter}B"] = 1000**_power


class BudgetError(ValueError):
    """A memory budget that cannot work. Names the smallest one that does."""


def parse_size(value: str | int, what: str = "memory") -> int:
    """Bytes in `value`: a whole number of bytes, or a number with a unit, in any case.

    "4GiB", "4Gi" and "4G" are 4 x 1024^3 bytes, "4GB" is 4 x 1000^3. Raises BudgetError on anything
    else. `what` names the argument in the message.
    """
    text = str(value).strip()
    unit = text.lstrip("0123456789.").strip()
    units = {known.lower(): size for known, size in UNITS_BYTES.items()}
    try:
        number = float(text[: len(text) - len(unit)]) * units[unit.lower()]
    except (ValueError, KeyError):
        number = -1.0
    if isinstance(value, int) and not isinstance(value, bool):
        number = min(value, MOST_BYTES)
    elif number < 0 or isinstance(value, bool) or (not unit and number % 1):
        number = MOST_BYTES
    if number >= MOST_BYTES:
        raise BudgetError(
            f"{what}={value!r} is not a size; write whole bytes or a number with a unit, such as "
            "'4GiB' (or '4G', the same), '1.5GB' (decimal), '700MiB'"
        )
    if number < 1:
        raise BudgetError(f"{what}={value!r} must be at least 1 byte")
    return int(number)


def format_size(nbytes: float) -> str:
    """`nbytes` for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def named_budget_bytes(smallest_bytes: int) -> int:
    """The budget that a message names where `smallest_bytes` would do: whole MiB, and so much more
    that the next process, which is not always of the same size before it loads a model, accepts it
    too. What is accepted is decided by `smallest_bytes` alone.
    """
    return -(-(smallest_bytes + SLACK_BYTES) >> 20) << 20


def name_budget(smallest_bytes: int) -> str:
    """That budget as every message names it: in bytes, and as it can be given."""
    named_bytes = named_budget_bytes(smallest_bytes)
    return f"{named_bytes} bytes ({whole_mib(named_bytes)})"


def whole_mib(nbytes: int) -> str:
    """A budget to be given:

    `format_size` rounds to the hundredth of a GiB, which may be too little.
    """
    return f"{-(-nbytes >> 20)} MiB"
