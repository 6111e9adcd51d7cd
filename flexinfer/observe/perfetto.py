"""The timeline of a run as a file for https://ui.perfetto.dev (or chrome://tracing): the JSON
trace-event format.

Tracks: one for each reader thread (its reads), one for each thread that computed (its passes, and
within them waits and kernels, named by layer and tensor), and counters of memory: budget, locked,
window and resident bytes.

Times are whole microseconds, cut off below: where spans of one thread touch or nest in the run they
do so in the file, and Perfetto drops those that half overlap. For the same reason a span is written
before those within it.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flexinfer.cache_dir import user_path
from flexinfer.observe.trace import COUNTERS, Event

# Of the decoder layer, and what stands before it in a tensor's name.
BLOCK_NUMBER = re.compile(r"^.*?\.\d+\.")


def write_trace(path: Path, timeline: Iterable[Event]) -> None:
    """Write `timeline` to `path`, which appears when it is complete.

    Raises OSError where it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            separator = ""
            for entry in trace_events(timeline):
                file.write(separator + json.dumps(entry, separators=(",", ":")))
                separator = ",\n"
            file.write("\n]}\n")
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def trace_events(timeline: Iterable[Event]) -> Iterator[dict[str, Any]]:
    """Entries of the trace-event format: names of the tracks, then spans and counters in the order
    of their begin.
    """
    events = sorted(timeline, key=lambda event: (event.start_s, -event.stop_s))
    pid = os.getpid()
    yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": {"name": "flexinfer"}}
    computing = {event.thread for event in events if event.kind in ("pass", "wait", "compute")}
    threads = computing | {event.thread for event in events if event.kind == "read"}
    track_of = {
        name: i for i, name in enumerate(sorted(threads, key=lambda n: (n not in computing, n)), 1)
    }
    for name, track in track_of.items():
        label = f"compute ({name})" if name in computing else name
        yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": track, "args": {"name": label}}
        yield {
            "ph": "M",
            "name": "thread_sort_index",
            "pid": pid,
            "tid": track,
            "args": {"sort_index": track},
        }
    for event in events:
        start_us, stop_us = (
            int((t - events[0].start_s) * 1e6) for t in (event.start_s, event.stop_s)
        )
        if event.kind in COUNTERS:
            value = {"bytes": event.bytes}
            yield {
                "ph": "C",
                "name": event.kind,
                "pid": pid,
                "tid": 1,
                "ts": start_us,
                "args": value,
            }
            continue
        if event.kind == "pass":
            name, details = "pass", dict[str, Any](tokens=event.bytes)
        else:
            name = f"{event.kind} {_short(event)}"
            details = {"tensor": event.tensor, "layer": event.layer, "bytes": event.bytes}
        yield {
            "ph": "X",
            "cat": event.kind,
            "name": name,
            "pid": pid,
            "tid": track_of[event.thread],
            "ts": start_us,
            "dur": stop_us - start_us,
            "args": details,
        }


def _short(event: Event) -> str:
    """The layer and the tensor's name within it: "3 self_attn.q_proj"; the whole name where there
    is no layer.
    """
    name = event.tensor.removesuffix(".weight")
    within = BLOCK_NUMBER.sub("", name)
    return f"{event.layer} {within}" if within != name else name


def check_trace(trace: bool | str | Path) -> None:
    """Raises ValueError, before a long run, where the file of `trace` cannot be written."""
    if isinstance(trace, bool):
        return
    path = user_path(trace)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(
            f"trace={str(trace)!r} cannot be written; name a file in a directory that can"
        )
