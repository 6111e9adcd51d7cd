"""What a pass takes on this machine while something else reads the disk.

The bound takes it that reading costs computing nothing.

    python -m experiments.overlap MODEL [--memory 20GiB] [--rates 0.5 1 2] [--record
    results/quality/overlap.jsonl]

1 / max(c, (S - R) / B) is what no system beats: c is measured while nothing is read, B while
nothing is computed. On a virtual machine both share memory, caches and cores with each other and
with what carries the reads, and c grows with the rate. Here a model that is all in memory decodes,
alone and beside another process that reads its file directly at a given rate, in turns; that
process shares no interpreter, no lock and no queue with the model, so what it costs is the
machine's, not the engine's. `attainable_s` says what a pass then takes at best that has to read so
many bytes.

What it does not do: tell why.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd

from experiments.provenance import provenance
from experiments.record_files import QUALITY, load_lines
from experiments.records import Record
from experiments.systems.interface import bytes_read, prompt_ids
from experiments.systems.on_torch import FlexInfer
from flexinfer.formats.checkpoint import open_checkpoint

CONTEXT, PROMPT_TOKENS = 256, 128  # tokens; the prompt fills a cache of experts
WARM_UP = 3  # passes after each change
# That a pass may read and still counts as one in memory: embedding rows, library pages.
STREAMS_BYTES = 16 << 20
READER = """
import mmap, os, sys, threading, time
files, rate, size = sys.argv[2:], float(sys.argv[1]), 4 << 20  # no files: it reads nothing
blocks = [(file, at) for file in files for at in range(0, os.path.getsize(file) - size + 1, size)]
done, begun_s, ended, first = [0, 0], time.perf_counter(), threading.Event(), threading.Event()
def read(worker):
    buffer, opened, i = mmap.mmap(-1, size), {}, worker
    while not ended.is_set():
        file, at = blocks[i % len(blocks)]
        if file not in opened:
            opened[file] = os.open(file, os.O_RDONLY | os.O_DIRECT)
        done[worker] += os.preadv(opened[file], [buffer], at)
        first.set()
        i += 2
        ended.wait(max(0.0, sum(done) / rate - (time.perf_counter() - begun_s)))
threads = [threading.Thread(target=read, args=(worker,)) for worker in range(2 if blocks else 0)]
for thread in threads:
    thread.start()
for line in sys.stdin:
    if blocks:
        first.wait(60)
    print(sum(done) / (time.perf_counter() - begun_s), flush=True)  # bytes/s so far
ended.set()
"""


def attainable_s(
    missed_bytes: float, passes: Iterable[tuple[float, float]], bandwidth_bytes_per_s: float
) -> float:
    """Seconds of a pass at best that reads `missed_bytes`, where `passes` are what was measured:
    (bytes/s read meanwhile, seconds of a pass).

    It computes beside reads of some rate, and what is missing then is read with nothing beside it,
    at `bandwidth_bytes_per_s`. Of the rates the best: a measured one, or one between two at which a
    pass ends with its reads. Between the measured rates seconds are taken to grow evenly; what a
    pass took beside faster reads it can take beside slower ones, and more than that was noise.
    """
    known: list[tuple[float, float]] = []
    for rate, seconds in sorted(passes, reverse=True):
        known.insert(0, (rate, min(seconds, known[0][1]) if known else seconds))
    best_s = min(
        seconds + max(0.0, missed_bytes - rate * seconds) / bandwidth_bytes_per_s
        for rate, seconds in known
    )
    for (slow, slow_s), (fast, fast_s) in pairwise(known):
        slope = (fast_s - slow_s) / (fast - slow)
        level = slow_s - slow * slope  # T = level + slope * missed_bytes / T
        seconds = (level + (level * level + 4 * slope * missed_bytes) ** 0.5) / 2
        if slow_s <= seconds and slow * seconds <= missed_bytes <= fast * seconds:
            best_s = min(best_s, seconds)
    return best_s


def medians(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(bytes/s read meanwhile, seconds of a pass) by the rate that was asked for, over the rounds:
    for `attainable_s`.
    """
    by_rate: dict[float, list[Mapping[str, float]]] = {}
    for one in record["passes"]:
        by_rate.setdefault(one["wanted_bytes_per_s"], []).append(one)
    return [
        (
            statistics.median(one["read_bytes_per_s"] for one in found),
            statistics.median(one["pass_s"] for one in found),
        )
        for _, found in sorted(by_rate.items())
    ]


def load(results_dir: Path) -> list[dict[str, Any]]:
    """The records, oldest first. Says which command makes them where there are none."""
    return load_lines(
        results_dir / QUALITY / "overlap.jsonl", "python -m experiments.overlap MODEL"
    )


def table(records: Iterable[Record], lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """FlexInfer's cells on the machine's own disk that read, beside the bound and what was
    attainable on that machine, for models of which there is a line.
    """
    by_place = {
        (str(line["provenance"]["cpu"]), str(line["model"])): medians(line) for line in lines
    }
    rows: list[dict[str, Any]] = []
    for one in records:
        cell = one.cell
        name = f"{cell.model.name}-{cell.system.format}-"
        passes = next(
            (
                found
                for (cpu, model), found in by_place.items()
                if cpu == one.provenance.cpu and model.startswith(name)
            ),
            None,
        )
        limited = cell.device.read_bytes_per_s or cell.device.cores
        if cell.system.name != "flexinfer" or limited or not passes or not one.passes:
            continue
        nbytes = sum(one.token_bytes) / one.passes
        if nbytes < STREAMS_BYTES or not one.bound_tokens_per_s or not one.tokens_per_s:
            continue
        assert one.bandwidth_bytes_per_s
        seconds = one.passes / one.tokens / one.tokens_per_s
        at_best_s = attainable_s(nbytes, passes, one.bandwidth_bytes_per_s)
        rows.append(
            {
                "model": cell.model.name,
                "weights": one.weights,
                "device": cell.device.name,
                "budget GiB": cell.budget_bytes / 2**30,
                "read GB": nbytes / 1e9,
                "pass s": seconds,
                "bound s": 1 / one.bound_tokens_per_s,
                "attainable s": at_best_s,
                "of own bound": 1 / one.bound_tokens_per_s / seconds,
                "of attainable": at_best_s / seconds,
            }
        )
    return pd.DataFrame(
        sorted(rows, key=lambda row: (row["model"], row["device"], row["budget GiB"]))
    )


def measure(
    model: Path, memory: str, rates: Sequence[float], *, rounds: int = 3, passes: int = 10
) -> dict[str, Any]:
    """A record.

    In its `passes`, for each round and rate: the bytes/s that were asked for (0: alone) and came,
    and the median seconds of a pass.

    Raises: ValueError if the model is not all in memory there; what `flexinfer.from_pretrained`
    raises.
    """
    origin = provenance(model)
    files = [str(file) for file in open_checkpoint(model).files]
    job = {
        "model": str(model),
        "options": {},
        "budget_bytes": memory,
        "context": CONTEXT,
        "batch": 1,
    }
    system = FlexInfer(job | {"cores": len(os.sched_getaffinity(0)), "trace": False})
    system.load()
    try:
        ids = prompt_ids(CONTEXT, system.model.config.get_text_config().vocab_size)
        seen = []
        for _ in range(rounds):
            for rate in (0.0, *rates):
                system.start(ids[:PROMPT_TOKENS])
                system.step()
                drawn = iter(ids[PROMPT_TOKENS:])
                seen.append(_beside(system, drawn, files, rate, passes))
    finally:
        system.close()
    return {
        "run_id": uuid.uuid4().hex,
        "provenance": origin.model_dump(mode="json"),
        "model": model.parent.name if model.is_file() else model.name,
        "budget": memory,
        "passes": seen,
    }


def _beside(
    system: FlexInfer, drawn: Iterator[int], files: Sequence[str], rate: float, passes: int
) -> dict[str, float]:
    """Passes beside a process that reads at `rate` bytes/s; 0: alone."""
    arguments = [sys.executable, "-c", READER, str(rate), *(files if rate else [])]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        asks, answers = reader.stdin, reader.stdout
        assert asks is not None
        assert answers is not None

        def bytes_per_s() -> float:
            print(file=asks, flush=True)
            return float(answers.readline())

        try:
            bytes_per_s()  # it reads by now
            for _ in range(WARM_UP):
                system.take(next(drawn))
                system.step()
            pass_s, own_bytes = [], bytes_read()
            for _ in range(passes):
                system.take(next(drawn))
                start_s = perf_counter()
                system.step()
                pass_s.append(perf_counter() - start_s)
            rate_seen = bytes_per_s()
            own_bytes = bytes_read() - own_bytes
        finally:
            asks.close()
    if own_bytes > passes * STREAMS_BYTES:
        raise ValueError(
            f"memory: a pass reads {own_bytes // passes} bytes; give it memory for all of the model"
        )
    return {
        "wanted_bytes_per_s": rate,
        "read_bytes_per_s": rate_seen,
        "pass_s": statistics.median(pass_s),
    }


def main() -> None:
    """Measure, print what it gave, and append a JSON line to the records."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file or a checkpoint directory")
    parser.add_argument("--memory", default="20GiB", help="enough for all of it")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 1, 1.5, 2], help="GB/s beside it"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", type=Path, default=Path("results") / QUALITY / "overlap.jsonl")
    arguments = parser.parse_args()
    rates = [rate * 1e9 for rate in arguments.rates]
    record = measure(arguments.model, arguments.memory, rates, rounds=arguments.rounds)
    for rate, seconds in medians(record):
        print(f"beside reads of {rate / 1e9:.2f} GB/s a pass takes {seconds:.3f} s")
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    with arguments.record.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
