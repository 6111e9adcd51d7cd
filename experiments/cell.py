"""One measured cell: a fresh process in groups of its own, and the record of what came of it (DESIGN: Measuring).

Mechanism: a helper process makes and describes the checkpoint. Then, inside one `Limits`: the bandwidth of direct reads,
with the page cache dropped the system itself (experiments.systems, run as a script), and the bandwidth again. Where
tokens came out, the cost of a resident pass is measured, or taken from an earlier measurement. This process sleeps
meanwhile and imports no torch: libraries it maps would be charged to it and make the cell's memory larger than it is.
Whatever happens to the child is a record: killed (by the memory limit), timeout, missing, unsupported or error, with
the tokens counted until then.

The bound of a record (our choice, after the paper's equation 4) is 1 / max(c, (S - R) / B):
- S: bytes of all tensors but the embedding rows; R: the budget less process and KV cache;
- process: what the child holds when it has imported the system's libraries and not yet opened the model;
- B: the best of the two bandwidths, each the best of several numbers of readers and sizes of requests: what the disk gives
  whoever asks, and no system's own rate; and no more than the limit, which lets the first reads pass faster;
- c: seconds of the fastest resident pass of the same system's kernels without limits: of the model itself if it is
  small, else of checkpoints of the same shape with 1 and 3 layers, extrapolated to all (every layer does the same
  work); and no more than the fastest pass of the run itself, which computed too. Kept in the cache directory, for one
  CPU, number of cores, and versions.

What it does not do: choose cells, order them, or write records to a file; that is experiments.runner.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments import limits as limiting
from experiments import systems
from experiments.config import BITS_PER_WEIGHT, GGUF_FORMATS, CellConfig, ModelConfig, from_dict
from experiments.provenance import engine_commit, provenance
from experiments.records import Limits, Provenance, Record

ROOT = Path(__file__).parents[1]
BANDWIDTH_S = 0.8  # of each way of reading; the first 0.3 do not count
MIXTURE_TOKENS = 128  # of a prompt after which most experts of a layer have been used
EXPERTS = re.compile(r"_exps\.|\.experts\.")  # tensors of experts
SHALLOW_LAYERS = (1, 3)
RESIDENT_TOKENS = 12


@dataclass(slots=True)
class CheckpointFacts:
    """What a cell must know of its checkpoint."""

    path: str
    files: list[str]
    vocab: int
    layers: int
    touched_bytes: int  # of all weights one token touches
    untouched_bytes: int  # of experts that a token does not touch
    kv_bytes_per_token: (
        int  # in 16 bits, which bf16 models and GGUF files have by default in every system here
    )
    bits: float  # per weight of all matrices


def run_cell(cell: CellConfig) -> Record:
    """Measure one cell. Always a record, unless this process is interrupted: then nothing of the cell is left."""
    # the cell's own checkpoint is made before the clock of its provenance starts
    try:
        facts = describe_checkpoint(cell)
    except (subprocess.CalledProcessError, OSError) as error:
        message = _tail(error.stderr) if isinstance(error, subprocess.CalledProcessError) else str(error)
        return _failed(cell, "error", f"checkpoint: {message}", provenance(Path(cell.cache_dir).expanduser()))
    origin = provenance(Path(facts.path))
    for folder in (Path(tempfile.gettempdir()), Path(cell.cache_dir).expanduser()):
        remove_stale_scratch(folder)
    with tempfile.TemporaryDirectory(prefix=_scratch_prefix()) as scratch:
        job = _job(cell, facts, Path(scratch))
        if cell.system.kind == "airllm":
            split = run_child(job | {"kind": "split"}, cell.workload.timeout_s)
            if split.status != "ok":
                return _failed(cell, split.status, split.message, origin)
            facts.files = [str(file) for file in Path(job["copy"]).rglob("*") if file.is_file()]
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
        compute_s, compute_source = (
            _resident_pass(cell, facts, Path(scratch)) if child.counted else (None, "")
        )
    if usage.oom_kills and child.status == "error":
        child.status = "killed"
        child.message = (
            f"killed by the memory limit of {cell.budget_bytes} bytes; {len(child.counted)} tokens counted"
        )
    counted, done = child.counted, child.last("done")
    measured = [rate for probe in rates for rate in probe.values()]
    at_most = applied.read_bytes_per_s or math.inf
    fastest_s = min((token["s"] for token in counted), default=None)
    if compute_s is not None and fastest_s is not None and fastest_s < compute_s:
        compute_s, compute_source = (
            fastest_s,
            f"fastest pass of this run; {compute_source} gave {compute_s:.4f} s",
        )
    engine = dict(child.last("engine").get("told", {}))
    events = engine.pop("events", [])
    told = child.last("counted").get("told", {})
    read_bytes = sum(token["bytes"] for token in counted) - told.get("wasted_bytes", 0)
    return Record(
        run_id=uuid.uuid4().hex,
        status=child.status,  # type: ignore[arg-type]
        message=child.message,
        cell=cell,
        bits=facts.bits,
        limits=Limits(
            method=applied.method,  # type: ignore[arg-type]
            memory_bytes=applied.memory_bytes,
            read_bytes_per_s=applied.read_bytes_per_s,
            cores=len(job["core_set"]),
            swap_off=applied.memory_bytes is not None,
            page_cache_dropped="drop_caches" in dropped,
            read_ahead_kb=applied.read_ahead_kb,
            device=applied.device,
            note=applied.note,
        ),
        provenance=origin,
        tokens=sum(len(_ids(token)) for token in counted),
        passes=len(counted),
        token_s=[token["s"] for token in counted],
        token_bytes=[token["bytes"] for token in counted],
        prefill_s=child.prefill_s,
        bytes_read=done.get("bytes_read"),
        load_s=child.last("loaded").get("load_s"),
        peak_memory_bytes=usage.peak_memory_bytes or done.get("peak_bytes"),
        output_tokens=[id for token in child.all("token") for id in _ids(token) if id is not None],
        total_weight_bytes=facts.touched_bytes,
        untouched_bytes=facts.untouched_bytes or None,
        missed_bytes=max(0, read_bytes) // len(counted) if facts.untouched_bytes and counted else None,
        counted=told,
        process_bytes=child.last("ready").get("process_bytes"),
        kv_bytes=facts.kv_bytes_per_token * cell.workload.context * (cell.workload.batch or 1),
        compute_s_per_pass=compute_s,
        compute_source=compute_source,
        bandwidth_bytes_per_s=min(max(measured), at_most) if measured else None,
        bandwidth_source="direct reads under the same limits, before and after: "
        + "; ".join(
            ", ".join(f"{ways} {rate / 1e9:.3f}" for ways, rate in probe.items()) for probe in rates if probe
        )
        + " GB/s",
        others_cpu_share=others_cpu_share,
        engine=engine,
        events=events,
    )


class OthersCpu:
    """What of the machine's CPU time others take, from now on: niceness does not keep them off a cell's cores where sessions are scheduled in groups."""

    def __init__(self) -> None:
        self._start_s = perf_counter()
        self._others_s = self._now()

    def share(self) -> float:
        """Their share of the time of all cores so far; the kernel's own work is theirs too."""
        taken_s = self._now() - self._others_s
        return min(1.0, max(0.0, taken_s / ((perf_counter() - self._start_s) * (os.cpu_count() or 1))))

    def _now(self) -> float:
        """CPU seconds since boot that were neither this process's nor its finished children's."""
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
            int, Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
        )
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def _scratch_prefix() -> str:
    """Of a directory of this process's, by which `remove_stale_scratch` knows whose it was."""
    return f"flexinfer-cell-{os.getpid()}-"


def remove_stale_scratch(parent: Path) -> None:
    """Remove scratch directories of cells whose process is gone: one killed outright leaves its own."""
    for path in limiting.abandoned(parent, "flexinfer-cell-"):
        shutil.rmtree(path, ignore_errors=True)


@dataclass(slots=True)
class Child:
    """What a measured process left: its events, and how it ended."""

    status: str
    message: str
    events: list[dict[str, Any]]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def last(self, kind: str) -> dict[str, Any]:
        found = self.all(kind)
        return found[-1] if found else {}

    @property
    def counted(self) -> list[dict[str, Any]]:
        return [token for token in self.all("token") if token["counted"]]

    @property
    def prefill_s(self) -> dict[int, list[float]]:
        """Seconds of each prefill, by the tokens of its prompt."""
        found: dict[int, list[float]] = {}
        for event in self.all("prefill"):
            found.setdefault(event["tokens"], []).append(event["s"])
        return found


def run_child(job: dict[str, Any], timeout_s: float, limits: limiting.Limits | None = None) -> Child:
    """Run experiments.systems with `job` in a fresh process, inside `limits`, asleep until it ends."""
    events = Path(job["scratch"]) / f"{uuid.uuid4().hex}.jsonl"
    argv = [job.get("python") or sys.executable, "-P", str(Path(systems.__file__))]
    cores = str(job["cores"])
    environment = os.environ | {
        "OMP_NUM_THREADS": cores,
        "MKL_NUM_THREADS": cores,
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if "cache_dir" in job:  # where describe_checkpoint has left config and tokenizer of a GGUF file
        environment["FLEXINFER_CACHE"] = job["cache_dir"]
    child = subprocess.Popen(
        limits.command(argv) if limits is not None else argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
    )
    try:
        said, _ = child.communicate(json.dumps(job | {"events": str(events)}), timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill(child)
        seen = _read_events(events)
        message = (
            f"no end after {timeout_s:g} s; {sum(bool(each.get('counted')) for each in seen)} tokens counted"
        )
        return Child("timeout", message, seen)
    except BaseException:
        _kill(child)
        raise
    seen = _read_events(events)
    failed = [event for event in seen if event["event"] == "failed"]
    if failed:
        return Child(failed[-1]["status"], failed[-1]["message"], seen)
    if child.returncode != 0:
        code = child.returncode
        ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Child("error", f"{ended}: {_tail(said)}", seen)
    return Child("ok", "", seen)


def describe_checkpoint(cell: CellConfig) -> CheckpointFacts:
    """Make the cell's checkpoint if need be, and describe it, in a process of its own (it imports torch)."""
    told = json.dumps(
        {"model": asdict(cell.model), "format": cell.system.format, "cache_dir": cell.cache_dir}
    )
    facts = CheckpointFacts(**json.loads(_described(told)))
    if all(Path(file).is_file() for file in facts.files):
        return facts
    _described.cache_clear()  # deleted since
    return CheckpointFacts(**json.loads(_described(told)))


@cache
def _described(told: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cache_dir = str(Path(json.loads(told)["cache_dir"]).expanduser())
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cell"],
        input=told,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path, "FLEXINFER_CACHE": cache_dir},
    )
    return done.stdout.splitlines()[-1]


def _job(cell: CellConfig, facts: CheckpointFacts, scratch: Path) -> dict[str, Any]:
    workload, core_set = cell.workload, sorted(limiting.core_set(cell.device.cores))
    return {
        "kind": cell.system.kind,
        "options": {name: value for name, value in cell.system.options.items() if name != "python"},
        "python": cell.system.options.get("python"),
        "model": facts.path,
        "cache_dir": str(Path(cell.cache_dir).expanduser()),
        "copy": f"{facts.path}.airllm",
        "scratch": str(scratch),
        "core_set": core_set,
        "cores": len(core_set),
        "budget_bytes": cell.budget_bytes,
        "kv_bytes": facts.kv_bytes_per_token * workload.context * (workload.batch or 1),
        "context": workload.context,
        "vocab": facts.vocab,
        "prompt_tokens": workload.prompt_tokens,
        "warmup_tokens": workload.warmup_tokens,
        "tokens": 1 + workload.warmup_tokens + workload.max_tokens,
        "min_tokens": workload.min_tokens,
        "min_seconds": workload.min_seconds,
        "max_seconds": workload.max_seconds,
        "prefill_tokens": workload.prefill_tokens,
        "texts": workload.texts,
        "replayed": workload.replayed,
        "max_tokens": workload.max_tokens,
        "drawn": workload.drawn,
        "batch": workload.batch or 1,
        "predict": workload.batch is not None,
        "trace": cell.trace,
    }


def _ids(token: dict[str, Any]) -> list[int | None]:
    """The tokens of a pass: one, or those that a draft had right and one."""
    return token["ids"] if "ids" in token else [token["id"]]


def _bandwidth(files: list[str], limits: limiting.Limits, job: dict[str, Any]) -> dict[str, float]:
    """Bytes/s by the way of reading: how many readers, and how much each asks for at a time."""
    large = [file for file in files if os.path.getsize(file) >= systems.REQUEST_BYTES]
    told = {"kind": "bandwidth", "files": large or files, "seconds": BANDWIDTH_S}
    child = run_child(job | told, 60.0, limits)
    rates: dict[str, float] = child.last("bandwidth").get("bytes_per_s", {})
    return rates


def _resident_pass(cell: CellConfig, facts: CheckpointFacts, scratch: Path) -> tuple[float | None, str]:
    """Seconds of one pass with everything resident, of as many rows as there are sequences, and how they were got."""
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
    seconds: list[float] = []
    cache_dir = Path(cell.cache_dir).expanduser()
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_scratch_prefix(), dir=cache_dir) as shallow_dir:
        for layers in SHALLOW_LAYERS if shallow else (facts.layers,):
            model, directory = cell.model, str(cache_dir)
            if shallow and cell.model.shape is not None:
                directory = shallow_dir
                shape = replace(cell.model.shape, layers=layers)
                model = replace(cell.model, name=f"{cell.model.name}-{layers}-layers", shape=shape)
            roomy = 4 * facts.touched_bytes + (4 << 30)
            one = replace(
                cell, model=model, system=system, budget_bytes=roomy, trace=False, cache_dir=directory
            )
            try:
                job = _job(one, describe_checkpoint(one), scratch)
            except subprocess.CalledProcessError as error:
                return None, f"not measured: {_tail(error.stderr)}"
            job |= {
                "warmup_tokens": 3,
                "tokens": 4 + RESIDENT_TOKENS,
                "min_tokens": RESIDENT_TOKENS,
                "min_seconds": 0.0,
            }
            prompt_tokens = MIXTURE_TOKENS if facts.untouched_bytes else 4
            job |= {
                "prompt_tokens": prompt_tokens,
                "context": max(64 + prompt_tokens, cell.workload.context),
                "prefill_tokens": [],
                "predict": False,
                "texts": [],
                "replayed": [],
            }
            child = run_child(job, cell.workload.timeout_s)
            if child.status != "ok":
                return None, f"not measured: {child.message}"
            seconds.append(min(token["s"] for token in child.counted))
    if not shallow:
        result, source = seconds[0], f"{system.kind}, whole model resident, no limits"
    else:
        layer_s = max(0.0, seconds[1] - seconds[0]) / (SHALLOW_LAYERS[1] - SHALLOW_LAYERS[0])
        result = max(seconds[0] + (facts.layers - SHALLOW_LAYERS[0]) * layer_s, seconds[1])
        source = f"{system.kind}, resident, no limits, extrapolated from 1 and 3 layers ({seconds[0]:.4f}, {seconds[1]:.4f} s)"
    store.parent.mkdir(parents=True, exist_ok=True)
    part = store.with_suffix(".part")
    part.write_text(json.dumps({"seconds": result, "source": source}))
    part.rename(store)
    return result, source


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


def _kill(child: "subprocess.Popen[str]") -> None:
    """End the child and what it started: they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _read_events(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed child may leave half a line


def _tail(text: str | None, lines: int = 3, width: int = 600) -> str:
    kept = [line.strip() for line in (text or "").splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-width:] or "it said nothing"


def _describe(model: ModelConfig, format: str, cache_dir: str) -> CheckpointFacts:
    """Opening a GGUF file leaves its config and tokenizer in the cache, so that no cell pays for them."""
    from flexinfer.formats.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(_make(model, format, Path(cache_dir).expanduser()))
    told = json.loads((checkpoint.config_dir / "config.json").read_text())
    told |= told.get("text_config", {})
    experts = sum(spec.nbytes for name, spec in checkpoint.tensors.items() if EXPERTS.search(name))
    count = told.get("num_local_experts") or told.get("num_experts") or told.get("n_routed_experts") or 1
    untouched = experts - experts * (told.get("num_experts_per_tok") or 0) // count
    layers: dict[str, int] = {}
    outside: dict[str, int] = {}
    for name, spec in checkpoint.tensors.items():
        number = next((part for part in name.split(".") if part.isdigit()), None)
        group, key = (outside, name) if number is None else (layers, number)
        group[key] = group.get(key, 0) + spec.nbytes
    heads = told["num_attention_heads"]
    head_width = told.get("head_dim") or told["hidden_size"] // heads
    embeddings = ("token_embd.weight", "wte.weight")
    embedding = sum(size for name, size in outside.items() if "embed" in name or name.endswith(embeddings))
    tied = not any(name.startswith(("lm_head", "embed_out", "output.")) for name in outside)
    matrices = [spec for spec in checkpoint.tensors.values() if len(spec.shape) > 1]
    return CheckpointFacts(
        path=str(checkpoint.path),
        files=[str(file) for file in checkpoint.files],
        vocab=told["vocab_size"],
        layers=len(layers),
        touched_bytes=sum(layers.values()) + sum(outside.values()) - (0 if tied else embedding) - untouched,
        untouched_bytes=untouched,
        kv_bytes_per_token=4 * len(layers) * (told.get("num_key_value_heads") or heads) * head_width,
        bits=8 * sum(spec.nbytes for spec in matrices) / sum(math.prod(spec.shape) for spec in matrices),
    )


def _make(model: ModelConfig, format: str, cache_dir: Path) -> Path:
    """Where the checkpoint lies, made now unless it is there. It is a file for GGUF, a directory otherwise."""
    if model.kind == "path":
        return Path(str(model.path)).expanduser()
    if model.kind == "real":
        from experiments.smollm2 import make_smollm2, smollm2_gguf

        return smollm2_gguf(cache_dir) if format in GGUF_FORMATS else make_smollm2(cache_dir)
    if format in GGUF_FORMATS:
        from experiments.gguf import make_gguf

        return make_gguf(model, format, cache_dir)
    from experiments.synth import make_checkpoint

    return make_checkpoint(model, format, cache_dir)


def main() -> int:
    """The helper process: a model and a format as JSON on stdin, the facts of its checkpoint as the last line."""
    told = json.loads(sys.stdin.read())
    facts = _describe(from_dict(ModelConfig, told["model"]), told["format"], told["cache_dir"])
    print(json.dumps(asdict(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
