"""Figure 3: the timelines of traced cells."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.figures.captions import finish
from experiments.figures.style import BOUND, GIB
from experiments.records import Record
from flexinfer.observe.notebook import draw_pass, last_pass


def load_events(results_dir: Path, record: Record) -> list[dict[str, Any]]:
    """The events of a traced record, from the file beside its records."""
    folder = results_dir / record.cell.experiment
    events: list[dict[str, Any]] = json.loads(
        gzip.decompress((folder / str(record.events_file)).read_bytes())
    )
    return events


def timelines(records: Sequence[Record], results_dir: Path) -> Figure | None:
    """Figure 3: reads, waits and kernels of one pass, unbalanced locking above balanced, at the
    largest budget with both.
    """
    # From the top down.
    locking = {"unbalanced": "unbalanced locking", "flexinfer": "balanced locking"}
    groups: dict[tuple[str, str, str, int], dict[str, Record]] = {}
    for one in records:
        if one.events_file and one.status == "ok" and one.cell.system.name in locking:
            groups.setdefault(one.place, {}).setdefault(one.cell.system.name, one)
    best = max(groups, key=lambda one: (len(groups[one]), one[2]), default=None)
    complete = {} if best is None else groups[best]
    traced = [complete[system] for system in locking if system in complete]
    if not traced:
        return None
    figure, grid = plt.subplots(
        len(traced),
        1,
        figsize=(10, 2.1 * len(traced)),
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for record, axes in zip(traced, grid[:, 0], strict=True):
        events = last_pass(load_events(results_dir, record))
        length, waited = draw_pass(axes, events)
        told = (
            f"{locking[record.cell.system.name]}: {length:.2f} s a token, of which {waited:.2f} s "
            "waiting"
        )
        if record.bound_tokens_per_s:
            bound_s = 1 / record.bound_tokens_per_s
            axes.axvline(bound_s, **BOUND)
            told += f"; the bound is {bound_s:.2f} s (dashed)"
        axes.set_title(told, loc="left")
    grid[-1][0].set_xlabel("time within one token [s]")
    grid[-1][0].set_xlim(left=0)
    extra = (
        f"Budget {traced[0].cell.budget_bytes / GIB:.2f} GiB, {traced[0].cell.model.name}; the "
        "last token of each run."
    )
    return finish(figure, traced, extra, "One run each")
