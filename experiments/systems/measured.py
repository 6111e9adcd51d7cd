"""The process that measures one system: `python -P measured.py`, the job as JSON on stdin.

It pins itself to its cores, imports one system's libraries, loads the model, decodes greedily from
a fixed prompt of token ids, and appends one JSON line per event to a file, so that a run that is
killed leaves what it had. When all is decoded, prefills are timed, if the workload has any: each
length PREFILL_REPEATS times, every one from an empty cache to the first token, with logits of the
last position alone. It does not limit itself: the groups are the parent's (experiments.cell).
"""

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.systems.bandwidth import WAYS_TO_READ, measure_bandwidth
from experiments.systems.interface import (
    System,
    UnsupportedError,
    bytes_read,
    prompt_ids,
    resident_bytes,
)
from experiments.systems.llamacpp import LlamaCpp
from experiments.systems.on_torch import OLLM, Accelerate, AirLLM, FlexInfer, TorchSystem

INSTALL = "make baselines"
PREFILL_REPEATS = 3
SYSTEMS: dict[str, Callable[[dict[str, Any]], System]] = {
    "flexinfer": FlexInfer,
    "llama_cpp": LlamaCpp,
    "transformers": TorchSystem,
    "accelerate": Accelerate,
    "airllm": AirLLM,
    "ollm": OLLM,
}


def measure(job: dict[str, Any], emit: Callable[..., None]) -> None:
    """Load one system and decode until the workload has enough; one event for each pass."""
    system = SYSTEMS[job["kind"]](job)
    if job["batch"] > 1 and not isinstance(system, TorchSystem):
        raise UnsupportedError("a batch is decoded by flexinfer and transformers alone")
    if job["predict"] and isinstance(system, FlexInfer):
        system.predict()
    emit("ready", process_bytes=resident_bytes())
    start_s = time.perf_counter()
    system.load()
    emit("loaded", load_s=time.perf_counter() - start_s)
    if job["texts"] or job["replayed"]:
        measure_texts(job, system, emit)
        return
    text = prompt_ids(job["prompt_tokens"] + job["tokens"], job["vocab"])
    system.start(text[: job["prompt_tokens"]])
    counted, counted_s, before = 0, 0.0, dict[str, int]()
    for number in range(job["tokens"]):
        before_bytes, start_s = bytes_read(), time.perf_counter()
        tokens = system.step()
        seconds = time.perf_counter() - start_s
        count = number > job["warmup_tokens"]  # the first step takes the prompt in
        told = {"id": tokens[0]} if len(tokens) == 1 else {"ids": tokens}
        emit("token", **told, s=seconds, bytes=bytes_read() - before_bytes, counted=count)
        if job["drawn"]:
            system.take(text[job["prompt_tokens"] + number])
        if not count:
            before = system.counters()
        counted, counted_s = counted + count, counted_s + seconds * count
        if counted and counted_s >= job["max_seconds"]:
            break
        if counted >= job["min_tokens"] and counted_s >= job["min_seconds"]:
            break
    emit("counted", told={name: value - before[name] for name, value in system.counters().items()})
    for tokens in job["prefill_tokens"]:
        for _ in range(PREFILL_REPEATS):
            system.start(prompt_ids(tokens, job["vocab"]))
            start_s = time.perf_counter()
            system.step()
            emit("prefill", tokens=tokens, s=time.perf_counter() - start_s)
    emit("engine", told=system.engine())
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    emit("done", bytes_read=bytes_read(), peak_bytes=peak_bytes)
    system.close()


def measure_texts(job: dict[str, Any], system: System, emit: Callable[..., None]) -> None:
    """Decode real or replayed text by `generate()`.

    What drafts give is in the engine's word, by kind of text.
    """
    if not isinstance(system, FlexInfer):
        raise UnsupportedError("texts are decoded by flexinfer alone")
    texts = importlib.import_module("experiments.texts")
    job["prompt_ids"] = prompt_ids(job["prompt_tokens"], job["vocab"])
    found = texts.decode(system.model, job, emit, bytes_read)
    emit("engine", told=system.engine() | {"texts": found})
    emit(
        "done",
        bytes_read=bytes_read(),
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )
    system.close()


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it dies."""
    import ctypes

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> int:
    _die_with_parent()
    job = json.loads(sys.stdin.read())
    os.sched_setaffinity(0, job["core_set"])
    with open(job["events"], "a", buffering=1) as file:

        def emit(event: str, **fields: Any) -> None:
            file.write(json.dumps({"event": event, **fields}) + "\n")

        try:
            if job["kind"] == "bandwidth":
                rates = {
                    f"{threads} x {nbytes >> 20} MiB": measure_bandwidth(
                        job["files"], job["seconds"], threads, nbytes
                    )
                    for threads, nbytes in WAYS_TO_READ
                }
                emit("bandwidth", bytes_per_s=rates)
            elif job["kind"] == "split":
                AirLLM(job).split()
                emit("done", bytes_read=bytes_read())
            else:
                measure(job, emit)
        except ModuleNotFoundError as error:
            emit(
                "failed",
                status="missing",
                message=f"{error.name} is not installed; {INSTALL} installs it",
            )
        except UnsupportedError as error:
            emit("failed", status="unsupported", message=str(error))
        except Exception as error:
            emit("failed", status="error", message=f"{type(error).__name__}: {error}")
            raise
    return 0


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # libraries may hang in their own tear-down; everything measured is written
