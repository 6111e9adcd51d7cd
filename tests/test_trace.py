"""The timeline of a run: complete, bounded, and a file that Perfetto takes."""

import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from flexinfer.memory.process import resident_bytes
from flexinfer.observe.perfetto import trace_events
from flexinfer.observe.trace import KINDS, RECORD, SPANS, Event, Ring, Trace
from tests.conftest import Load, MakeCheckpoint, prompt, resize_to_share


def test_the_oldest_events_go_first() -> None:
    trace = Trace(max_events=5)
    for i in range(12):
        trace.add("read", f"tensor {i}", i, float(i), i)
    assert [event.tensor for event in trace.timeline()] == [f"tensor {i}" for i in range(7, 12)]
    assert [event["bytes"] for event in trace.events()] == [7, 8, 9, 10, 11]


def test_an_event_comes_back_as_it_was() -> None:
    trace = Trace(max_events=3)
    trace.add("compute", "model.layers.7.mlp.up_proj.weight", 7, 1.25, 1 << 40)
    (event,) = trace.timeline()
    assert event.stop_s > event.start_s == 1.25
    assert event == Event(
        "compute",
        "model.layers.7.mlp.up_proj.weight",
        7,
        1.25,
        event.stop_s,
        1 << 40,
        threading.current_thread().name,
    )


def test_no_event_is_lost_when_many_threads_write() -> None:
    trace = Trace(max_events=4000)

    def write(name: str) -> None:
        for i in range(1000):
            trace.add("read", f"{name} {i}", 0, 0.0, i)

    threads = [threading.Thread(target=write, args=(f"{n}",), name=f"writer {n}") for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    events = list(trace.timeline())
    assert {(event.thread, event.tensor) for event in events} == {
        (f"writer {n}", f"{n} {i}") for n in range(4) for i in range(1000)
    }


def test_without_events_nothing_is_set_aside() -> None:
    trace = Trace()
    trace.add("wait", "x", 0, 0.0, 1)
    with trace.one_pass(1):
        pass
    assert trace.events() == list(trace.timeline()) == []
    assert trace.passes == 1
    assert trace.wait_s > 0


def test_the_ring_has_all_its_memory_from_the_beginning() -> None:
    trace = Trace(max_events=1000)
    assert trace._ring is not None
    before = len(trace._ring._records)
    for i in range(3000):
        trace.add("read", "x", 0, 0.0, i)
    assert len(trace._ring._records) == before == 1000 * RECORD.size


def test_progress_of_a_pass_reaches_its_end_and_begins_again() -> None:
    heard: list[tuple[str, int, int]] = []
    trace = Trace(progress=lambda *report: heard.append(report))
    trace.set_memory(100, 10, 10, 30)
    for _ in range(2):
        with trace.one_pass(1):
            for nbytes in (10, 20):
                trace.add("compute", "x", 0, 0.0, nbytes)
    assert heard == [("pass", 10, 30), ("pass", 30, 30)] * 2


def spans_by_track(entries: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    tracks: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["ph"] == "X":
            tracks.setdefault(entry["tid"], []).append(entry)
    return tracks


def check_format(entries: list[dict[str, Any]]) -> None:
    """What the trace-event format asks for; and, of the spans of one thread, what Perfetto does not
    drop: each is after the one before it or lies within it, in the order of the file.
    """
    for entry in entries:
        assert entry["ph"] in {"M", "X", "C"}
        assert isinstance(entry["name"], str)
        assert entry["name"]
        assert isinstance(entry["pid"], int)
        assert isinstance(entry["tid"], int)
        assert entry["tid"] > 0
        if entry["ph"] != "M":
            assert isinstance(entry["ts"], int)
            assert entry["ts"] >= 0
        if entry["ph"] == "X":
            assert isinstance(entry["dur"], int)
            assert entry["dur"] >= 0
        if entry["ph"] == "C":
            assert all(isinstance(value, int) for value in entry["args"].values())
    for spans in spans_by_track(entries).values():
        open_until: list[int] = []
        for span in spans:
            start, stop = span["ts"], span["ts"] + span["dur"]
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or stop <= open_until[-1], span
            open_until.append(stop)


def test_spans_that_touch_or_nest_do_so_in_whole_microseconds_too() -> None:
    """Rounding begin and duration on their own makes them half overlap by one: then Perfetto drops
    the second.
    """
    at = [round(i * 1.7e-6 + 5, 10) for i in range(400)]
    spans = [Event("wait", "x", 0, a, b, 1, "main") for a, b in itertools.pairwise(at)]
    passes = [Event("pass", "", 0, at[i], at[i + 3], 1, "main") for i in range(0, 396, 3)]
    entries = list(trace_events([*spans, *passes]))
    check_format(entries)
    assert sum(entry["ph"] == "X" for entry in entries) == len(spans) + len(passes)


@pytest.mark.parametrize("io_threads", [0, 2])
def test_a_trace_file_opens_in_perfetto(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, io_threads: int
) -> None:
    file = tmp_path / "run.json"
    model = load(checkpoint("llama"), trace=str(file), io_threads=io_threads, policy="none")
    model.generate(prompt(tokens=5), max_new_tokens=4, eos_token_id=None)
    budget_bytes, window_bytes = (
        model.flexinfer.plan.budget_bytes,
        model.flexinfer.plan.window_bytes,
    )
    resize_to_share(model, 0.5)
    smaller = model.flexinfer.plan
    model(prompt())
    assert not file.exists()
    model.flexinfer.close()
    assert [one.name for one in tmp_path.iterdir()] == ["run.json"]

    entries = json.loads(file.read_text())["traceEvents"]
    check_format(entries)
    track_of = {e["args"]["name"]: e["tid"] for e in entries if e["name"] == "thread_name"}
    tracks = spans_by_track(entries)
    compute = track_of.pop(f"compute ({threading.current_thread().name})")
    assert set(track_of) == {f"flexinfer-io-{i}" for i in range(io_threads)}
    for track in track_of.values():
        assert {span["cat"] for span in tracks[track]} == {"read"}
    own = {"pass", "wait", "compute"} | (set() if io_threads else {"read"})
    assert {span["cat"] for span in tracks[compute]} == own
    assert [s["args"]["tokens"] for s in tracks[compute] if s["cat"] == "pass"] == [5, 1, 1, 1, 7]
    names = {span["name"] for span in tracks[compute]}
    assert {"wait 3 mlp.down_proj", "compute 0 self_attn.q_proj", "compute lm_head"} <= names
    counters: dict[str, list[int]] = {}
    for entry in entries:
        if entry["ph"] == "C":
            counters.setdefault(entry["name"], []).append(entry["args"]["bytes"])
    assert set(counters) == {"budget", "locked", "window", "resident"}
    assert (counters["budget"][0], counters["budget"][-1]) == (budget_bytes, smaller.budget_bytes)
    assert (counters["locked"][0], counters["locked"][-1]) == (0, smaller.locked_bytes)
    assert (counters["window"][0], counters["window"][-1]) == (window_bytes, smaller.window_bytes)
    assert min(counters["resident"]) > 1 << 20


def test_events_in_memory_keep_their_fields_and_name_their_thread(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    model = load(checkpoint("llama"), trace=True, policy="none")
    model(prompt())
    model.flexinfer.close()
    events = model.flexinfer.events()
    fields = {"kind", "tensor", "layer", "start_s", "stop_s", "bytes", "thread"}
    assert all(event.keys() == fields for event in events)
    assert {event["kind"] for event in events} == set(SPANS) < set(KINDS)
    readers = {event["thread"] for event in events if event["kind"] == "read"}
    computing = {event["thread"] for event in events if event["kind"] != "read"}
    assert readers <= {"flexinfer-io-0", "flexinfer-io-1"}
    assert computing == {threading.current_thread().name}


def test_a_trace_that_cannot_be_written_is_refused_first(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    for bad in (tmp_path, tmp_path / "nowhere" / "run.json"):
        with pytest.raises(ValueError, match="trace="):
            load(checkpoint(), trace=bad)


def test_a_trace_whose_directory_has_gone_is_said_and_the_model_closes(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    model = load(checkpoint(), trace=tmp_path / "there" / "run.json", policy="none")
    model(prompt())
    (tmp_path / "there").rmdir()
    with pytest.warns(RuntimeWarning, match=r"trace could not be written.*run\.json"):
        model.flexinfer.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("flexinfer-io")]


def test_progress_tells_of_loading_and_of_each_pass(checkpoint: MakeCheckpoint, load: Load) -> None:
    heard: list[tuple[str, int, int]] = []
    model = load(checkpoint("llama"), progress=lambda *report: heard.append(report))
    norm_bytes = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n)
    assert {stage for stage, _, _ in heard} == {"load"}
    assert heard[-1] == ("load", norm_bytes, norm_bytes)
    resize_to_share(model, 0.3)
    plan = model.flexinfer.plan
    for _ in range(3):  # the first fills memory
        heard.clear()
        model(prompt(), logits_to_keep=1)
        assert {stage for stage, _, _ in heard} == {"pass"}
        assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
        assert heard[-1] == ("pass", plan.total_bytes, plan.total_bytes)


def test_the_ring_is_resident_before_the_first_event() -> None:
    """So that a plan, which measures the process, has counted it."""
    before = resident_bytes()
    ring = Ring(1_000_000)
    assert resident_bytes() - before > 0.9 * 1_000_000 * RECORD.size
    assert list(ring) == []
