"""Bars of systems at few budgets (figure 5) and of models in memory.

All cells against their bound.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.captions import finish
from experiments.figures.panels import Panel, curves_of, draw_panels
from experiments.figures.style import ABLATION, BOUND, LOOKS, MEDIANS, ROUND
from experiments.figures.tables import frame, parts_of, prefills, summary
from experiments.records import Record


def bars(
    records: Sequence[Record], title: str, extra: str = "", base: str = "llama-cpp-mmap"
) -> Figure | None:
    """Throughput of many systems at few budgets, as bars: a panel for each budget, from the top
    `base`, the ABLATION, other systems, FlexInfer. Before a bar stand its system, how many times
    `base` it is, where that was measured, and its rounds; every round is a mark, the highest bound
    a line. `extra` ends the caption.
    """
    below = [one for one in LOOKS if one not in (base, *ABLATION, "flexinfer")]
    looks = [base, *ABLATION, *below, "flexinfer"]

    def draw(axes: Axes, panel: Panel) -> None:
        rows = panel.medians.set_index("system")
        order = sorted(rows.index, key=looks.index, reverse=True)  # from the bottom up
        told, names = rows["tokens_per_s"].get(base), []
        for place, system in enumerate(order):
            row = rows.loc[system]
            value = row["tokens_per_s"]
            axes.barh(place, value, 0.75, **LOOKS[system].bar)
            every = panel.rounds[panel.rounds["system"] == system]["tokens_per_s"].dropna()
            axes.scatter(every, [place] * len(every), **ROUND)
            times = f"{value / told:.2f}x, " if told and system != base else ""
            names.append(f"{ABLATION.get(system, row['label'])}, {times}n={row['n']}")
        highest = panel.medians["bound"].max()
        axes.axvline(highest, label="highest bound", **BOUND)
        axes.set_yticks(range(len(order)), names, fontsize=7)
        axes.set(
            xlabel="throughput [tokens/s]",
            xlim=(0, 1.15 * max(highest, panel.medians["high"].max())),
        )
        axes.grid(axis="y", visible=False)

    panels = [
        (
            f"{name}, {budget:.2f} GiB",
            Panel(panel.records, panel.rounds[panel.rounds["budget_gib"] == budget], mine),
        )
        for name, panel in curves_of(records)
        for budget, mine in panel.medians.groupby("budget_gib")
    ]
    shows = "Bars are medians of the rounds, marks the rounds; n stands before each bar"
    return draw_panels(records, title, panels, draw, size=(4.2, 2.6), extra=extra, shows=shows)


def residents(records: Sequence[Record], title: str) -> Figure | None:
    """With everything in memory: tokens/s, and prompt tokens per second of prefill, as bars: a line
    of panels for each model.
    """
    lengths = prefills(records)
    if lengths.empty:
        return None
    panels = []
    for name, part in parts_of(records):
        speeds = part.assign(value=part["tokens_per_s"], low=part["low"], high=part["high"])
        panels.append((f"{name}: decoding", speeds))
        model, weights, device = part.iloc[0][["model", "weights", "device"]]
        same = lengths[
            (lengths[["model", "weights", "device"]] == [model, weights, device]).all(axis=1)
        ]
        for tokens, timed in same.groupby("prompt_tokens"):
            rates = {"value": "median", "low": "max", "high": "min"}
            rates_of = timed.assign(
                **{name: tokens / timed[column] for name, column in rates.items()}
            )
            panels.append((f"prefill of {tokens} tokens", rates_of))

    def draw(axes: Axes, part: pd.DataFrame) -> None:
        order = sorted(set(part["system"]), key=list(LOOKS).index)
        for system, row in part.set_index("system").iterrows():
            _bar(
                axes,
                order.index(str(system)),
                str(system),
                row["label"],
                row["value"],
                row["low"],
                row["high"],
            )
        axes.set(ylabel="[tokens/s]", ylim=(0, None))
        axes.set_xticks([])

    columns = 1 + lengths["prompt_tokens"].nunique()
    shows = (
        "Bars are medians: of the rounds (decoding, n = {n}), of all repeats (prefill); whiskers "
        "the least and the greatest"
    )
    return draw_panels(records, title, panels, draw, columns=columns, size=(3.0, 2.6), shows=shows)


def _bar(
    axes: Axes, place: int, system: str, label: str, value: float, low: float, high: float
) -> None:
    """One system's bar, from the least to the greatest round."""
    axes.bar(
        place,
        value,
        0.9,
        yerr=[[value - low], [high - value]],
        capsize=3,
        **LOOKS[system].bar,
        label=label,
    )


def against_bound(records: Sequence[Record], title: str) -> Figure | None:
    """Achieved throughput over the bound for every cell, both logarithmic: on the diagonal nothing
    is left to gain.
    """
    table = summary(frame(records)).dropna(subset=["tokens_per_s", "bound"])
    if table.empty:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for system, part in table.groupby("system", sort=False):
        look = LOOKS[str(system)]
        axes.scatter(
            part["bound"], part["tokens_per_s"], label=part["label"].iloc[0], s=30, **look.mark
        )
    values = pd.concat([table["bound"], table["tokens_per_s"]])
    ends = [values.min() / 1.3, values.max() * 1.3]
    axes.plot(ends, ends, label="bound", **BOUND)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=title)
    axes.set(xlabel="bound 1 / max(c, (S - R) / B) [tokens/s]", ylabel="achieved [tokens/s]")
    figure.legend(loc="outside right upper")
    return finish(figure, records, shows=MEDIANS)
