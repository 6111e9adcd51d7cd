"""Curves over the memory budget: each system with its rounds and its label, and the bounds.

Bounds of systems differ by the memory of the process and the speed of the kernels. Drawn are
FlexInfer's own and the highest of the systems shown, which none of them can pass.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.figures.panels import Panel, curves_of, draw_panels
from experiments.figures.style import BOUND, GIB, LOOKS
from experiments.records import Record, bound_tokens_per_s


def throughput(records: Sequence[Record], title: str) -> Figure | None:
    """Throughput against memory, logarithmic, with the bounds: a panel for each model, its weights
    and device, small models first.
    """

    def draw(axes: Axes, panel: Panel) -> None:
        ends = draw_lines(axes, panel)
        draw_bounds(axes, panel)
        axes.axvline(1, label="size of the weights", color="#777777", linewidth=0.8)
        axes.set(ylabel="throughput [tokens/s]", yscale="log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.1, high * 1.1)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 4, 5, 7))
        )
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        label_ends(axes, ends)

    return draw_panels(records, title, curves_of(records), draw, size=(4.2, 3.1), share_x=True)


def overview(records: Sequence[Record], title: str, base: str = "llama-cpp-mmap") -> Figure | None:
    """`throughput` in one panel, FlexInfer and `base` alone: of the weights and device that have
    both in most budgets, without a limit first.
    """
    mine = [one for one in records if one.cell.system.name in ("flexinfer", base)]
    ours, theirs = (
        {one.place for one in mine if one.cell.system.name == name and one.status == "ok"}
        for name in ("flexinfer", base)
    )
    budgets = Counter(place[:3] for place in ours & theirs)
    best = max(budgets, key=lambda place: (budgets[place], place[2] == "native"), default=None)
    if best is None or budgets[best] < 2:  # no line
        return None
    return throughput([one for one in mine if one.place[:3] == best], title)


def shares(records: Sequence[Record], title: str) -> Figure | None:
    """Every system's throughput over its own bound, against memory, from 0: panels as in
    `throughput`.
    """

    def draw(axes: Axes, panel: Panel) -> None:
        ends = draw_lines(axes, panel, "ratio")
        axes.axhline(1, label="own bound", **BOUND)
        axes.set(ylabel="achieved / own bound", ylim=(0, None))
        label_ends(axes, ends)

    return draw_panels(records, title, curves_of(records), draw, size=(4.2, 3.1), share_x=True)


def draw_lines(
    axes: Axes, panel: Panel, column: str = "tokens_per_s"
) -> list[tuple[float, float, str, str]]:
    """A line through the medians of each system and a mark for every round.

    Returns where its label goes (x, y), label and colour.

    What did not run is named at the bottom with its status.
    """
    ends = []
    for system, part in panel.medians.groupby("system", sort=False):
        look, label = LOOKS[str(system)], str(part["label"].iloc[0])
        ok = part[part[column].notna()]
        axes.plot(
            panel.share(ok["budget_gib"]),
            ok[column],
            color=look.colour,
            linestyle=look.line,
            linewidth=1.2,
        )
        seen = panel.rounds[(panel.rounds["system"] == system) & panel.rounds[column].notna()]
        axes.scatter(panel.share(seen["budget_gib"]), seen[column], s=16, zorder=3, **look.mark)
        if len(ok):
            x = panel.share(ok["budget_gib"].max())
            ends.append((x, float(ok[column].iloc[-1]), label, look.colour))
        for _, row in part[part[column].isna()].iterrows():
            axes.annotate(
                f"{row['label']}: {row['status']}",
                (panel.share(row["budget_gib"]), 0.01),
                xycoords=("data", "axes fraction"),
                rotation=90,
                fontsize=6,
                va="bottom",
            )
    axes.set_xlabel("memory budget / size of the weights")
    return ends


def draw_bounds(axes: Axes, panel: Panel) -> None:
    """FlexInfer's own bound, and the highest of the systems shown (least process memory, fastest
    kernels), as curves over the budget.

    Of mixtures, whose bound depends on the bytes that a run missed, a line through the bounds of
    the budgets that were measured.
    """
    own = [one for one in panel.records if one.cell.system.name == "flexinfer"]
    labels = {one.cell.system.label for one in panel.records}
    for records, label, style in (
        (own, "bound of FlexInfer", "-"),
        (
            panel.records,
            "highest bound of any" if len(labels) > 1 else f"bound of {labels.pop()}",
            ":",
        ),
    ):
        curve = bound_curve(records, panel)
        if not curve.empty:
            axes.plot(
                curve.index,
                curve,
                label=label,
                color="black",
                linewidth=0.9,
                linestyle=style,
                zorder=1,
            )


def bound_curve(records: Sequence[Record], panel: Panel) -> pd.Series:
    """The highest bound of `records`' systems in tokens/s, by budget as a share of the weights."""
    budgets = panel.medians["budget_gib"]
    known = [one for one in records if one.bound_tokens_per_s]
    if any(one.missed_bytes is not None for one in known):
        names = {one.cell.system.name for one in known}
        bounds = (
            panel.medians[panel.medians["system"].isin(names)].groupby("budget_gib")["bound"].max()
        )
        return bounds.dropna().set_axis(panel.share(bounds.dropna().index.to_series()).to_numpy())
    by_system: dict[str, list[Record]] = defaultdict(list)
    for one in known:
        by_system[one.cell.system.name].append(one)
    low, high = budgets.min(), budgets.max()
    if low == high:  # a line through one point would not be seen
        low, high = 0.9 * low, 1.1 * high
    places = [low + (high - low) * step / 200 for step in range(201)]
    curves = [
        [
            bound_tokens_per_s(
                found[0].total_weight_bytes or 0,
                int(budget * GIB)
                - min((one.process_bytes or 0) + (one.kv_bytes or 0) for one in found),
                max(one.bandwidth_bytes_per_s or 0.0 for one in found),
                min(one.compute_s_per_pass or float("inf") for one in found),
            )
            for budget in places
        ]
        for found in by_system.values()
    ]
    highest = [max(values) for values in zip(*curves, strict=True)]
    return pd.Series(
        highest, index=[panel.share(place) for place in places[: len(highest)]], dtype=float
    )


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each label right of its place (`draw_lines`), pushed apart where they would touch.

    A label with lines to its right goes below its mark.
    """
    if not ends:
        return
    right = max(x for x, _, _, _ in ends)
    assert isinstance(axes.figure, Figure)
    axes.figure.draw_without_rendering()  # the layout decides how high a panel is
    below = float("-inf")
    apart = 8 * axes.figure.dpi / 72
    for x, y, label, colour in sorted(ends, key=lambda end: end[1]):
        offset = (0.0, -10.0)
        if right - x < 0.01:
            _, at_y = axes.transData.transform((x, y))
            below = max(at_y, below + apart)
            offset = (6.0, (below - at_y) * 72 / axes.figure.dpi)
        axes.annotate(
            label,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            fontsize=7,
            color=colour,
            va="center",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )
