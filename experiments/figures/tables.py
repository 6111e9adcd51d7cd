"""Tables of records: a row for each record (`frame`), and medians over the rounds (`summary`).

`summary` has a row for each model, weights, device, budget and system: the median of the rounds,
the least and the greatest, and how many. Ratios are to each system's own bound.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.figures.style import GIB, LOOKS
from experiments.records import Record


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
    """One row for each model, weights, device, budget and system: median, least and greatest of the
    rounds, and their number.

    `ratio` is to the system's own bound (its process, its kernels), `best` to the highest bound of
    the systems there: what the smallest process with the fastest kernels could do.
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
    highest = table.groupby(["model", "weights", "device", "budget_bytes"])["bound"].transform(
        "max"
    )
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
    """Of FlexInfer over `base` where both read: the gain as a product, fewer bytes times faster
    reading. Medians over rounds.

    A system that reads the whole time has tokens/s = bytes/s / bytes per token; so has any other,
    by the bytes/s it comes to.
    """
    data = frame(records)
    data = data[(data["status"] == "ok") & (data["bytes_per_token"] > 0)]
    keys = ["model", "weights", "device", "budget_gib"]
    medians = (
        data.groupby([*keys, "system"])[["tokens_per_s", "bytes_per_token"]].median().unstack()
    )
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
    """For machines to be compared, a column for each: tokens/s of every system in those budgets,
    and from the least to the greatest round.
    """
    columns = {}
    for name, records in found.items():
        table = summary(frame(records)).dropna(subset="tokens_per_s")
        table = table.assign(budget=table["budget_gib"].round(2))
        mine = table[
            (table["model"] == model)
            & (table["device"] == device)
            & table["budget"].isin(budgets_gib)
        ]
        if len(mine):
            rows = mine.set_index(["weights", "budget", "label"])
            columns[name] = rows.apply(_with_rounds, axis=1)
    return pd.DataFrame(columns).rename_axis(["weights", "budget GiB", "system"]).fillna("")


def coverage(found: Mapping[str, Sequence[Record]]) -> pd.DataFrame:
    """What was measured, a column for each machine: of every model, weights and device how many
    budgets and systems, and how many rounds.
    """
    columns: dict[str, dict[tuple[str, ...], str]] = {}
    for name, records in found.items():
        for _, part in parts_of(records):
            place = tuple(part.iloc[0][["model", "weights", "device"]])
            rounds = span(sorted(part["n"]))
            counts = (
                f"{part['budget_bytes'].nunique()} budgets, {part['system'].nunique()} systems, n "
                f"= {rounds}"
            )
            columns.setdefault(name, {})[place] = counts
    return pd.DataFrame(columns).rename_axis(["model", "weights", "device"]).sort_index().fillna("")


def parts_of(records: Sequence[Record]) -> list[tuple[str, pd.DataFrame]]:
    """The summary of each model, weights and device, with their name; small models first."""
    groups = summary(frame(records)).groupby(["model", "weights", "device"], sort=False)
    parts = [(", ".join(name), part) for name, part in groups]
    return sorted(parts, key=lambda one: (one[1]["weights_gib"].max(), one[0]))


def prefills(records: Iterable[Record]) -> pd.DataFrame:
    """One row for each model, weights, device, system and length of a prompt: seconds of prefill
    over all rounds, tokens/s beside it.
    """
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


def agreements(lines: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each pair of systems in each record of experiments.agreement, with the perplexity
    of both.
    """
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


def _with_rounds(row: pd.Series) -> str:
    rounds = f" ({row['low']:.2f} to {row['high']:.2f}, n={row['n']})" if row["n"] > 1 else ""
    return f"{row['tokens_per_s']:.2f}{rounds}"


def span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
