"""A loaded model in a notebook: a table of its plan, a picture of its last pass, progress bars.

Pure but for the bars, which tqdm.auto draws as the front end can. The picture needs matplotlib
(extra `bench`), nothing else does.
"""

import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from flexinfer.observe.report import PART_COLOURS, TITLES, budget_parts
from flexinfer.plan.plan import Plan
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from tqdm.auto import tqdm

SPAN_COLOURS = {"read": "#0072B2", "wait": "#F0E442", "compute": "#D55E00"}
WAIT_HATCH = "xx"

# What is done by then gets no bar; a text is many passes, so that only slow ones get one.
PATIENCE_S = {"pass": 3.0}
OTHER_PATIENCE_S = 0.5


def engine_html(plan: Plan, stats: dict[str, Any]) -> str:
    """A table: where the budget goes, and what the passes so far have come to."""
    parts, total = budget_parts(plan), plan.budget_bytes
    square = "<span style='color:{}'>&#9632;</span> "
    rows = [
        (
            square.format(PART_COLOURS[part]) + escape(part),
            format_size(nbytes),
            f"{nbytes / total:.0%}",
        )
        for part, nbytes in parts.items()
        if nbytes
    ]
    speed = f"{plan.predicted_tokens_per_s:.3g}, at most {plan.bound_tokens_per_s:.3g}"
    rows += [
        (
            "<b>read per token</b>",
            format_size(plan.streamed_bytes),
            f"of {format_size(plan.total_bytes)}",
        ),
        ("<b>tokens/s predicted</b>", speed, "one token a pass"),
        (
            "<b>context</b>",
            f"{plan.overheads.context_tokens} tokens",
            f"policy {escape(plan.policy)}",
        ),
    ]
    if plan.draft is not None:
        drafted = (
            f"{plan.draft.predicted_tokens_per_s:.3g}",
            f"{plan.draft.tokens_per_pass:.3g} tokens a pass",
        )
        rows.append((f"<b>with the draft</b>, {escape(plan.draft.kind)}", *drafted))
    if stats["passes"]:
        waited = f"{stats['wait_s'] / stats['pass_s']:.0%} of it waiting" if stats["pass_s"] else ""
        rows += [
            ("<b>passes so far</b>", f"{stats['passes']}, {stats['tokens']} tokens", ""),
            ("<b>seconds a pass</b>", f"{stats['pass_s'] / stats['passes']:.3g}", waited),
            ("<b>peak memory</b>", format_size(stats["peak_bytes"]), ""),
        ]
    bar = "".join(
        f"<div style='width:{nbytes / total:.2%};background:{PART_COLOURS[part]}' "
        f"title='{escape(part)}'></div>"
        for part, nbytes in parts.items()
        if nbytes
    )
    body = "".join(
        f"<tr><td style='text-align:left'>{a}</td><td>{b}</td><td>{c}</td></tr>" for a, b, c in rows
    )
    return (
        f"<table><caption>FlexInfer: where {format_size(total)} go</caption><tr><td "
        "colspan='3'><div "
        f"style='display:flex;height:1em;min-width:24em'>{bar}</div></td></tr>{body}</table>"
    )


def last_pass(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of the last whole pass, times from its start; a pass ends with the last kernel of
    the highest layer.

    Raises ValueError where none is among them.
    """
    computed = sorted(
        (one for one in events if one["kind"] == "compute"), key=lambda one: one["start_s"]
    )
    if not computed:
        raise ValueError(
            "no pass was recorded; load the model with flexinfer.from_pretrained(..., trace=True) "
            "and generate"
        )
    head = max(event["layer"] for event in events)
    ends = [
        one["stop_s"]
        for one, following in zip(computed, [*computed[1:], None], strict=True)
        if one["layer"] == head and (following is None or following["layer"] < head)
    ]
    begin, end = (
        (ends[-2], ends[-1]) if len(ends) > 1 else (min(one["start_s"] for one in events), ends[-1])
    )
    inside = [one for one in events if one["stop_s"] > begin and one["start_s"] < end]
    return [
        one
        | {"start_s": max(one["start_s"], begin) - begin, "stop_s": min(one["stop_s"], end) - begin}
        for one in inside
    ]


def draw_pass(axes: "Axes", events: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Rows of reads, waits and kernels of one pass. Returns its seconds and those of waiting."""
    for row, (kind, colour) in enumerate(SPAN_COLOURS.items()):
        spans = [
            (one["start_s"], one["stop_s"] - one["start_s"])
            for one in events
            if one["kind"] == kind
        ]
        hatch = WAIT_HATCH if kind == "wait" else ""
        axes.broken_barh(spans, (2.1 - row, 0.8), facecolor=colour, edgecolor="none", hatch=hatch)
    axes.set_yticks([2.5, 1.5, 0.5], ["disk reads", "compute waits", "kernels"])
    axes.set_ylim(0, 3)
    axes.grid(axis="y", visible=False)
    waited_s = sum(one["stop_s"] - one["start_s"] for one in events if one["kind"] == "wait")
    return max(one["stop_s"] for one in events), waited_s


def timeline(events: Sequence[dict[str, Any]]) -> "Figure":
    """Reads, waits and kernels of the last whole pass.

    Raises ImportError without matplotlib, ValueError without a pass.
    """
    try:
        # pyplot makes notebooks show figures.
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise ImportError("a timeline needs matplotlib: pip install 'flexinfer[bench]'") from error
    figure, axes = plt.subplots(figsize=(10, 2.2), layout="constrained")
    # The caller shows it, once.
    plt.close(figure)
    pass_s, waited_s = draw_pass(axes, last_pass(events))
    axes.set_title(f"the last pass: {pass_s:.3g} s, of which {waited_s:.3g} s waiting", loc="left")
    axes.set_xlabel("time within the pass [s]")
    axes.set_xlim(left=0)
    return figure


class TqdmBars:
    """What `progress=True` calls: a bar for each stage that takes a while, gone when it is done."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._stage = ""

    def __call__(self, stage: str, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None or stage != self._stage or done_bytes < self._bar.n:
            with warnings.catch_warnings():
                # tqdm warns that bars are text without ipywidgets.
                warnings.simplefilter("ignore")
                from tqdm.auto import tqdm
            self._close()
            self._stage = stage
            self._bar = tqdm(
                desc=TITLES[stage],
                total=total_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                leave=False,
                delay=PATIENCE_S.get(stage, OTHER_PATIENCE_S),
            )
        self._bar.update(done_bytes - self._bar.n)
        if done_bytes >= total_bytes:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
