"""Tables and figures of what `results/reliability` holds: soaks, budgets that follow, fuzzing.

It runs and writes nothing but figures.

One JSON Lines file for each kind: `soak.jsonl` and `large.jsonl` (tests.stress.soak),
`pressure.jsonl` (tests.stress.pressure), `fuzz.jsonl` (tests.stress.fuzz). Every line carries the
provenance of its run.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures import LOOKS
from experiments.record_files import RELIABILITY, load_lines
from experiments.records import Provenance

MIB, GIB = 2**20, 2**30
COMMANDS = {
    "soak": "make soak",
    "large": "python -m tests.stress.soak --large --record results/reliability/large.jsonl",
    "pressure": "python -m tests.stress.pressure MODEL",
    "fuzz": "make fuzz",
}


def load(results_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of one kind, oldest first. Says which command makes them where there are none."""
    return load_lines(results_dir / RELIABILITY / f"{kind}.jsonl", COMMANDS[kind])


def soak_table(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A row for each family: cases by outcome, calls by outcome, how full the groups were, how near
    the plan came to the peak.

    Of a case that was run again, after it had ended badly, the last run.
    """
    rows = []
    for one in {(one["case"]["seed"], one["case"]["number"]): one for one in records}.values():
        calls = one.get("outcomes", [])
        ended = "peak_bytes" in one
        rows.append(
            {
                "family": one["case"]["family"],
                "cases": 1,
                **{
                    bad: one["outcome"] == bad
                    for bad in ("killed", "wrong", "hung", "leak", "error")
                },
                "calls": calls.count("ok"),
                "refused": calls.count("refused"),
                "group peak / budget": one["group_peak_bytes"] / one["memory_bytes"]
                if ended
                else None,
                "peak / plan": one["peak_bytes"] / one["explained_bytes"] if ended else None,
                "growth [MiB]": growth_bytes(one) / MIB if ended else None,
            }
        )
    data = pd.DataFrame(rows)
    counted = ["cases", "killed", "wrong", "hung", "leak", "error", "calls", "refused"]
    measured = ["group peak / budget", "peak / plan", "growth [MiB]"]
    table = data.groupby("family")[counted].sum()
    table.loc["all"] = table.sum()
    spread = data.groupby("family")[measured].agg(["median", "max"])
    spread.loc["all"] = data[measured].agg(["median", "max"]).T.stack()
    spread.columns = [f"{name}, {what}" for name, what in spread.columns]
    return table.join(spread.round(3))


def growth_bytes(record: dict[str, Any]) -> float:
    """What a process held more after its last call than in the middle of them.

    Nothing to say of a case that was resized.
    """
    resting = record["resting_bytes"]
    resized = any(call["kind"] == "resize" for call in record["case"]["calls"])
    return math.nan if resized else resting[-1] - resting[len(resting) // 2]


def machine(record: dict[str, Any]) -> str:
    """The machine that a line is of, named as in all other records."""
    return Provenance.model_validate(record["provenance"]).machine


def pressure_figure(record: dict[str, Any]) -> Figure:
    """Budget, memory of the process and tokens/s by the second, while a neighbour takes memory and
    returns it.
    """
    tokens, marks = pd.DataFrame(record["tokens"]), record["marks"]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.6), height_ratios=(3, 2))
    look = LOOKS["flexinfer"]
    above.step(tokens.t_s, tokens.budget_bytes / GIB, where="post", color="black", label="budget")
    above.plot(
        tokens.t_s, tokens.process_bytes / GIB, color=look.colour, label="process, anonymous memory"
    )
    above.step(
        tokens.t_s,
        tokens.locked_bytes / GIB,
        where="post",
        color=look.colour,
        linestyle=":",
        label="locked weights",
    )
    above.axhline(record["memory_bytes"] / GIB, color="#999999", linewidth=0.8, label="the group")
    above.set_ylabel("memory [GiB]")
    bins = pd.Series(1.0, index=pd.to_timedelta(tokens.t_s, unit="s")).resample("2s").sum() / 2
    below.step(bins.index.total_seconds(), bins.to_numpy(), where="post", color=look.colour)
    below.set_ylabel("tokens/s")
    below.set_xlabel("time [s]")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.axvspan(marks["takes_s"], marks["has_s"], color="#D55E00", alpha=0.25, linewidth=0)
        axes.axvspan(marks["has_s"], marks["returned_s"], color="#D55E00", alpha=0.12, linewidth=0)
    taken = f"a neighbour takes {record['take_bytes'] / GIB:.2g} GiB, keeps it, returns it"
    above.text(
        marks["takes_s"],
        above.get_ylim()[1] * 1.01,
        taken,
        color="#D55E00",
        fontsize=8,
        va="bottom",
    )
    above.legend(loc="lower left", fontsize=8, ncols=2)
    facts = record["provenance"]
    figure.text(
        0.01,
        0.0,
        f'{record["model"]}, memory="auto", follow=True. {facts["cpu"]}, {facts["cores"]} cores. '
        f"Commit {facts['git_commit'][:8]}.",
        fontsize=7,
        va="top",
    )
    figure.tight_layout()
    return figure
