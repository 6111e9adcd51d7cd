"""flexinfer quantize: make a smaller copy of a checkpoint."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flexinfer.cache_dir import user_path
from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import Terminated, exit_code, held_back
from flexinfer.cli.parameters import Json, complete_model
from flexinfer.cli.terminal import note
from flexinfer.formats.ggml_types import KINDS
from flexinfer.sizes import format_size

CHOICES = [kind.lower() for kind in KINDS]
SOURCE = typer.Argument(
    metavar="SRC",
    help="checkpoint directory, or Hub id",
    autocompletion=complete_model,
    show_default=False,
)
TARGET = typer.Argument(
    metavar="DST", help="directory of the copy; must not exist", show_default=False
)
TYPE = typer.Option(
    "--type",
    help=f"ggml's type of blocks: {', '.join(CHOICES)}",
    autocompletion=lambda incomplete: [one for one in CHOICES if one.startswith(incomplete)],
)


def quantize(
    source: Annotated[str, SOURCE],
    destination: Annotated[Path, TARGET],
    kind: Annotated[str, TYPE] = "q4_k",
    as_json: Json = False,
) -> int:
    """Make a smaller copy of a checkpoint (GGUF).

    Goes tensor by tensor; a run that was stopped goes on where it was.
    """
    try:
        with Bars() as bars:
            bars.spin(f"reading {source}")
            from flexinfer.formats.gguf import check_installed

            check_installed()
            with held_back():
                from flexinfer.convert.quantize import MODEL_FILE
                from flexinfer.convert.quantize import quantize as make_copy
                from flexinfer.formats.hub import resolve

            checkpoint = resolve(source)
        report = make_copy(checkpoint, user_path(destination), kind, progress=not as_json)
    except (KeyboardInterrupt, Terminated) as stop:
        note("stopped; the same command goes on after the last finished tensor")
        return exit_code(stop)
    if as_json:
        print(json.dumps(asdict(report), default=str))
        return 0
    counts = Counter(tensor.kind for tensor in report.packed).most_common()
    print(
        f"{report.path}: {format_size(report.source_bytes)} -> {format_size(report.nbytes)} in "
        f"{report.seconds:.0f} s; {', '.join(f'{count} tensors {kind}' for kind, count in counts)}"
    )
    print(
        f"largest relative error of a weight: {report.worst.relative_error:.4f} "
        f"({report.worst.name})"
    )
    for name, reason in report.kept.items():
        print(f"left as it is: {name}: {reason}")
    reader = f"llama.cpp too ({report.architecture})" if report.architecture else "flexinfer"
    print(f"{report.path / MODEL_FILE}: for {reader}")
    for remark in report.notes:
        print(f"note: {remark}")
    return 0
