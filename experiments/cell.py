"""One measured cell: a fresh process in groups of its own, and the record of what came of it
(DESIGN: Measuring).

Mechanism: a helper process makes and describes the checkpoint. Then, inside one `Limits`: the
bandwidth of direct reads, with the page cache dropped the system itself
(experiments.systems.measured), and the bandwidth again. Where tokens came out, the cost of a
resident pass is measured, or taken from an earlier measurement. This process sleeps meanwhile and
imports no torch: libraries it maps would be charged to it and make the cell's memory larger than it
is. Whatever happens to the child is a record: killed (by the memory limit), timeout, missing,
unsupported or error, with the tokens counted until then.

The bound of a record (our choice, after the paper's equation 4) is 1 / max(c, (S - R) / B):
- S: bytes of all tensors but the embedding rows; R: the budget less process and KV cache;
- process: what the child holds when it has imported the system's libraries and not yet opened the
  model;
- B: the best of the two bandwidths, each the best of several numbers of readers and sizes of
  requests: what the disk gives whoever asks, and no system's own rate; and no more than the limit,
  which lets the first reads pass faster;
- c: seconds of the fastest resident pass of the same system's kernels without limits: of the model
  itself if it is small, else of checkpoints of the same shape with 1 and 3 layers, extrapolated to
  all (every layer does the same work); and no more than the fastest pass of the run itself, which
  computed too. Kept in the cache directory, for one CPU, number of cores, and versions.

What it does not do: choose cells, order them, or write records to a file; that is
experiments.runner.
"""

import math
import os
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments import limits as limiting
from experiments.checkpoints import CheckpointFacts, describe_checkpoint
from experiments.child import Child, job_of, remove_stale_scratch, run_child, scratch_prefix, tail
from experiments.config import CellConfig
from experiments.model_config import BITS_PER_WEIGHT
from experiments.provenance import provenance
from experiments.records import Limits, Provenance, Record
from experiments.resident import resident_pass
from experiments.systems.bandwidth import REQUEST_BYTES

BANDWIDTH_S = 0.8  # of each way of reading; the first 0.3 do not count


@dataclass(slots=True)
class Run:
    """What came of the measured process, and of what was measured around it in the same limits."""

    child: Child
    applied: limiting.Applied
    usage: limiting.Usage
    rates: list[dict[str, float]]  # bytes/s of direct reads, before and after
    cache_dropped: bool
    others_cpu_share: float


def run_cell(cell: CellConfig) -> Record:
    """Measure one cell.

    Always a record, unless this process is interrupted: then nothing of the cell is left.
    """
    # the cell's own checkpoint is made before the clock of its provenance starts
    try:
        facts = describe_checkpoint(cell)
    except (subprocess.CalledProcessError, OSError) as error:
        message = (
            tail(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        )
        return _failed(
            cell, "error", f"checkpoint: {message}", provenance(Path(cell.cache_dir).expanduser())
        )
    origin = provenance(Path(facts.path))
    for folder in (Path(tempfile.gettempdir()), Path(cell.cache_dir).expanduser()):
        remove_stale_scratch(folder)
    with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as scratch:
        job = job_of(cell, facts, Path(scratch))
        if cell.system.kind == "airllm":
            split = run_child(job | {"kind": "split"}, cell.workload.timeout_s)
            if split.status != "ok":
                return _failed(cell, split.status, split.message, origin)
            facts.files = [str(file) for file in Path(job["copy"]).rglob("*") if file.is_file()]
        run = _run_in_limits(cell, facts, job)
        resident = resident_pass(cell, facts, Path(scratch)) if run.child.counted else (None, "")
    return _record(cell, facts, origin, run, resident)


def _run_in_limits(cell: CellConfig, facts: CheckpointFacts, job: dict[str, Any]) -> Run:
    """The bandwidth, the system itself with the page cache dropped, and the bandwidth again."""
    with limiting.Limits(
        cell.budget_bytes,
        cell.device.read_bytes_per_s,
        Path(facts.path),
        read_ahead_kb=cell.device.read_ahead_kb,
    ) as limits:
        rates = [_bandwidth(facts.files, limits, job)]
        dropped = limiting.drop_page_cache(map(Path, facts.files))
        others = OthersCpu()
        child = run_child(job, cell.workload.timeout_s, limits)
        others_cpu_share = others.share()
        usage = limits.usage()
        rates.append(_bandwidth(facts.files, limits, job))
        applied = limits.applied
    if usage.oom_kills and child.status == "error":
        child.status = "killed"
        child.message = (
            f"killed by the memory limit of {cell.budget_bytes} bytes; {len(child.counted)} tokens "
            "counted"
        )
    return Run(child, applied, usage, rates, "drop_caches" in dropped, others_cpu_share)


def _record(
    cell: CellConfig,
    facts: CheckpointFacts,
    origin: Provenance,
    run: Run,
    resident: tuple[float | None, str],
) -> Record:
    """The record of a run; `resident`: seconds of a resident pass, and how they were got."""
    child, counted = run.child, run.child.counted
    done, told = child.last("done"), child.last("counted").get("told", {})
    engine = dict(child.last("engine").get("told", {}))
    events = engine.pop("events", [])
    compute_s, compute_source = _fastest(resident, counted)
    read_bytes = sum(token["bytes"] for token in counted) - told.get("wasted_bytes", 0)
    bandwidth_bytes_per_s, bandwidth_source = _best_rate(run)
    return Record(
        run_id=uuid.uuid4().hex,
        status=child.status,  # type: ignore[arg-type]
        message=child.message,
        cell=cell,
        bits=facts.bits,
        limits=_limits(run, len(limiting.core_set(cell.device.cores))),
        provenance=origin,
        tokens=sum(len(_ids(token)) for token in counted),
        passes=len(counted),
        token_s=[token["s"] for token in counted],
        token_bytes=[token["bytes"] for token in counted],
        prefill_s=child.prefill_s,
        bytes_read=done.get("bytes_read"),
        load_s=child.last("loaded").get("load_s"),
        peak_memory_bytes=run.usage.peak_memory_bytes or done.get("peak_bytes"),
        output_tokens=[id for token in child.all("token") for id in _ids(token) if id is not None],
        total_weight_bytes=facts.touched_bytes,
        untouched_bytes=facts.untouched_bytes or None,
        missed_bytes=max(0, read_bytes) // len(counted)
        if facts.untouched_bytes and counted
        else None,
        counted=told,
        process_bytes=child.last("ready").get("process_bytes"),
        kv_bytes=facts.kv_bytes_per_token * cell.workload.context * (cell.workload.batch or 1),
        compute_s_per_pass=compute_s,
        compute_source=compute_source,
        bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        bandwidth_source=bandwidth_source,
        others_cpu_share=run.others_cpu_share,
        engine=engine,
        events=events,
    )


def _limits(run: Run, cores: int) -> Limits:
    applied = run.applied
    return Limits(
        method=applied.method,  # type: ignore[arg-type]
        memory_bytes=applied.memory_bytes,
        read_bytes_per_s=applied.read_bytes_per_s,
        cores=cores,
        swap_off=applied.memory_bytes is not None,
        page_cache_dropped=run.cache_dropped,
        read_ahead_kb=applied.read_ahead_kb,
        device=applied.device,
        note=applied.note,
    )


def _fastest(
    resident: tuple[float | None, str], counted: list[dict[str, Any]]
) -> tuple[float | None, str]:
    """The resident pass, or the fastest pass of the run itself where that was faster."""
    compute_s, source = resident
    fastest_s = min((token["s"] for token in counted), default=None)
    if compute_s is None or fastest_s is None or fastest_s >= compute_s:
        return resident
    return fastest_s, f"fastest pass of this run; {source} gave {compute_s:.4f} s"


def _best_rate(run: Run) -> tuple[float | None, str]:
    """The best bandwidth, no more than the limit, and all that were measured in words."""
    rates = [rate for probe in run.rates for rate in probe.values()]
    best = min(max(rates), run.applied.read_bytes_per_s or math.inf) if rates else None
    words = (
        ", ".join(f"{ways} {rate / 1e9:.3f}" for ways, rate in probe.items()) for probe in run.rates
    )
    told = "; ".join(filter(None, words))
    return best, f"direct reads under the same limits, before and after: {told} GB/s"


class OthersCpu:
    """What of the machine's CPU time others take, from now on: niceness does not keep them off a
    cell's cores where sessions are scheduled in groups.
    """

    def __init__(self) -> None:
        self._start_s = perf_counter()
        self._others_s = self._now()

    def share(self) -> float:
        """Their share of the time of all cores so far; the kernel's own work is theirs too."""
        taken_s = self._now() - self._others_s
        return min(
            1.0, max(0.0, taken_s / ((perf_counter() - self._start_s) * (os.cpu_count() or 1)))
        )

    def _now(self) -> float:
        """CPU seconds since boot that were neither this process's nor its finished children's."""
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        )
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - sum(
            os.times()[:4]
        )


def _ids(token: dict[str, Any]) -> list[int | None]:
    """The tokens of a pass: one, or those that a draft had right and one."""
    return token["ids"] if "ids" in token else [token["id"]]


def _bandwidth(files: list[str], limits: limiting.Limits, job: dict[str, Any]) -> dict[str, float]:
    """Bytes/s by the way of reading: how many readers, and how much each asks for at a time."""
    large = [file for file in files if os.path.getsize(file) >= REQUEST_BYTES]
    told = {"kind": "bandwidth", "files": large or files, "seconds": BANDWIDTH_S}
    child = run_child(job | told, 60.0, limits)
    rates: dict[str, float] = child.last("bandwidth").get("bytes_per_s", {})
    return rates


def _failed(cell: CellConfig, status: str, message: str, origin: Provenance) -> Record:
    return Record(
        run_id=uuid.uuid4().hex,
        status=status,  # type: ignore[arg-type]
        message=message,
        cell=cell,
        bits=BITS_PER_WEIGHT.get(cell.system.format),
        limits=Limits(method="unlimited"),
        provenance=origin,
    )
