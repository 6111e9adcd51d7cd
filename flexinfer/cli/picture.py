"""Plans as a PNG file, by matplotlib (extra `bench`)."""

from pathlib import Path
from typing import TYPE_CHECKING

from flexinfer.observe.report import PART_COLOURS, budget_parts
from flexinfer.plan.budget import Plan
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_png(path: Path) -> None:
    """Raises ImportError or ValueError, before anything is measured, where `draw_plan` would fail."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--png needs matplotlib: pip install 'flexinfer[bench]'") from error
    if path.suffix != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(
            f"png={str(path)!r} cannot be written; name a .png file in a directory that is there"
        )


def draw_plan(path: Path, name: str, plan: Plan, plans: list[Plan]) -> None:
    """Where the budget goes, and tokens/s over budgets with the bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    budget, speed = figure.subplots(2, 1, height_ratios=(1, 3))
    _draw_budget(budget, name, plan)
    _draw_speed(speed, plan, plans)
    figure.savefig(path, dpi=150)


def _draw_budget(axes: "Axes", name: str, plan: Plan) -> None:
    left = 0.0
    for part, nbytes in budget_parts(plan).items():
        if nbytes:
            axes.barh(0, nbytes / 2**30, left=left, color=PART_COLOURS[part], label=part)
        left += nbytes / 2**30
    axes.set(
        yticks=[],
        xlim=(0, left),
        xlabel="GiB",
        title=f"{name}: where {format_size(plan.budget_bytes)} go, for a context of {plan.fixed.context_tokens} tokens",
    )
    axes.legend(ncols=4, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.9), frameon=False)


def _draw_speed(axes: "Axes", plan: Plan, plans: list[Plan]) -> None:
    budgets = [other.budget_bytes / 2**30 for other in plans]
    axes.plot(budgets, [other.bound_tokens_per_s for other in plans], color="black", ls="--", label="bound")
    predicted = [other.predicted_tokens_per_s for other in plans]
    axes.plot(budgets, predicted, color=PART_COLOURS["locked weights"], marker="o", label="predicted")
    axes.axvline(plan.budget_bytes / 2**30, color=PART_COLOURS["process"], lw=1, label="this budget")
    reads, compute = plan.costs.bandwidth_bytes_per_s / 1e6, plan.costs.compute_s * 1e3
    axes.set(
        xlabel="budget in GiB",
        ylabel="tokens/s",
        title=f"reads at {reads:.0f} MB/s, {compute:.0f} ms of compute a token",
    )
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
