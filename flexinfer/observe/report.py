"""What a load and a run amount to, in one line each: for the log (logger "flexinfer") and the
command line.

`bottleneck` is pure: two readings of `Engine.stats()` and the plan in, a sentence out. It names
what most of the time went into; the paper's equation 4 has two candidates, reading and computing,
and this adds what a machine short of memory does to both. It does not look for causes outside this
process.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexinfer.plan.plan import Plan
from flexinfer.sizes import format_size

logger = logging.getLogger("flexinfer")

# Share of the time from which memory is named first; our choice.
MEMORY_SHARE = 0.2

COUNTERS = (
    "passes",
    "pass_s",
    "compute_s",
    "wait_s",
    "bytes_read",
    "wasted_bytes",
    "resyncs",
    "major_faults",
    "memory_stall_s",
)

# Time of a major fault on a busy disk; our choice.
FAULT_S = 1e-3

# Of the measured bandwidth, below which reads are said not to overlap; our choice.
OVERLAP_SHARE = 0.7
# Titles of the stages of progress.
TITLES = {
    "verify": "making checksums",
    "load": "reading what stays",
    "pass": "reading the prompt",
    "draft": "making the draft",
}

# Colours of the parts of a budget, on a terminal and in a figure.
PART_COLOURS = {
    "process": "#9e9e9e",
    "tokenizer": "#7f7f7f",
    "parameters that stay": "#5f5f5f",
    "KV cache": "#1f77b4",
    "activations": "#17becf",
    "margin": "#c7c7c7",
    "window": "#ffbf00",
    "unused": "#eeeeee",
    "draft": "#e377c2",
    "cache of experts": "#9467bd",
    "locked weights": "#2ca02c",
}


def budget_parts(plan: Plan) -> dict[str, int]:
    """Where the budget goes, in bytes; the parts add up to it."""
    overheads = plan.overheads
    parts = {
        "process": overheads.process_bytes,
        "tokenizer": overheads.tokenizer_bytes,
        "parameters that stay": overheads.unstreamed_bytes,
        "KV cache": overheads.kv_bytes + overheads.attention_bytes,
        "activations": overheads.activation_bytes,
        "margin": overheads.margin_bytes,
        "window": plan.window_bytes,
        "unused": plan.unused_bytes,
    }
    if plan.substitute_bytes or overheads.draft_bytes:
        parts["draft"] = plan.substitute_bytes + overheads.draft_bytes
    if plan.experts is not None:
        parts["cache of experts"] = plan.experts.cache_bytes
    return parts | {"locked weights": plan.budget_bytes - sum(parts.values())}


def plan_line(plan: Plan) -> str:
    """Where the budget goes, and the speed to expect."""
    streamed = (
        f"{format_size(plan.streamed_bytes)} streamed a pass through a window of "
        f"{format_size(plan.window_bytes)}"
        if plan.streamed_bytes
        else "nothing streamed"
    )
    experts = plan.experts
    cached = (
        f", {format_size(experts.cache_bytes)} for {format_size(experts.total_bytes)} of experts "
        f"({experts.hit_rate:.0%} hits expected)"
        if experts is not None
        else ""
    )
    one_a_pass = (
        f"{plan.predicted_tokens_per_s:.3g} tokens/s predicted, at most "
        f"{plan.bound_tokens_per_s:.3g}"
    )
    if plan.draft is None:
        speed = one_a_pass
    else:
        draft = plan.draft
        kept = f" ({format_size(plan.substitute_bytes)} in {draft.type})" if draft.type else ""
        speed = (
            f"draft by {draft.kind}{kept}: {draft.candidates} candidates, "
            f"{draft.tokens_per_pass:.3g} tokens a pass, {draft.predicted_tokens_per_s:.3g} "
            f"tokens/s predicted; one a pass: {one_a_pass}"
        )
    return (
        f"budget {format_size(plan.budget_bytes)}: {format_size(plan.locked_bytes)} of weights "
        f"locked{cached}, {streamed}; {speed}"
    )


def bottleneck(before: dict[str, Any], after: dict[str, Any], plan: Plan) -> str:
    """Why the passes between two readings of `Engine.stats()` took as long as they did: "disk:
    ...", "kernels: ...", "memory: ..." or "order: ..." (the readers had to start over), with the
    figure.
    """
    spent = {name: after[name] - before[name] for name in COUNTERS}
    passes, pass_s, bytes_read = spent["passes"], spent["pass_s"], spent["bytes_read"]
    if not passes or not pass_s:
        return "nothing: no pass over the weights yet"
    faults, stall_s = spent["major_faults"], spent["memory_stall_s"]
    if max(faults * FAULT_S, stall_s) > MEMORY_SHARE * pass_s:
        stalled = f"{stall_s / pass_s:.0%} of the time stalled for memory, " if stall_s else ""
        return (
            f"memory: {stalled}{faults} major page faults in {passes} passes; the system takes "
            "pages from this process and reads them again: a smaller budget, or fewer other "
            "programs"
        )
    in_vain_bytes = spent["wasted_bytes"]
    if in_vain_bytes > MEMORY_SHARE * bytes_read and not spent["resyncs"]:
        return (
            f"order: {format_size(in_vain_bytes)} of {format_size(bytes_read)} were experts that "
            "were predicted and not used; Experiment(look_ahead=False) reads none"
        )
    if in_vain_bytes > MEMORY_SHARE * bytes_read:
        return (
            f"order: the readers were sent elsewhere {spent['resyncs']} times in {passes} passes "
            f"and read {format_size(in_vain_bytes)} of {format_size(bytes_read)} unused"
        )
    rate, measured = bytes_read / pass_s, plan.costs.bandwidth_bytes_per_s
    reads = f"reads at {rate / 1e9:.2f} GB/s of {measured / 1e9:.2f} GB/s measured"
    if spent["wait_s"] > spent["compute_s"]:
        remedy = (
            ""
            if rate > OVERLAP_SHARE * measured
            else "; more io_threads or a larger window may help"
        )
        return f"disk: waiting {spent['wait_s'] / pass_s:.0%} of the time, {reads}{remedy}"
    return f"kernels: computing {spent['compute_s'] / pass_s:.0%} of the time" + (
        f", {reads}" if plan.streamed_bytes else ", nothing to read"
    )


class Explainer:
    """Says why passes took as long as they did, and logs it for each text.

    stats and plan: as they are now.
    """

    def __init__(self, stats: Callable[[], dict[str, Any]], plan: Callable[[], Plan]) -> None:
        self._stats, self._plan = stats, plan
        self._before = stats()

    def explain(self) -> str:
        """Of the passes since the last call, or since loading: "disk: ..." (kernels, memory,
        order). Also logged.
        """
        before, self._before = self._before, self._stats()
        text = bottleneck(before, self._before, self._plan())
        logger.info("%s", text)
        return text

    def explain_last_text(self, least_passes: int = 2) -> None:
        """The same, if there were at least this many passes."""
        if self._stats()["passes"] >= self._before["passes"] + least_passes:
            self.explain()


def memory_stall_s(root: Path = Path("/")) -> float:
    """Seconds, since it was made, that tasks of this process's control group (v2) waited for
    memory; 0 where the kernel does not say. Other groups and the machine as a whole are left out:
    their shortage need not be ours.
    """
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        group = next(line for line in lines if line.startswith("0::")).removeprefix("0::/")
        pressure = (root / "sys/fs/cgroup" / group / "memory.pressure").read_text()
        some = next(line for line in pressure.splitlines() if line.startswith("some "))
        return int(some.rpartition("total=")[2]) / 1e6
    return 0.0
