"""Parameters of commands.

A field of a dataclass that a command takes becomes an option of its line, so it is declared once.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

# A command with its arguments; returns the exit code.
Run = Callable[[], int]

ENGINE, DECODING, INSIDE = "Memory and reading", "Decoding", "Seeing inside"


def complete_model(incomplete: str) -> list[str]:
    """Models of the Hub cache whose name begins so. Paths are the shell's to complete."""
    from huggingface_hub.constants import HF_HUB_CACHE

    names = (folder.name.split("--", 2)[1:] for folder in Path(HF_HUB_CACHE).glob("models--*--*"))
    return sorted(name for name in map("/".join, names) if name.startswith(incomplete))


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="checkpoint directory, GGUF file, or Hugging Face Hub id",
        autocompletion=complete_model,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="say where the budget goes, and what made the run slow",
        rich_help_panel=INSIDE,
    ),
]


def parsed(command: Callable[..., int], left_out: Iterable[str] = ()) -> Callable[..., Run]:
    """What typer is given for `command`: it takes what the line says, and returns the command with
    its arguments.

    Parameters that are dataclasses are taken apart into their fields, but for those `left_out`, and
    put together again.
    """
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    whole: dict[str, Any] = {
        one.name: one.annotation for one in parameters if is_dataclass(one.annotation)
    }
    parts: dict[str, list[Field[Any]]] = {
        name: [
            f for f in fields(kind) if f.metadata.get("on_line", True) and f.name not in left_out
        ]
        for name, kind in whole.items()
    }

    def parse(**given: Any) -> Run:
        for name, kind in whole.items():
            values = {field.name: _of_line(field, given.pop(field.name)) for field in parts[name]}
            given[name] = kind(**values)
        return lambda: command(**given)

    taken = [one for one in parameters if one.name not in whole]
    for fields_of_one in parts.values():
        taken += [_parameter(field) for field in fields_of_one]
    parse.__name__, parse.__doc__ = command.__name__, inspect.getdoc(command)
    parse.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in taken]
    )
    return parse


def _parameter(field: "Field[Any]") -> inspect.Parameter:
    """The option of a field."""
    meta = field.metadata
    kind: Any = meta.get("type") or next(
        (one for one in get_args(field.type) if one is not type(None)), field.type
    )
    default = False if kind is bool else field.default if isinstance(field.default, kind) else None
    choices = tuple(meta.get("choices", ()))
    info = typer.Option(
        meta.get("flag", "--" + field.name.replace("_", "-")),
        help=meta.get("meaning_on_line", meta["meaning"]),
        metavar=meta.get("metavar"),
        rich_help_panel=meta.get("panel", ENGINE),
        autocompletion=(lambda incomplete: [c for c in choices if c.startswith(incomplete)])
        if choices
        else None,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind if default is not None else kind | None, info],
    )


def _of_line(field: "Field[Any]", given: Any) -> Any:
    """The value of a field; a flag stands for the opposite of a default that is a truth value."""
    if given is None:
        return field.default
    return given != field.default if field.default is True else given
