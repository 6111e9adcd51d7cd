"""flexinfer ls: the models on this disk, the smallest budget of each, and what a token would read.

Headers are read and no weights; `flexinfer plan` measures how fast that is.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexinfer.cache_dir import user_path
from flexinfer.cli.bars import Bars
from flexinfer.cli.parameters import Json
from flexinfer.cli.plan import useful_bytes
from flexinfer.cli.terminal import console, table
from flexinfer.options import Options
from flexinfer.sizes import format_size, named_budget_bytes, whole_mib

if TYPE_CHECKING:
    from flexinfer.engine.prepare import ProcessMemory

# In the name of the first part of a GGUF file in parts; of the others only "-of-".
SPLIT = "-00001-of-"

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[DIR]...", help="look there (the Hub cache if left out)", show_default=False
    ),
]
Memory = Annotated[str, typer.Option(help="the budget to plan for; auto: what is to spare")]


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this disk. What could not be found out is None, and `problem` says why."""

    # What the other commands take.
    name: str
    path: str
    # All of its files of weights.
    weights_bytes: int | None = None
    # How most of its weights are stored.
    encoding: str = ""
    smallest_bytes: int | None = None
    # What a token reads in a budget of so much.
    budget_bytes: int | None = None
    streamed_bytes: int | None = None
    problem: str = ""


def ls(folders: Folders = None, memory: Memory = "auto", as_json: Json = False) -> int:
    """Models here: their smallest budget, and what a token would read.

    Reads headers and no weights.
    """
    options = Options(memory=memory)
    folders = [user_path(folder) for folder in folders or []]
    for folder in folders:
        if not folder.is_dir():
            problem = "not a directory" if folder.exists() else "no such directory"
            raise ValueError(
                f"{folder}: {problem}; name one that holds models, or none for the Hub cache"
            )
    found: list[Found] = []
    with Bars() as bars:
        bars.spin("looking for models")
        places = (
            [place for folder in folders for place in in_folder(folder)]
            if folders
            else in_hub_cache()
        )
        # The process before its first model; later ones leave something behind.
        process: ProcessMemory | None = None
        for name, path in places:
            bars.spin(f"reading headers of {name}")
            one, process = look_at(name, path, options, process)
            found.append(one)
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        show(found, ", ".join(map(str, folders)) if folders else "the Hub cache")
    return 0


def show(found: list[Found], where: str) -> None:
    """`flexinfer ls` for people."""
    if not found:
        print(
            f"no models in {where}; `flexinfer chat owner/name` fetches one, `flexinfer ls DIR` "
            "looks elsewhere"
        )
    made = table("model", "weights", "kind", "smallest budget", "read per token", "in a budget of")
    for one in found:
        if one.smallest_bytes is not None:
            weights, read, budget = map(
                _size, (one.weights_bytes, one.streamed_bytes, one.budget_bytes)
            )
            made.add_row(
                one.name, weights, one.encoding, whole_mib(one.smallest_bytes), read, budget
            )
    if made.row_count:
        console().print(made)
    for one in found:
        if one.problem:
            print(f"{one.name}: {one.problem}")


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else format_size(nbytes)


def in_hub_cache() -> Iterator[tuple[str, Path]]:
    """Id and checkpoint of each model in the Hub cache; a GGUF file by its path, where a repository
    has several.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*")):
        name = "/".join(folder.name.split("--", 2)[1:])
        snapshots = sorted((folder / "snapshots").glob("*"), key=lambda one: one.stat().st_mtime)
        ref = folder / "refs" / "main"
        at = folder / "snapshots" / ref.read_text().strip() if ref.is_file() else None
        newest = at if at is not None and at.is_dir() else snapshots[-1] if snapshots else None
        if newest is not None:
            places = list(in_folder(newest))
            yield from ([(name, places[0][1])] if len(places) == 1 else places)


def in_folder(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path of each checkpoint in a directory and those below it, twice."""
    for where, below, files in os.walk(folder, followlinks=True):
        below.sort()
        here = Path(where)
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            yield str(here), here
        for name in sorted(files):
            if name.lower().endswith(".gguf") and ("-of-" not in name or SPLIT in name):
                yield str(here / name), here / name


def look_at(
    name: str, path: Path, options: Options, process: "ProcessMemory | None"
) -> "tuple[Found, ProcessMemory | None]":
    """What headers tell of a model, and what the process held before the first one."""
    from flexinfer.engine.prepare import SMALLEST_DEFAULT_CONTEXT, context_limit, prepare
    from flexinfer.formats.checkpoint import open_checkpoint

    found: dict[str, Any] = {"name": name, "path": str(path)}
    try:
        checkpoint = open_checkpoint(path)
        sizes: dict[str, int] = {}
        for spec in checkpoint.tensors.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        found |= {
            "weights_bytes": sum(sizes.values()),
            "encoding": max(sizes, key=lambda kind: sizes[kind]),
        }
        prepared = prepare(checkpoint, options, process=process)
        process = prepared.process
        least = min(SMALLEST_DEFAULT_CONTEXT, context_limit(prepared.skeleton.config))
        smallest = replace(
            prepared.planner(), overheads=prepared.overheads(context=least)
        ).smallest_bytes
        found["smallest_bytes"] = named_budget_bytes(smallest)
        plan = prepared.planner().plan(useful_bytes(prepared))
    except (ValueError, OSError, ImportError) as error:
        return Found(**found, problem=str(error).partition("; ")[0]), process
    return Found(
        **found, budget_bytes=plan.budget_bytes, streamed_bytes=plan.streamed_bytes
    ), process
