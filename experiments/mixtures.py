"""Tables and figures of mixtures of experts: cells of `+exp=ours/moe`, and policies of the cache on
recorded routings. It runs nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.expert_misses import HINDSIGHT
from experiments.record_files import QUALITY, load_lines
from experiments.records import Record

COMMAND = "python -m experiments.routing MODEL --record results/quality/routing.jsonl"
STYLES = {
    HINDSIGHT: ("black", "--"),
    "recency": ("#0072b2", "-"),
    "frequency": ("#d55e00", "-"),
    "fixed": ("#009e73", "-"),
}


def experts_table(records: Iterable[Record]) -> pd.DataFrame:
    """A row for each model, device, budget and system that ran: medians over rounds.

    GB are of one counted pass.
    """
    groups: dict[tuple[str, str, int, str], list[Record]] = {}
    for one in records:
        if one.status == "ok" and one.untouched_bytes:
            key = (
                one.cell.model.name,
                one.cell.device.name,
                one.cell.budget_bytes,
                one.cell.system.label,
            )
            groups.setdefault(key, []).append(one)
    rows = []
    for (model, device, budget_bytes, system), found in sorted(groups.items()):
        rows.append(
            {
                "model": model,
                "device": device,
                "budget GiB": budget_bytes / 2**30,
                "system": system,
                "tokens/s": median(one.tokens_per_s or 0.0 for one in found),
                "of own bound": _median(one.ratio for one in found),
                "hit rate": _median(one.hit_rate for one in found),
                "read GB": _median(sum(one.token_bytes) / one.passes / 1e9 for one in found),
                "of them in vain GB": _median(_per_pass(one, "wasted_bytes", 1e9) for one in found),
                "foretold": _median(_per_pass(one, "experts_foretold") for one in found),
                "foretold right": _median(
                    _per_pass(one, "experts_foretold_right") for one in found
                ),
                "rounds": len(found),
            }
        )
    return pd.DataFrame(rows)


def _per_pass(record: Record, name: str, unit: float = 1.0) -> float | None:
    count = record.counted.get(name)
    return None if count is None else count / record.passes / unit


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def load_routings(results_dir: Path) -> list[dict[str, Any]]:
    """The lines of `experiments.routing`, oldest first.

    Says which command makes them where there are none.
    """
    return load_lines(results_dir / QUALITY / "routing.jsonl", COMMAND)


def policies(lines: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Hit rate against the share of the experts in the cache, a panel for each routing, a line for
    each policy.
    """
    if not lines:
        return None
    figure, grid = plt.subplots(
        1,
        len(lines),
        figsize=(3.2 * len(lines), 3.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, line in zip(grid[0], lines, strict=True):
        for name, rates in line["hit_rates"].items():
            colour, style = STYLES[name]
            shares = [float(share) for share in rates]
            axes.plot(shares, list(rates.values()), style, color=colour, marker=".", label=name)
        axes.set_title(f"{line['name']}\n({line['kind']}, {line['tokens']} tokens)", fontsize=8)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="experts in the cache, share")
    grid[0][0].set_ylabel("hits, share of uses")
    grid[0][-1].legend(loc="lower right", fontsize=8)
    return figure
