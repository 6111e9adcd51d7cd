"""Runs comparisons: cells in turns, one record each, what is finished skipped, what is left shown.

Mechanism: a comparison (`RunConfig`) is a list of cells in the order round, budget, system: the
systems take turns at every budget, so that a slow drift of the machine meets all of them. Several
comparisons on one model and device are merged in that order, so that a run that is stopped early
has whole rounds. All systems of a comparison read the same file of weights; where checkpoints are
deleted (the models that fill a disk), it goes when its cells are done. A cell is measured by
`run_cell` (experiments.cell), which is handed in; it runs in a process of its own and returns a
record. The record is appended before the next cell begins: Ctrl-C loses the cell in hand and no
more. A cell is finished when a record of the same key (experiments.config) and the same machine and
engine is anywhere below results/, whichever experiment asked for it: experiments share cells.
Cost model: time left is the mean seconds of the system's own finished cells, or of all where it has
none yet.
It measures nothing itself, and it does not retry: cells that failed with an error, or for want of a
package, are tried again by the next run; killed and timed-out ones are results.
"""

import gzip
import json
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from experiments.config import CellConfig, RunConfig, comparison_format, resolve_budget_bytes
from experiments.model_config import ModelConfig, require, weight_bytes
from experiments.record_files import append_record, drop_partial_line, load_records
from experiments.records import FINISHED, Provenance, Record, with_common_costs
from flexinfer.observe.notebook import last_pass
from flexinfer.sizes import format_size

RunCell = Callable[[CellConfig], Record]
BUSY = 0.1  # of all cores' time: above it what a cell measured is not only its own


@dataclass(slots=True)
class Summary:
    """What a run did."""

    planned: int = 0
    skipped: int = 0
    measured: int = 0
    interrupted: bool = False


def model_bytes(model: ModelConfig, format: str) -> int:
    """Bytes of the weights that fractions of a budget refer to: from the shape, or from the files
    of a model by path.
    """
    if model.shape is not None:
        return weight_bytes(model.shape, format)
    path = Path(str(model.path)).expanduser()
    files = [path] if path.is_file() else [*path.glob("*.safetensors"), *path.glob("*.gguf")]
    require(bool(files), "model.path", str(path), "no .safetensors or .gguf file there")
    return sum(file.stat().st_size for file in files)


def cells_of(config: RunConfig) -> list[CellConfig]:
    """The cells of a comparison in the order they run: round, then budget, then system.

    All on the same file of weights.

    Raises ConfigError where a system cannot run the model in the format of the comparison.
    """
    format = comparison_format(config.model, config.systems.values(), config.format)
    model = replace(config.model, formats=[format])
    reference_bytes = model_bytes(model, format)
    cells = []
    for round_ in range(config.rounds):
        for budget in config.budget.grid:
            for system in config.systems.values():
                cells.append(
                    CellConfig(
                        experiment=config.experiment,
                        model=model,
                        system=replace(system, format=format),
                        device=config.device,
                        budget_bytes=resolve_budget_bytes(budget, reference_bytes),
                        workload=config.workload,
                        round=round_,
                        cache_dir=config.cache_dir,
                        trace=config.trace,
                    )
                )
    return cells


def records_file(results_dir: Path, cell: CellConfig) -> Path:
    """Where the record of `cell` goes: a folder for each experiment, a file for each model and
    device.
    """
    return results_dir / cell.experiment / f"{cell.model.name}.{cell.device.name}.jsonl"


def finished_keys(results_dir: Path, here: Provenance) -> set[str]:
    """Keys of the cells that need not be measured again with the machine and the engine of `here`.

    A partial last line is cut off its file first.
    """
    if not results_dir.exists():
        return set()
    for file in results_dir.rglob("*.jsonl"):
        drop_partial_line(file)
    records = load_records(results_dir)
    return {
        one.cell_key
        for one in records
        if one.provenance.comparable(here) and one.status in FINISHED
    }


def save(results_dir: Path, record: Record) -> Path:
    """Appends `record` to its file.

    The events of a traced cell's last pass, which is what is drawn, to a compressed JSON file
    beside it.
    """
    file = records_file(results_dir, record.cell)
    if record.events:
        name = f"events/{record.run_id}.json.gz"
        target = file.parent / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        events = [
            # S from the first, to 1 us.
            one | {name: round(one[name], 6) for name in ("start_s", "stop_s")}
            for one in last_pass(record.events)
        ]
        partial.write_bytes(
            gzip.compress(json.dumps(events, separators=(",", ":")).encode(), mtime=0)
        )
        partial.rename(target)
        record = record.model_copy(update={"events": [], "events_file": name})
    # Means nothing elsewhere.
    record = record.model_copy(update={"cell": replace(record.cell, cache_dir="")})
    append_record(file, record)
    return file


def delete_checkpoints(
    cache_dir: Path, model_name: str | None = None, format: str | None = None
) -> int:
    """Deletes the synthetic checkpoints of a model (None: of all) below `cache_dir`.

    Returns the bytes freed.

    Args:
        cache_dir: the cache directory.
        model_name: such as llama2-7b.
        format: only those of this format, such as q4_0; needs `model_name`.
    """
    freed = 0
    wanted = (
        ""
        if model_name is None
        else f"{model_name}-"
        if format is None
        else f"{model_name}-{format}-"
    )
    for path in checkpoints(cache_dir):
        if path.name.startswith(wanted):
            freed += size_bytes(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return freed


def checkpoints(cache_dir: Path) -> list[Path]:
    """What has been made in the cache directory, each a directory or a file."""
    return sorted(
        path
        for path in (cache_dir.expanduser() / "synthetic").glob("*")
        if not path.name.endswith(".lock")
    )


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(one.stat().st_size for one in path.rglob("*") if one.is_file())
    )


Todo = list[tuple[RunConfig, CellConfig]]


def run(
    configs: Sequence[RunConfig], run_cell: RunCell, here: Provenance, console: Console
) -> Summary:
    """Measures the missing cells of every comparison, in order; the same cell is measured once.

    Args:
        configs: comparisons, each with its own results_dir, resume and so on.
        run_cell: measures one cell in a process of its own.
        here: this machine and engine: records of others do not count as finished.
        console: where progress and results are shown.
    """
    planned, todo = _unfinished(configs, here)
    summary = Summary(planned=planned, skipped=planned - len(todo))
    if summary.skipped:
        console.print(
            f"{summary.skipped} of {planned} cells are finished (resume=false measures them again)"
        )
    seconds: dict[str, list[float]] = defaultdict(list)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(todo), left="")
        try:
            for number, (config, cell) in enumerate(todo, 1):
                progress.update(task, description=f"cell {number} of {len(todo)}: {describe(cell)}")
                began = time.monotonic()
                record = run_cell(cell)
                seconds[cell.system.name].append(time.monotonic() - began)
                save(Path(config.results_dir), record)
                summary.measured += 1
                later = [one for _, one in todo[number:]]
                left = (
                    f"about {_left_s(seconds, [one.system.name for one in later]) / 60:.0f} min "
                    "left"
                )
                progress.update(task, advance=1, left=left)
                console.print(
                    f"[{number}/{len(todo)}, {left}] {describe(cell)}: {outcome(record)}",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
                if config.delete_checkpoints:
                    _delete_if_done(config, cell, later, console)
        except KeyboardInterrupt:
            summary.interrupted = True
    return summary


def _unfinished(configs: Sequence[RunConfig], here: Provenance) -> tuple[int, Todo]:
    """How many different cells there are, and those to measure, in the order in which they take
    turns.
    """
    planned, todo = 0, list[tuple[RunConfig, CellConfig]]()
    seen: set[str] = set()
    for config in configs:
        done = finished_keys(Path(config.results_dir), here) if config.resume else set()
        cells = {cell.key: cell for cell in cells_of(config)}
        planned += len(cells.keys() - seen)
        todo += [(config, cell) for key, cell in cells.items() if key not in done | seen]
        seen |= cells.keys()
    places = {
        place: number
        for number, place in enumerate(dict.fromkeys(_place(cell) for _, cell in todo))
    }

    def turn(one: tuple[RunConfig, CellConfig]) -> tuple[int, ...]:
        _, cell = one
        # the systems of all experiments take turns
        merged = (cell.round, cell.budget_bytes) if len(configs) > 1 else ()
        return (places[_place(cell)], *merged)

    return planned, sorted(todo, key=turn)


def _delete_if_done(
    config: RunConfig, cell: CellConfig, later: Sequence[CellConfig], console: Console
) -> None:
    """Deletes the checkpoint of `cell` unless a later cell needs it."""
    checkpoint = (config.model.name, cell.system.format)
    if checkpoint not in ((one.model.name, one.system.format) for one in later):
        freed = delete_checkpoints(Path(config.cache_dir), *checkpoint)
        console.print(f"deleted the {' '.join(checkpoint)} checkpoint: {format_size(freed)}")


def describe(cell: CellConfig) -> str:
    """One cell in a few words."""
    budget = format_size(cell.budget_bytes)
    weights = f"{cell.model.name} {cell.system.format}"
    return f"{weights}, {cell.device.name}, {budget}, {cell.system.name}, round {cell.round + 1}"


def outcome(record: Record) -> str:
    """What a record says, in one line."""
    if record.tokens_per_s is None:
        return f"{record.status}: {record.message}"
    text = f"{record.tokens_per_s:.3g} tokens/s"
    for tokens, seconds in record.prefill_s.items():
        text += f", prefill of {tokens} {statistics.median(seconds):.3g} s"
    if record.ratio is not None:
        text += f", {record.ratio:.2f} of its bound"
    if record.peak_memory_bytes is not None:
        text += f", peak {format_size(record.peak_memory_bytes)}"
    if record.limits.method == "unlimited":
        text += ", UNLIMITED"
    if (record.others_cpu_share or 0) > BUSY:
        text += f", DISTURBED: {record.others_cpu_share:.0%} of the CPU time was others'"
    return text if record.status == "ok" else f"{record.status}: {record.message} ({text})"


def results_tables(records: Iterable[Record]) -> list[Table]:
    """A table for each model, weights and device: median tokens per second and ratio of every
    budget and system; bounds with common B and c (`with_common_costs`).

    Where prefills were timed, a column for each length: the median of all rounds.
    """
    groups: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in with_common_costs(records):
        cell = record.cell
        groups[cell.model.name, cell.system.format, cell.device.name].append(record)
    return [_results_table(name, found) for name, found in sorted(groups.items())]


def _results_table(name: tuple[str, str, str], records: Sequence[Record]) -> Table:
    groups: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.cell.budget_bytes, record.cell.system.label].append(record)
    lengths = sorted({tokens for one in records for tokens in one.prefill_s})
    prefills = [f"prefill of {tokens}, s" for tokens in lengths]
    table = Table(
        *("budget", "system", "tokens/s", "of own bound", "rounds", *prefills),
        title=", ".join(name),
        title_justify="left",
    )
    above = 0
    for (budget_bytes, label), found in sorted(groups.items()):
        speeds = [one.tokens_per_s for one in found if one.status == "ok" and one.tokens_per_s]
        ratios = [one.ratio for one in found if one.status == "ok" and one.ratio]
        prefill_s = [
            [s for one in found for s in one.prefill_s.get(tokens, [])] for tokens in lengths
        ]
        table.add_row(
            format_size(budget_bytes) if budget_bytes != above else "",
            label,
            f"{statistics.median(speeds):.3g}" if speeds else found[-1].status,
            f"{statistics.median(ratios):.2f}" if ratios else "",
            str(len(speeds)),
            *(f"{statistics.median(seconds):.3g}" if seconds else "" for seconds in prefill_s),
        )
        above = budget_bytes
    return table


def _place(cell: CellConfig) -> tuple[str, str, bool]:
    """Cells of one place are compared with one another; traced ones are apart."""
    return cell.model.name, cell.device.name, cell.trace


def _left_s(seconds: dict[str, list[float]], systems: Sequence[str]) -> float:
    """Seconds the cells of `systems` will take.

    `seconds` holds those of at least one finished cell.
    """
    known = [one for found in seconds.values() for one in found]
    return sum(statistics.mean(seconds.get(system) or known) for system in systems)
