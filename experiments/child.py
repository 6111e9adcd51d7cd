"""The measured process of a cell: what it is told, how it is run and how it ended."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import limits as limiting
from experiments.cgroups import abandoned
from experiments.checkpoints import ROOT, CheckpointFacts
from experiments.config import CellConfig
from experiments.systems import measured


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


def job_of(cell: CellConfig, facts: CheckpointFacts, scratch: Path) -> dict[str, Any]:
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


def run_child(
    job: dict[str, Any], timeout_s: float, limits: limiting.Limits | None = None
) -> Child:
    """Run experiments.systems.measured with `job` in a fresh process, inside `limits`, asleep until
    it ends.
    """
    events = Path(job["scratch"]) / f"{uuid.uuid4().hex}.jsonl"
    argv = [job.get("python") or sys.executable, "-P", str(Path(measured.__file__))]
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
            f"no end after {timeout_s:g} s; {sum(bool(each.get('counted')) for each in seen)} "
            "tokens counted"
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
        return Child("error", f"{ended}: {tail(said)}", seen)
    return Child("ok", "", seen)


def _kill(child: "subprocess.Popen[str]") -> None:
    """End the child and what it started: they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.communicate()


def _read_events(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = file.read_text().splitlines(keepends=True)
    # A killed child may leave half a line.
    return [json.loads(line) for line in lines if line.endswith("\n")]


def tail(text: str | None, lines: int = 3, width: int = 600) -> str:
    kept = [line.strip() for line in (text or "").splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-width:] or "it said nothing"


def scratch_prefix() -> str:
    """Of a directory of this process's, by which `remove_stale_scratch` knows whose it was."""
    return f"flexinfer-cell-{os.getpid()}-"


def remove_stale_scratch(parent: Path) -> None:
    """Remove scratch directories of cells whose process is gone: one killed outright leaves its
    own.
    """
    for path in abandoned(parent, "flexinfer-cell-"):
        shutil.rmtree(path, ignore_errors=True)
