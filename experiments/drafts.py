"""What drafts give beside the bound of one token a pass, from the records of +exp=ours/past: a
table and a figure. It measures nothing.

Each system is held against one bound, that of the run without a draft in the same budget: 1 /
max(c, (S - R) / B), which no system passes that takes a pass for every token. A drafted text may
differ from the one without from the first position on where two tokens are as good as equal; the
table gives that position's margin between the two logits.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.figures import GIB
from experiments.figures.captions import finish
from experiments.figures.style import BOUND
from experiments.records import Record

PLAIN = "flexinfer"  # the system without a draft
# How each system looks, on every machine: colour and hatch.
LOOKS = {
    PLAIN: ("#0072B2", ""),
    "draft-lookup": ("#E69F00", "//"),
    "draft-q2_k": ("#56B4E9", ".."),
    "draft-q4_0": ("#CC79A7", "xx"),
    "draft-iq4_nl": ("#009E73", "\\\\"),
    "draft-q5_1": ("#F0E442", "++"),
    "draft-q8_0": ("#882255", "--"),
    "draft-auto": ("#999999", "oo"),
}


def _model(record: Record) -> str:
    return f"{record.cell.model.name} in {record.weights}"


def _text(record: Record, kind: str) -> str:
    """The kind of text.

    Of a replay how many of the tokens a draft has right, for replays of several are apart.
    """
    runs = record.cell.workload.replayed
    return f"replayed, {sum(runs) / (sum(runs) + len(runs)):.0%} right" if runs else kind


def table(records: Sequence[Record]) -> pd.DataFrame:
    """A row for each model, budget, system and kind of text: the texts of a kind together, median
    of the rounds.
    """
    plain = {
        (_model(one), one.cell.budget_bytes, one.cell.round): one
        for one in records
        if one.cell.system.name == PLAIN and one.status == "ok"
    }
    rows: list[dict[str, Any]] = []
    for one in records:
        beside = plain.get((_model(one), one.cell.budget_bytes, one.cell.round))
        if one.status != "ok" or beside is None:
            continue
        for kind, texts in one.engine["texts"].items():
            seconds, tokens = (sum(text[name] for text in texts) for name in ("seconds", "tokens"))
            passes, speed = sum(text["passes"] for text in texts), tokens / seconds
            found = [
                difference(a, b)
                for a, b in zip(texts, beside.engine["texts"].get(kind, []), strict=False)
            ]
            margins = [margin for margin in found if margin is not None]
            predicted = texts[-1]["predicted_tokens_per_s"]
            rows.append(
                {
                    "model": _model(one),
                    "device": one.cell.device.name,
                    "budget_gib": one.cell.budget_bytes / GIB,
                    "system": one.cell.system.name,
                    "label": one.cell.system.label,
                    "text": _text(one, kind),
                    "tokens_per_s": speed,
                    "tokens_per_pass": tokens / passes,
                    "accepted": sum(text.get("accepted", 0) for text in texts),
                    "drafted": sum(text.get("drafted", 0) for text in texts),
                    "bound": beside.bound_tokens_per_s,
                    "times_bound": speed / beside.bound_tokens_per_s
                    if beside.bound_tokens_per_s
                    else None,
                    "predicted": predicted / (texts[-1]["tokens"] / texts[-1]["seconds"])
                    if predicted
                    else None,
                    "texts": len(texts),
                    "differ": len(margins),
                    "margin": max(margins, default=None),
                }
            )
    keys = ["model", "device", "budget_gib", "system", "label", "text"]
    data = pd.DataFrame(rows)
    return data.groupby(keys, sort=False).median(numeric_only=True).reset_index() if rows else data


def difference(ours: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """The margin, without a draft, of the first token in which two texts differ.

    None where they do not.
    """
    for one, other, margin in zip(ours["answer"], plain["answer"], plain["margins"], strict=False):
        if one != other:
            return float(margin)
    return None


def figure(records: Sequence[Record], title: str) -> Figure | None:
    """Tokens per second of each system by budget, a panel for each model and kind of text, with the
    bound of one token a pass.
    """
    data = table(records)
    if data.empty:
        return None
    panels = list(data.groupby(["model", "device", "text"], sort=False))
    drawn, grid = plt.subplots(
        1, len(panels), figsize=(1 + 3.2 * len(panels), 3.4), layout="constrained", squeeze=False
    )
    systems = list(dict.fromkeys(data["system"]))
    width = 0.8 / len(systems)
    for axes, ((model, device, kind), part) in zip(grid[0], panels, strict=True):
        budgets = sorted(part["budget_gib"].unique())
        for number, system in enumerate(systems):
            own = part[part["system"] == system]
            axes.bar(
                [
                    budgets.index(budget) + (number + 0.5) * width - 0.4
                    for budget in own["budget_gib"]
                ],
                own["tokens_per_s"],
                width,
                label=own["label"].iloc[0] if len(own) else system,
                color=LOOKS[system][0],
                hatch=LOOKS[system][1],
                edgecolor="black",
                linewidth=0.4,
            )
        for place, budget in enumerate(budgets):
            bound = part[part["budget_gib"] == budget]["bound"].iloc[0]
            axes.plot(
                [place - 0.42, place + 0.42],
                [bound, bound],
                label="bound" if not place else None,
                **BOUND,
            )
        axes.set(title=f"{model}, {device}\n{kind}", xlabel="budget [GiB]", ylim=(0, None))
        axes.set_xticks(range(len(budgets)), [f"{budget:.2f}" for budget in budgets])
    grid[0][0].set_ylabel("tokens/s")
    drawn.suptitle(title)
    handles, labels = grid[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside right upper")
    ran = [one for one in records if one.status == "ok"]
    rounds = len({one.cell.round for one in ran})
    return finish(
        drawn,
        ran,
        shows=f"Bars are medians of the rounds, all texts of a kind together; n = {rounds}",
    )


def runs_of(record: Record, kind: str) -> list[int]:
    """Tokens in a row that the draft had right before each that it had not, in the texts of one
    kind: for `workload.replayed`.

    A pass that accepts all of its candidates ends no run, and neither does the end of a text.
    """
    runs: list[int] = []
    for text in record.engine["texts"][kind]:
        run = 0
        for count, candidates in zip(
            text["tokens_of_passes"], text["candidates_of_passes"], strict=True
        ):
            run += count - 1
            if count - 1 < candidates:
                runs.append(run)
                run = 0
            else:
                run += 1  # the model's own token after them, which the draft may have said too
    return runs
