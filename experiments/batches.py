"""What several sequences at a time give, from the records of +exp=ours/batches: a table and a
figure. It measures nothing.

Beside each stands what `flexinfer plan --batch` said under the same limits, before the run, and the
bound of one sequence, which no system passes that reads what it lacks for each token of each
sequence.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures import GIB
from experiments.figures.captions import finish
from experiments.figures.style import BOUND
from experiments.records import Record

MEASURED, PLANNED = "#0072B2", "#E69F00"


def table(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each model, budget and number of sequences, median of the rounds.

    Tokens/s of all sequences together.
    """
    rows = []
    for one in records:
        if one.status != "ok" or one.cell.workload.batch is None:
            continue
        count = one.cell.workload.batch
        planned = [batch for batch in one.engine["batches"] if batch["sequences"] == count]
        rows.append(
            {
                "model": one.cell.model.name,
                "weights": one.cell.system.format,
                "device": one.cell.device.name,
                "budget_gib": one.cell.budget_bytes / GIB,
                "sequences": count,
                "tokens_per_s": one.tokens_per_s,
                "planned": planned[0]["tokens_per_s"] if planned else None,
                "streamed_mb": one.engine["plan"]["streamed_bytes"] / 1e6,
                "bound": one.bound_tokens_per_s if count == 1 else None,
            }
        )
    keys = ["model", "weights", "device", "budget_gib", "sequences"]
    if not rows:
        return pd.DataFrame()
    data = pd.DataFrame(rows).groupby(keys).median(numeric_only=True).reset_index()
    data["bound"] = data.groupby(keys[:-1])["bound"].transform("max")  # that of one sequence
    data["times_bound"] = data["tokens_per_s"] / data["bound"]
    return data


def figure(records: Sequence[Record], title: str) -> Figure | None:
    """Tokens per second by the number of sequences, measured and planned, a panel for each model
    and budget.
    """
    data = table(records)
    if data.empty:
        return None
    panels = list(data.groupby(["model", "weights", "device", "budget_gib"], sort=False))
    drawn, grid = plt.subplots(
        1, len(panels), figsize=(1.2 + 3.6 * len(panels), 3.2), layout="constrained", squeeze=False
    )
    for axes, ((model, weights, device, budget), part) in zip(grid[0], panels, strict=True):
        axes.plot(part["sequences"], part["planned"], "--", color=PLANNED, label="planned")
        axes.plot(part["sequences"], part["tokens_per_s"], "o-", color=MEASURED, label="FlexInfer")
        axes.axhline(part["bound"].iloc[0], label="bound of one sequence", **BOUND)
        axes.set(
            title=f"{model} {weights}, {device}, {budget:.2f} GiB",
            xlabel="sequences",
            ylim=(0, None),
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(part["sequences"], [str(count) for count in part["sequences"]])
    grid[0][0].set_ylabel("tokens/s, of all sequences")
    grid[0][-1].legend()
    drawn.suptitle(title)
    ran = [one for one in records if one.status == "ok"]
    return finish(
        drawn,
        ran,
        shows=f"Marks are medians of the rounds; n = {len({one.cell.round for one in ran})}",
    )
