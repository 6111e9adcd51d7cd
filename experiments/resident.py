"""The compute time of a pass with everything resident (c of a record's bound), measured once and
kept.

It is the fastest pass of the same system's kernels without limits: of the model itself if it is
small, else of checkpoints of the same shape with 1 and 3 layers, extrapolated to all (every layer
does the same work). Kept in the cache directory, for one CPU, number of cores, and versions.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from experiments.checkpoints import CheckpointFacts, describe_checkpoint
from experiments.child import job_of, run_child, scratch_prefix, tail
from experiments.config import CellConfig
from experiments.provenance import engine_commit, provenance

MIXTURE_TOKENS = 128  # of a prompt after which most experts of a layer have been used
SHALLOW_LAYERS = (1, 3)
RESIDENT_TOKENS = 12


def resident_pass(
    cell: CellConfig, facts: CheckpointFacts, scratch: Path
) -> tuple[float | None, str]:
    """Seconds of one pass with everything resident, of as many rows as there are sequences, and how
    they were got.
    """
    system = cell.system.resident()
    origin = provenance(Path(facts.path))
    model_id = cell.model.shape.facts() if cell.model.shape else facts.path
    what = [model_id, system.kind, system.options, system.format]
    if system.kind == "flexinfer":  # measured anew when it has changed
        what.append(engine_commit())
    batch = cell.workload.batch or 1
    told = [*what, cell.device.cores, origin.cpu, origin.versions, *([batch] if batch > 1 else [])]
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    store = Path(cell.cache_dir).expanduser() / "resident" / f"{key}.json"
    if store.exists():
        kept = json.loads(store.read_text())
        return kept["seconds"], kept["source"]
    shallow = cell.model.kind == "synthetic" and facts.layers > SHALLOW_LAYERS[-1]
    free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if not shallow and 2 * facts.touched_bytes > free_bytes:
        return None, f"not measured: {facts.touched_bytes} bytes resident do not fit here"
    roomy = 4 * facts.touched_bytes + (4 << 30)
    alone = replace(cell, system=system, budget_bytes=roomy, trace=False)
    try:
        result, source = _extrapolated(alone, facts, scratch) if shallow else _whole(alone, scratch)
    except _NotMeasured as error:
        return None, f"not measured: {error}"
    store.parent.mkdir(parents=True, exist_ok=True)
    part = store.with_suffix(".part")
    part.write_text(json.dumps({"seconds": result, "source": source}))
    part.rename(store)
    return result, source


class _NotMeasured(Exception):
    """A checkpoint could not be made, or its run did not end well."""


def _whole(cell: CellConfig, scratch: Path) -> tuple[float, str]:
    seconds = _fastest_pass(cell, scratch)
    return seconds, f"{cell.system.kind}, whole model resident, no limits"


def _extrapolated(cell: CellConfig, facts: CheckpointFacts, scratch: Path) -> tuple[float, str]:
    """From checkpoints of few layers, which are deleted again."""
    assert cell.model.shape is not None
    cache_dir = Path(cell.cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    seconds = []
    with tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=cache_dir) as shallow_dir:
        for layers in SHALLOW_LAYERS:
            shape = replace(cell.model.shape, layers=layers)
            model = replace(cell.model, name=f"{cell.model.name}-{layers}-layers", shape=shape)
            seconds.append(
                _fastest_pass(replace(cell, model=model, cache_dir=shallow_dir), scratch)
            )
    layer_s = max(0.0, seconds[1] - seconds[0]) / (SHALLOW_LAYERS[1] - SHALLOW_LAYERS[0])
    result = max(seconds[0] + (facts.layers - SHALLOW_LAYERS[0]) * layer_s, seconds[1])
    source = f"{cell.system.kind}, resident, no limits, extrapolated from 1 and 3 layers"
    return result, f"{source} ({seconds[0]:.4f}, {seconds[1]:.4f} s)"


def _fastest_pass(cell: CellConfig, scratch: Path) -> float:
    """Seconds of the fastest of RESIDENT_TOKENS passes of `cell` with all weights in memory."""
    try:
        facts = describe_checkpoint(cell)
    except subprocess.CalledProcessError as error:
        raise _NotMeasured(tail(error.stderr)) from error
    prompt_tokens = MIXTURE_TOKENS if facts.untouched_bytes else 4
    job = job_of(cell, facts, scratch) | {
        "warmup_tokens": 3,
        "tokens": 4 + RESIDENT_TOKENS,
        "min_tokens": RESIDENT_TOKENS,
        "min_seconds": 0.0,
        "prompt_tokens": prompt_tokens,
        "context": max(64 + prompt_tokens, cell.workload.context),
        "prefill_tokens": [],
        "predict": False,
        "texts": [],
        "replayed": [],
    }
    child = run_child(job, cell.workload.timeout_s)
    if child.status != "ok":
        raise _NotMeasured(child.message)
    return float(min(token["s"] for token in child.counted))
