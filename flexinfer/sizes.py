"""Memory sizes as people write and read them, and how a budget is named."""

UNITS_BYTES = {"": 1, "B": 1}

UNITS_BYTES |= {f"{letter}iB": 1 << 10 * power for power, letter in enumerate("KMGT", 1)}

UNITS_BYTES |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)}


class BudgetError(ValueError):
    """A memory budget that cannot work. Names the smallest one that does."""


def parse_size(value: str | int, what: str = "memory") -> int:
    """Bytes in `value`: a number of bytes, or a number with a unit such as "4GiB", "1.5 GB", "700MiB".

    Raises BudgetError on anything else. `what` names the argument in the message.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        number, unit = float(value), ""
    else:
        text = str(value).strip()
        unit = text.lstrip("0123456789.").strip()
        try:
            number = float(text[: len(text) - len(unit)])
        except ValueError:
            number = -1.0
        units = {known.lower(): size for known, size in UNITS_BYTES.items()}
        if unit.lower() not in units or number < 0 or isinstance(value, bool):
            raise BudgetError(
                f"{what}={value!r} is not a size; write bytes or a number with a unit, such as '4GiB', '1.5GB', '700MiB'"
            )
        number *= units[unit.lower()]
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
