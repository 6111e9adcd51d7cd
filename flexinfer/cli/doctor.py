"""flexinfer doctor: what this machine will do."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import held_back
from flexinfer.cli.parameters import Json
from flexinfer.cli.terminal import console, table
from flexinfer.sizes import format_size, parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from flexinfer.cli.doctor_facts import Facts

Folder = Annotated[Path, typer.Argument(help="directory on the disk the models lie on")]
Size = Annotated[str, typer.Option(help="how much to write and read there")]


def doctor(path: Folder = Path(), size: Size = "512MiB", as_json: Json = False) -> int:
    """Measure disk, kernels and rights of this machine."""
    with Bars() as bars:
        bars.spin("measuring disk and kernels")
        with held_back():
            from flexinfer.cli.doctor_facts import advice, measure_machine

        facts = measure_machine(path, parse_size(size, "size"))
    if as_json:
        print(json.dumps(asdict(facts) | {"advice": advice(facts)}))
        return 0
    screen = console()
    screen.print(facts_table(facts))
    for line in advice(facts):
        screen.print(f"- {line}", markup=False)
    return 0


def facts_table(facts: "Facts") -> "Table":
    """The facts for people."""
    from flexinfer.cli.doctor_facts import LOCK_TEST_BYTES, shown_speed

    made = table("what", "measured", left=2)
    made.add_row(
        "processor",
        f"{facts.cpu}, {facts.cores} cores, {facts.vector_width}, load {facts.load:.1f}",
    )
    made.add_row("threads of torch", str(facts.torch_threads))
    made.add_row("memory to be had", format_size(facts.memory_bytes))
    limit = "unlimited" if facts.lock_limit_bytes is None else format_size(facts.lock_limit_bytes)
    worked = "works" if facts.lock_works else "refused"
    made.add_row("locking memory", f"limit {limit}; {format_size(LOCK_TEST_BYTES)}: {worked}")
    made.add_row(
        "disk", f"{facts.path} ({facts.file_system}), {format_size(facts.free_disk_bytes)} free"
    )
    made.add_row("writing", shown_speed(facts.write_bytes_per_s))
    made.add_row(
        "direct reads", _by_threads(facts.direct_bytes_per_s) or f"no: {facts.direct_note}"
    )
    made.add_row("buffered reads", _by_threads(facts.buffered_bytes_per_s))
    for name, by_rows in facts.kernel_s.items():
        many = max(by_rows)
        made.add_row(
            f"{name} kernel",
            f"{facts.kernel_bytes_per_s[name] / 1e9:.1f} GB/s of weights at 1 row; "
            f"{by_rows[1] * 1e3:.2f} ms at 1 row, {by_rows[many] * 1e3:.1f} ms at {many}",
        )
    made.add_row("ggml", facts.ggml)
    made.add_row("control groups", "can be made" if facts.cgroups_writable else "cannot be made")
    return made


def _by_threads(speeds: dict[int, float]) -> str:
    from flexinfer.cli.doctor_facts import shown_speed

    return ", ".join(
        f"{shown_speed(speed)} with {threads}" for threads, speed in speeds.items()
    ) + (" threads" if speeds else "")
