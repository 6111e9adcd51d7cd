"""Figures and tables from records: one style for the whole repository. It measures nothing and writes no records.

Mechanism: records become a table (`frame`), a table becomes one row for each model, weights, device, budget and system (`summary`:
the median of the rounds, their least and greatest, and how many). Every drawing function takes records and returns a
matplotlib figure with units on its axes, y from 0 or logarithmic, the bound as a line, and a caption that says machine,
limits, rounds and commit. Records that must not meet in one figure are refused (`check_comparable`).
Bounds of systems differ by the memory of the process and the speed of the kernels. Drawn are FlexInfer's own and the highest
of the systems shown, which none of them can pass. Ratios are to each system's own bound.
"""

import gzip
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import pandas as pd
import seaborn
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from flexinfer.bench.records import (
    Record,
    bound_tokens_per_s,
    check_comparable,
    load_records,
    say_none,
    with_common_costs,
)
from flexinfer.observe.notebook import draw_pass, last_pass

GIB = 2**30
Shown = TypeVar("Shown")  # what a panel shows
Budgets = TypeVar("Budgets", float, pd.Series)


@dataclass(frozen=True, slots=True)
class Look:
    """How a system looks in every figure; marker, line and hatch tell it apart without colour."""

    colour: str
    marker: str
    line: str
    hatch: str

    @property
    def bar(self) -> dict[str, Any]:
        """What a bar of it is drawn with."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "black", "linewidth": 0.5}

    @property
    def mark(self) -> dict[str, Any]:
        """What a mark of it is drawn with; those that are lines alone have no edge."""
        filled = self.marker in Line2D.filled_markers
        edge = {"edgecolor": "black", "linewidth": 0.3} if filled else {"linewidth": 1.0}
        return {"color": self.colour, "marker": self.marker} | edge


LOOKS = {
    "flexinfer": Look("#0072B2", "o", "-", ""),
    "llama-cpp-mmap": Look("#D55E00", "s", "--", "//"),
    "llama-cpp-default": Look("#8C510A", "d", ":", "||"),
    "sync": Look("#E69F00", "^", "-.", ".."),
    "prefetch": Look("#56B4E9", "v", ":", "\\\\"),
    "unbalanced": Look("#CC79A7", "D", "--", "xx"),
    "attention-first": Look("#009E73", "P", "-.", "--"),
    "ffn-first": Look("#F0E442", "X", ":", "++"),
    "algorithm1": Look("#999999", "*", "-", "oo"),
    "transformers": Look("#882255", "p", "--", "OO"),
    "accelerate": Look("#44AA99", "h", "-.", "**"),
    "airllm": Look("#DDCC77", "<", ":", "\\|"),
    "ollm": Look("#555555", ">", ":", "-/"),
    "without-look-ahead": Look("#117733", "H", "--", "x."),
    "sync-2": Look("#B35806", ".", ":", "..."),
    "sync-unbalanced": Look("#FDB863", "|", "-.", "xxx"),
    "llama-cpp-random": Look("#A6761D", "_", ":", "///"),
    "readers-1": Look("#9ECAE1", "1", "--", "-."),
    "readers-4": Look("#4292C6", "2", "-.", "+."),
    "readers-8": Look("#08519C", "3", ":", "o."),
    "window-10": Look("#C7E9C0", "4", "--", "|."),
    "window-40": Look("#74C476", "+", "-.", "/."),
    "window-80": Look("#238B45", "x", ":", "\\."),
    "window-3-layers": Look("#00441B", "8", "--", "*."),
}
# One mechanism of the paper's after another, and what figure 5 calls it.
ABLATION = {
    "sync-unbalanced": "synchronous unbalanced",
    "unbalanced": "+ prefetching",
    "attention-first": "+ balanced locking",
    "algorithm1": "+ Algorithm 1",
}
ROUND: dict[str, Any] = {"s": 10, "color": "white", "edgecolor": "black", "linewidth": 0.6, "zorder": 3}
LINES = "Lines join the medians of the rounds, marks are the rounds; n = {n}"
MEDIANS = "Marks are medians of the rounds; n = {n}"
BOUND: dict[str, Any] = {"color": "black", "linewidth": 1.2, "linestyle": (0, (6, 2))}


def use_style() -> None:
    """Sets the style of the figures of this repository; notebooks call it once."""
    own = {
        "figure.dpi": 110,
        "savefig.dpi": 200,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": "#dddddd",
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "flexinfer",
    }
    seaborn.set_theme(context="paper", style="whitegrid", font="DejaVu Sans", rc=own)


def find_records(results_dir: Path, command: str, tokens: str = "one by one") -> dict[str, list[Record]]:
    """The records below `results_dir` that may stand in one figure, by machine: the one with most records first.

    `tokens`: "one by one"; "drafts": of real or replayed text (flexinfer.bench.drafts); "batches": of several sequences
    (flexinfer.bench.batches). They are in no figure together.
    Those of the smoke model only where there are no others. Says which command makes records where there are none. Cells
    that have a limited record are shown without their unlimited ones. B and c of the bounds are a machine's (`with_common_costs`).
    """
    records = load_records(results_dir) if results_dir.exists() else []
    records = [one for one in records if _tokens(one) == tokens]
    records = [one for one in records if one.cell.model.name != "smoke"] or records
    if not records:
        say_none(results_dir, command)
    machines: dict[str, list[Record]] = defaultdict(list)
    for one in records:
        machines[one.provenance.machine].append(one)
    largest_first = sorted(machines.items(), key=lambda one: (-len(one[1]), one[0]))
    return {machine: with_common_costs(_limited(machine, found)) for machine, found in largest_first}


def _tokens(record: Record) -> str:
    workload = record.cell.workload
    if workload.batch is not None:
        return "batches"
    return "drafts" if workload.texts or workload.replayed else "one by one"


def of_systems(found: Mapping[str, Sequence[Record]], systems: Collection[str]) -> dict[str, list[Record]]:
    """Of every machine the records of `systems`, without those of the experiments that have budgets of their own, and without what was measured in one
    budget on a device of its own (mapped, devices)."""
    kept = {}
    for machine, records in found.items():
        mine = [
            one
            for one in records
            if one.cell.system.name in systems
            and one.cell.experiment not in ("targets", "resident", "moe", "exact")
        ]
        budgets = Counter(place[:3] for place in {one.place for one in mine})
        kept[machine] = [
            one
            for one in mine
            if one.cell.experiment not in ("mapped", "devices") or budgets[one.place[:3]] > 1
        ]
    return kept


def _limited(machine: str, records: list[Record]) -> list[Record]:
    """`records` without the unlimited ones, where there are others; those that never ran stay."""
    ran = [one for one in records if one.status in ("ok", "killed", "timeout")]
    unlimited = {one.run_id for one in ran if one.limits.method == "unlimited"}
    if not 0 < len(unlimited) < len(ran):
        return records
    print(
        f"{machine}: {len(unlimited)} records without limits are left out beside {len(ran) - len(unlimited)} with"
    )
    return [one for one in records if one.run_id not in unlimited]


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each record, with what figures need."""
    return pd.DataFrame(
        [
            {
                "model": one.cell.model.name,
                "weights": one.weights,
                "device": one.cell.device.name,
                "budget_bytes": one.cell.budget_bytes,
                "budget_gib": one.cell.budget_bytes / GIB,
                "system": one.cell.system.name,
                "label": one.cell.system.label,
                "round": one.cell.round,
                "status": one.status,
                "tokens_per_s": one.tokens_per_s if one.status == "ok" else None,
                "bound": one.bound_tokens_per_s,
                "ratio": one.ratio if one.status == "ok" else None,
                "peak_gib": one.peak_memory_bytes / GIB if one.peak_memory_bytes else None,
                "bytes_per_token": sum(one.token_bytes) / one.tokens
                if one.tokens and one.token_bytes
                else None,
                "weights_gib": (one.total_weight_bytes + (one.untouched_bytes or 0)) / GIB
                if one.total_weight_bytes
                else None,
                "tokens": one.tokens,
            }
            for one in records
            if not one.cell.trace
        ],
        columns=[
            *(
                "model",
                "weights",
                "device",
                "budget_bytes",
                "budget_gib",
                "system",
                "label",
                "round",
                "status",
            ),
            *(
                "tokens_per_s",
                "bound",
                "ratio",
                "peak_gib",
                "bytes_per_token",
                "weights_gib",
                "tokens",
            ),
        ],
    )


def summary(data: pd.DataFrame) -> pd.DataFrame:
    """One row for each model, weights, device, budget and system: median, least and greatest of the rounds, and their number.

    `ratio` is to the system's own bound (its process, its kernels), `best` to the highest bound of the systems there: what
    the smallest process with the fastest kernels could do.
    """
    keys = ["model", "weights", "device", "budget_bytes", "budget_gib", "system", "label"]
    numbers = ("tokens_per_s", "bound", "ratio", "peak_gib", "weights_gib")
    grouped = data.astype(dict.fromkeys(numbers, float)).groupby(keys, sort=True)
    table = grouped.agg(
        tokens_per_s=("tokens_per_s", "median"),
        low=("tokens_per_s", "min"),
        high=("tokens_per_s", "max"),
        n=("tokens_per_s", "count"),
        bound=("bound", "median"),
        ratio=("ratio", "median"),
        peak_gib=("peak_gib", "max"),
        weights_gib=("weights_gib", "max"),
        status=("status", lambda found: "ok" if "ok" in set(found) else found.iloc[-1]),
    ).reset_index()
    highest = table.groupby(["model", "weights", "device", "budget_bytes"])["bound"].transform("max")
    table["best"] = table["tokens_per_s"] / highest
    order = {name: place for place, name in enumerate(LOOKS)}
    return table.sort_values(
        ["model", "weights", "device", "budget_bytes", "system"],
        key=lambda s: s.map(order) if s.name == "system" else s,
    )


def show_table(table: pd.DataFrame) -> pd.DataFrame:
    """`summary` for people: rounded, with units in the heads."""
    shown = table[
        [
            "model",
            "weights",
            "device",
            "budget_gib",
            "label",
            "tokens_per_s",
            "low",
            "high",
            "n",
            "bound",
            "ratio",
            "best",
            "peak_gib",
            "status",
        ]
    ]
    heads = {
        "budget_gib": "budget GiB",
        "label": "system",
        "tokens_per_s": "tokens/s",
        "peak_gib": "peak GiB",
        "bound": "own bound tokens/s",
        "ratio": "of own bound",
        "best": "of the best bound",
    }
    return shown.rename(columns=heads).round(3).reset_index(drop=True)


def why_faster(records: Iterable[Record], base: str = "llama-cpp-mmap") -> pd.DataFrame:
    """Of FlexInfer over `base` where both read: the gain as a product, fewer bytes times faster reading. Medians over rounds.

    A system that reads the whole time has tokens/s = bytes/s / bytes per token; so has any other, by the bytes/s it comes to.
    """
    data = frame(records)
    data = data[(data["status"] == "ok") & (data["bytes_per_token"] > 0)]
    keys = ["model", "weights", "device", "budget_gib"]
    medians = data.groupby([*keys, "system"])[["tokens_per_s", "bytes_per_token"]].median().unstack()
    if not {"flexinfer", base} <= set(data["system"]):
        return pd.DataFrame()
    speed, nbytes = medians["tokens_per_s"], medians["bytes_per_token"]
    table = pd.DataFrame(
        {
            "gain": speed["flexinfer"] / speed[base],
            "fewer bytes": nbytes[base] / nbytes["flexinfer"],
            "read, GB/s": speed["flexinfer"] * nbytes["flexinfer"] / 1e9,
            "read by the other, GB/s": speed[base] * nbytes[base] / 1e9,
        }
    )
    table["faster reading"] = table["read, GB/s"] / table["read by the other, GB/s"]
    return table.dropna().reset_index()


def side_by_side(
    found: Mapping[str, Sequence[Record]], model: str, device: str, budgets_gib: Collection[float]
) -> pd.DataFrame:
    """For machines to be compared, a column for each: tokens/s of every system in those budgets, and from the least to the greatest round."""
    columns = {}
    for name, records in found.items():
        table = summary(frame(records)).dropna(subset="tokens_per_s")
        table = table.assign(budget=table["budget_gib"].round(2))
        mine = table[
            (table["model"] == model) & (table["device"] == device) & table["budget"].isin(budgets_gib)
        ]
        if len(mine):
            rows = mine.set_index(["weights", "budget", "label"])
            columns[name] = rows.apply(_with_rounds, axis=1)
    return pd.DataFrame(columns).rename_axis(["weights", "budget GiB", "system"]).fillna("")


def coverage(found: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """What was measured, a column for each machine: of every model, weights and device how many budgets and systems, and how many rounds."""
    columns: dict[str, dict[tuple[str, ...], str]] = {}
    for name, records in found.items():
        for _, part in _parts(records):
            place = tuple(part.iloc[0][["model", "weights", "device"]])
            rounds = _span(sorted(part["n"]))
            counts = (
                f"{part['budget_bytes'].nunique()} budgets, {part['system'].nunique()} systems, n = {rounds}"
            )
            columns.setdefault(name, {})[place] = counts
    return pd.DataFrame(columns).rename_axis(["model", "weights", "device"]).sort_index().fillna("")


def _with_rounds(row: pd.Series) -> str:
    rounds = f" ({row['low']:.2f} to {row['high']:.2f}, n={row['n']})" if row["n"] > 1 else ""
    return f"{row['tokens_per_s']:.2f}{rounds}"


def caption(records: Sequence[Record], extra: str = "", shows: str = LINES) -> str:
    """Machine, limits, rounds and commit of what a figure shows; `shows`: what its marks are, {n} for the number of rounds."""
    first = records[0]
    methods = ", ".join(
        sorted(
            {
                f"cgroup {one.limits.method}" if one.limits.method.startswith("v") else one.limits.method
                for one in records
            }
        )
    )
    rates = sorted({f"{one.cell.device.name} {_rate(one)}" for one in records})
    commits = sorted(
        {one.provenance.git_commit[:8] + ("+" if one.provenance.git_dirty else "") for one in records}
    )
    engines = sorted({one.provenance.engine for one in records})
    days = sorted({one.provenance.started.date().isoformat() for one in records})
    counted = [one.tokens for one in records if one.status == "ok"]
    tokens = f"{_span(counted)} tokens counted a cell" if counted else ""
    parts = [
        f"{first.provenance.machine}; Linux {first.provenance.kernel}, {first.provenance.file_system}"
        + "".join(f"; {name.replace('_', ' ')} {value}" for name, value in first.provenance.about.items())
        + ".",
        f"Memory and read limits: {methods}; device {', '.join(rates)}.",
        f"{shows.format(n=_rounds(records))}; {tokens}.",
        f"FlexInfer {', '.join(engines)}, commit {', '.join(commits)}; {' to '.join(dict.fromkeys((days[0], days[-1])))}.",
        extra,
    ]
    return " ".join(part for part in parts if part)


def _rate(record: Record) -> str:
    rate = record.cell.device.read_bytes_per_s
    return f"({rate / 1e6:.0f} MB/s)" if rate else "(no limit)"


def _rounds(records: Sequence[Record]) -> str:
    counts = [count for count in summary(frame(records))["n"] if count] or [1]
    return _span(counts)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def finish(figure: Figure, records: Sequence[Record], extra: str = "", shows: str = LINES) -> Figure:
    """Refuses records that must not meet, and puts the caption below."""
    check_comparable(records)
    text = caption(records, extra, shows)
    width = int(figure.get_figwidth() * 17)
    words, lines = text.split(), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"{word} "
    figure.text(0.01, -0.01, "\n".join(lines), fontsize=7, va="top", color="#333333")
    return figure


def save(figure: Figure | None, results_dir: Path, name: str, machine: str) -> None:
    """Saves a figure in results/figures as SVG; the notebook that drew it has it as a raster."""
    if figure is None:
        return
    folder = results_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_name(name, short_names(results_dir).get(machine, machine))
    figure.savefig(folder / f"{stem}.svg", bbox_inches="tight", metadata={"Date": None})


def file_name(name: str, machine: str) -> str:
    """The file name of a figure of one machine, without ending: letters, digits and hyphens."""
    return f"{name}-{re.sub('[^a-z0-9]+', '-', machine.lower())}"


def short_names(results_dir: Path) -> dict[str, str]:
    """Of machines, what figures' files are called after: results/machines.json; the others go by their whole name."""
    file = results_dir / "machines.json"
    names: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return names


def shared_legend(figure: Figure, title: str) -> None:
    """One legend above all panels, each system once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found, loc="outside upper center", ncols=5, title=title)


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel of curves shows: records of one model, its weights and device, by round and as medians."""

    records: list[Record]
    rounds: pd.DataFrame  # of `frame`
    medians: pd.DataFrame  # of `summary`

    @property
    def weights_gib(self) -> float:
        return float(self.medians["weights_gib"].max())

    def share(self, budget_gib: Budgets) -> Budgets:
        """Budgets as shares of the weights."""
        return budget_gib / self.weights_gib


def draw_lines(axes: Axes, panel: Panel, column: str = "tokens_per_s") -> list[tuple[float, float, str, str]]:
    """A line through the medians of each system and a mark for every round; returns where its label goes (x, y), label and colour.

    What did not run is named at the bottom with its status.
    """
    ends = []
    for system, part in panel.medians.groupby("system", sort=False):
        look, label = LOOKS[str(system)], str(part["label"].iloc[0])
        ok = part[part[column].notna()]
        axes.plot(
            panel.share(ok["budget_gib"]), ok[column], color=look.colour, linestyle=look.line, linewidth=1.2
        )
        seen = panel.rounds[(panel.rounds["system"] == system) & panel.rounds[column].notna()]
        axes.scatter(
            panel.share(seen["budget_gib"]),
            seen[column],
            s=16,
            zorder=3,
            **look.mark,
        )
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
    """FlexInfer's own bound, and the highest of the systems shown (least process memory, fastest kernels), as curves over the budget.

    Of mixtures, whose bound depends on the bytes that a run missed, a line through the bounds of the budgets that were measured.
    """
    own = [one for one in panel.records if one.cell.system.name == "flexinfer"]
    labels = {one.cell.system.label for one in panel.records}
    for records, label, style in (
        (own, "bound of FlexInfer", "-"),
        (panel.records, "highest bound of any" if len(labels) > 1 else f"bound of {labels.pop()}", ":"),
    ):
        curve = bound_curve(records, panel)
        if not curve.empty:
            axes.plot(
                curve.index, curve, label=label, color="black", linewidth=0.9, linestyle=style, zorder=1
            )


def bound_curve(records: Sequence[Record], panel: Panel) -> pd.Series:
    """The highest bound of `records`' systems in tokens/s, by the budget as a share of the weights."""
    budgets = panel.medians["budget_gib"]
    known = [one for one in records if one.bound_tokens_per_s]
    if any(one.missed_bytes is not None for one in known):
        names = {one.cell.system.name for one in known}
        bounds = panel.medians[panel.medians["system"].isin(names)].groupby("budget_gib")["bound"].max()
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
                int(budget * GIB) - min((one.process_bytes or 0) + (one.kv_bytes or 0) for one in found),
                max(one.bandwidth_bytes_per_s or 0.0 for one in found),
                min(one.compute_s_per_pass or float("inf") for one in found),
            )
            for budget in places
        ]
        for found in by_system.values()
    ]
    highest = [max(values) for values in zip(*curves, strict=True)]
    return pd.Series(highest, index=[panel.share(place) for place in places[: len(highest)]], dtype=float)


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each label right of its place (`draw_lines`), pushed apart where they would touch; a label with lines to its right goes below its mark."""
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


def throughput(records: Sequence[Record], title: str) -> Figure | None:
    """Throughput against memory, logarithmic, with the bounds: a panel for each model, its weights and device, small models first."""

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

    return _panels(records, title, _curves(records), draw, size=(4.2, 3.1), share_x=True)


def overview(records: Sequence[Record], title: str, base: str = "llama-cpp-mmap") -> Figure | None:
    """`throughput` in one panel, FlexInfer and `base` alone: of the weights and device that have both in most budgets, without a limit first."""
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
    """Every system's throughput over its own bound, against memory, from 0: panels as in `throughput`."""

    def draw(axes: Axes, panel: Panel) -> None:
        ends = draw_lines(axes, panel, "ratio")
        axes.axhline(1, label="own bound", **BOUND)
        axes.set(ylabel="achieved / own bound", ylim=(0, None))
        label_ends(axes, ends)

    return _panels(records, title, _curves(records), draw, size=(4.2, 3.1), share_x=True)


def _curves(records: Sequence[Record]) -> list[tuple[str, Panel]]:
    """A panel for each model, weights and device, with its name; small models first."""
    panels = []
    for name, medians in _parts(records):
        places = set(zip(medians["model"], medians["weights"], medians["device"], strict=True))
        mine = [one for one in records if one.place[:3] in places]
        panels.append((name, Panel(mine, frame(mine), medians)))
    return panels


def _parts(records: Sequence[Record]) -> list[tuple[str, pd.DataFrame]]:
    """The summary of each model, weights and device, with their name; small models first."""
    groups = summary(frame(records)).groupby(["model", "weights", "device"], sort=False)
    parts = [(", ".join(name), part) for name, part in groups]
    return sorted(parts, key=lambda one: (one[1]["weights_gib"].max(), one[0]))


def _panels(
    records: Sequence[Record],
    title: str,
    panels: Sequence[tuple[str, Shown]],
    draw: Callable[[Axes, Shown], None],
    columns: int | None = None,
    size: tuple[float, float] = (3.5, 3.1),
    share_x: bool = False,
    extra: str = "",
    shows: str = LINES,
) -> Figure | None:
    """Each of `panels`, a name and what it shows, drawn by `draw`, each of `size` inches: `columns` in a line; None: up to three, as evenly as may be.
    `extra`, `shows`: of the caption."""
    if not panels:
        return None
    if columns is None:
        columns = -(-len(panels) // -(-len(panels) // 3))  # four as two and two
    lines = -(-len(panels) // columns)
    figsize = (size[0] * max(columns, 2), size[1] * lines + 0.5)
    figure, grid = plt.subplots(lines, columns, figsize=figsize, squeeze=False, layout="constrained")
    for axes, (name, part) in zip(grid.flat, panels, strict=False):
        draw(axes, part)
        axes.set_title(name)
    if share_x:
        lows, highs = zip(*(axes.get_xlim() for axes in grid.flat[: len(panels)]), strict=True)
        for axes in grid.flat[: len(panels)]:
            axes.set_xlim(min(lows), max(highs))
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    shared_legend(figure, title)
    return finish(figure, records, extra, shows)


def bars(
    records: Sequence[Record], title: str, extra: str = "", base: str = "llama-cpp-mmap"
) -> Figure | None:
    """Throughput of many systems at few budgets, as bars: a panel for each budget, from the top `base`, the ABLATION, other systems, FlexInfer. Before a
    bar stand its system, how many times `base` it is, where that was measured, and its rounds; every round is a mark, the highest bound a line. `extra` ends the caption."""
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
        axes.set(xlabel="throughput [tokens/s]", xlim=(0, 1.15 * max(highest, panel.medians["high"].max())))
        axes.grid(axis="y", visible=False)

    panels = [
        (
            f"{name}, {budget:.2f} GiB",
            Panel(panel.records, panel.rounds[panel.rounds["budget_gib"] == budget], mine),
        )
        for name, panel in _curves(records)
        for budget, mine in panel.medians.groupby("budget_gib")
    ]
    shows = "Bars are medians of the rounds, marks the rounds; n stands before each bar"
    return _panels(records, title, panels, draw, size=(4.2, 2.6), extra=extra, shows=shows)


def prefills(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each model, weights, device, system and length of a prompt: seconds of prefill over all rounds, tokens/s beside it."""
    rows = [
        {
            "model": one.cell.model.name,
            "weights": one.weights,
            "device": one.cell.device.name,
            "system": one.cell.system.name,
            "label": one.cell.system.label,
            "prompt_tokens": tokens,
            "prefill_s": seconds,
        }
        for one in records
        if one.status == "ok"
        for tokens, found in one.prefill_s.items()
        for seconds in found
    ]
    keys = ["model", "weights", "device", "system", "label", "prompt_tokens"]
    data = pd.DataFrame(rows, columns=[*keys, "prefill_s"]).astype({"prefill_s": float})
    return data.groupby(keys)["prefill_s"].agg(["median", "min", "max", "count"]).reset_index()


def residents(records: Sequence[Record], title: str) -> Figure | None:
    """With everything in memory: tokens/s, and prompt tokens per second of prefill, as bars: a line of panels for each model."""
    lengths = prefills(records)
    if lengths.empty:
        return None
    panels = []
    for name, part in _parts(records):
        speeds = part.assign(value=part["tokens_per_s"], low=part["low"], high=part["high"])
        panels.append((f"{name}: decoding", speeds))
        model, weights, device = part.iloc[0][["model", "weights", "device"]]
        same = lengths[(lengths[["model", "weights", "device"]] == [model, weights, device]).all(axis=1)]
        for tokens, timed in same.groupby("prompt_tokens"):
            rates = {"value": "median", "low": "max", "high": "min"}
            rates_of = timed.assign(**{name: tokens / timed[column] for name, column in rates.items()})
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
    shows = "Bars are medians: of the rounds (decoding, n = {n}), of all repeats (prefill); whiskers the least and the greatest"
    return _panels(records, title, panels, draw, columns=columns, size=(3.0, 2.6), shows=shows)


def agreements(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each pair of systems in each record of flexinfer.bench.agreement, with the perplexity of both."""
    rows = [
        {
            "CPU": line["provenance"]["cpu"],
            "commit": line["provenance"]["git_commit"][:8],
            "file": line["file"],
            "positions": line["positions"],
            "system": pair["of"],
            "beside": pair["against"],
            "same top token": pair["top1_equal"],
            "mean KL [nats]": pair["mean_kl"],
            "largest KL": pair["max_kl"],
            "perplexity": line["perplexity"][pair["of"]],
            "perplexity beside": line["perplexity"][pair["against"]],
        }
        for line in lines
        for pair in line["pairs"]
    ]
    return pd.DataFrame(rows)


def _bar(axes: Axes, place: int, system: str, label: str, value: float, low: float, high: float) -> None:
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


def load_events(results_dir: Path, record: Record) -> list[dict[str, Any]]:
    """The events of a traced record, from the file beside its records."""
    folder = results_dir / record.cell.experiment
    events: list[dict[str, Any]] = json.loads(
        gzip.decompress((folder / str(record.events_file)).read_bytes())
    )
    return events


def timelines(records: Sequence[Record], results_dir: Path) -> Figure | None:
    """Figure 3: reads, waits and kernels of one pass, unbalanced locking above balanced, at the largest budget with both."""
    locking = {"unbalanced": "unbalanced locking", "flexinfer": "balanced locking"}  # from the top down
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
        len(traced), 1, figsize=(10, 2.1 * len(traced)), squeeze=False, sharex=True, layout="constrained"
    )
    for record, axes in zip(traced, grid[:, 0], strict=True):
        events = last_pass(load_events(results_dir, record))
        length, waited = draw_pass(axes, events)
        told = f"{locking[record.cell.system.name]}: {length:.2f} s a token, of which {waited:.2f} s waiting"
        if record.bound_tokens_per_s:
            bound_s = 1 / record.bound_tokens_per_s
            axes.axvline(bound_s, **BOUND)
            told += f"; the bound is {bound_s:.2f} s (dashed)"
        axes.set_title(told, loc="left")
    grid[-1][0].set_xlabel("time within one token [s]")
    grid[-1][0].set_xlim(left=0)
    extra = f"Budget {traced[0].cell.budget_bytes / GIB:.2f} GiB, {traced[0].cell.model.name}; the last token of each run."
    return finish(figure, traced, extra, "One run each")


def against_bound(records: Sequence[Record], title: str) -> Figure | None:
    """Achieved throughput over the bound for every cell, both logarithmic: on the diagonal nothing is left to gain."""
    table = summary(frame(records)).dropna(subset=["tokens_per_s", "bound"])
    if table.empty:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4.4), layout="constrained")
    for system, part in table.groupby("system", sort=False):
        look = LOOKS[str(system)]
        axes.scatter(
            part["bound"],
            part["tokens_per_s"],
            label=part["label"].iloc[0],
            s=30,
            **look.mark,
        )
    values = pd.concat([table["bound"], table["tokens_per_s"]])
    ends = [values.min() / 1.3, values.max() * 1.3]
    axes.plot(ends, ends, label="bound", **BOUND)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal", title=title)
    axes.set(xlabel="bound 1 / max(c, (S - R) / B) [tokens/s]", ylabel="achieved [tokens/s]")
    figure.legend(loc="outside right upper")
    return finish(figure, records, shows=MEDIANS)
