"""What others wrote, fit for an error message: on one line, escaped, cut."""

MAX_VALUE_CHARACTERS = 200
MAX_TEXT_CHARACTERS = 500


def shown(value: object) -> str:
    """`value`, quoted as in Python."""
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "..."


def one_line(text: str) -> str:
    """`text`, without quotes."""
    words = " ".join(text[: 4 * MAX_TEXT_CHARACTERS].split())
    line = "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in words
    )
    return line if len(line) <= MAX_TEXT_CHARACTERS else line[:MAX_TEXT_CHARACTERS] + "..."


def cause(error: Exception) -> str:
    """Type and message of `error`."""
    return f"{type(error).__name__}: {one_line(str(error))}"
