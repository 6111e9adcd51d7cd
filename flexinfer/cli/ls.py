"""flexinfer ls: the models on this disk, the smallest budget of each, and how fast it would be here.

Headers are read and no weights. The speed is that of the plan, from costs that are measured apart: reading a scratch file on the disk that
the model lies on, and the kernels on zeros. They are kept in ~/.cache/flexinfer/speeds.json for the next time, with the name of the
processor; `--measure` takes them anew.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexinfer.cache_dir import in_cache, user_path
from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import held_back
from flexinfer.cli.parameters import Json
from flexinfer.cli.plan import Prospect
from flexinfer.cli.terminal import console, table
from flexinfer.options import Options
from flexinfer.plan.budget import Costs
from flexinfer.sizes import format_size, whole_mib

if TYPE_CHECKING:
    import torch

    from flexinfer.kernels import Kernel
    from flexinfer.model.engine import MemoryOfProcess

SCRATCH_BYTES = 128 << 20  # written and read once for each disk
SPLIT = "-00001-of-"  # in the name of the first part of a GGUF file in parts; of the others only `-of-`

Folders = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[DIR]...", help="look there (the Hub cache if left out)", show_default=False),
]
Measure = Annotated[bool, typer.Option("--measure", help="measure disk and kernels again")]
Memory = Annotated[str, typer.Option(help="the budget to tell the speed for; auto: what is to spare")]


@dataclass(frozen=True, slots=True)
class Found:
    """A model on this disk. What could not be found out is None, and `problem` says why."""

    name: str  # what the other commands take
    path: str
    weights_bytes: int | None = None  # all of its files of weights
    encoding: str = ""  # how most of its weights are stored
    smallest_bytes: int | None = None
    budget_bytes: int | None = None  # that the speed is told for
    tokens_per_s: float | None = None
    bound_tokens_per_s: float | None = None
    problem: str = ""


def ls(
    folders: Folders = None, memory: Memory = "auto", measure: Measure = False, as_json: Json = False
) -> int:
    """Models here: smallest budget, expected speed.

    Reads headers and no weights.
    """
    options = Options(memory=memory)
    folders = [user_path(folder) for folder in folders or []]
    for folder in folders:
        if not folder.is_dir():
            problem = "not a directory" if folder.exists() else "no such directory"
            raise ValueError(f"{folder}: {problem}; name one that holds models, or none for the Hub cache")
    with Bars() as bars:
        bars.spin("looking for models")
        places = (
            [place for folder in folders for place in in_folder(folder)] if folders else list(in_hub_cache())
        )
        speeds = Speeds(measure)
        found: list[Found] = []
        for name, path in places:
            bars.spin(f"reading headers of {name}")
            found.append(look_at(name, path, options, speeds))
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
        return 0
    if not found:
        where = ", ".join(map(str, folders)) if folders else "the Hub cache"
        print(
            f"no models in {where}; `flexinfer chat owner/name` fetches one, `flexinfer ls DIR` looks elsewhere"
        )
        return 0
    made = table("model", "weights", "kind", "smallest budget", "tokens/s", "in a budget of")
    for one in found:
        if one.smallest_bytes is not None:
            weights, budget = _size(one.weights_bytes), _size(one.budget_bytes)
            smallest = whole_mib(one.smallest_bytes)
            speed = "" if one.tokens_per_s is None else f"{one.tokens_per_s:.3g}"
            made.add_row(one.name, weights, one.encoding, smallest, speed, budget)
    if made.row_count:
        console().print(made)
    for one in found:
        if one.problem:
            print(f"{one.name}: {one.problem}")
    return 0


def _size(nbytes: int | None) -> str:
    return "" if nbytes is None else format_size(nbytes)


def in_hub_cache() -> Iterator[tuple[str, Path]]:
    """Id and checkpoint of each model in the Hub cache; a GGUF file by its path, where a repository has several."""
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


def look_at(name: str, path: Path, options: Options, speeds: "Speeds") -> Found:
    """What headers tell of a model."""
    from flexinfer.formats.checkpoint import Checkpoint

    found: dict[str, Any] = {"name": name, "path": str(path)}
    try:
        checkpoint = Checkpoint.open(path)
        sizes: dict[str, int] = {}
        for spec in checkpoint.tensors.values():
            sizes[spec.dtype] = sizes.get(spec.dtype, 0) + spec.nbytes
        found |= {"weights_bytes": sum(sizes.values()), "encoding": max(sizes, key=lambda kind: sizes[kind])}
        prospect = Prospect.of(checkpoint, options, speeds.process)
        speeds.process = prospect.process
        found["smallest_bytes"] = prospect.least_bytes()
        if prospect.budget_bytes < prospect.smallest_bytes:
            return Found(
                **found,
                problem=f"memory={format_size(prospect.budget_bytes)} is less than the smallest budget",
            )
        plan = prospect.plan(prospect.budget_bytes, speeds.costs(prospect))
    except (ValueError, OSError, ImportError) as error:
        return Found(**found, problem=str(error).partition("; ")[0])
    return Found(
        **found,
        budget_bytes=plan.budget_bytes,
        tokens_per_s=plan.predicted_tokens_per_s,
        bound_tokens_per_s=plan.bound_tokens_per_s,
    )


class Speeds:
    """What this machine was measured to do, each thing when it is first asked for, and kept."""

    def __init__(self, anew: bool = False) -> None:
        with held_back():
            from flexinfer.cli.doctor_facts import cpu_name

        self.process: MemoryOfProcess | None = (
            None  # before its first model; later ones leave something behind
        )
        self._file = in_cache("speeds.json")
        self._kept: dict[str, Any] = {"cpu": cpu_name(), "disks": {}, "kernels": {}}
        with contextlib.suppress(OSError, ValueError, KeyError):  # not there, or not ours: measured anew
            kept = json.loads(self._file.read_text())
            if not anew and kept["cpu"] == self._kept["cpu"]:
                self._kept = {name: kept[name] for name in self._kept}

    def costs(self, prospect: Prospect) -> Costs:
        """Those of a model's passes. Raises OSError where its disk cannot be written to and has not been measured yet."""
        skeleton = prospect.skeleton
        seconds = sum(
            weight.nbytes / self._kernel(kernel, skeleton.dtype) for weight, kernel in skeleton.used
        )
        return Costs(self._disk(skeleton.checkpoint.files[0].resolve().parent), seconds)

    def _disk(self, folder: Path) -> float:
        from flexinfer.cli.doctor_facts import disk_speed

        return self._once("disks", str(folder.stat().st_dev), lambda: disk_speed(folder, SCRATCH_BYTES))

    def _kernel(self, kernel: "Kernel", dtype: "torch.dtype") -> float:
        from flexinfer.cli.doctor_facts import kernel_times
        from flexinfer.kernels.ggml import GgmlKernel

        name = kernel.type.name if isinstance(kernel, GgmlKernel) else str(dtype).removeprefix("torch.")

        def measure() -> float:
            nbytes, by_rows = kernel_times(name)
            return nbytes / by_rows[1]

        return self._once("kernels", name, measure)

    def _once(self, group: str, name: str, measure: Any) -> float:
        kept: dict[str, float] = self._kept[group]
        if name not in kept:
            kept[name] = measure()
            with contextlib.suppress(OSError):  # of somebody else: measured anew the next time
                self._file.write_text(json.dumps(self._kept))
        return kept[name]
