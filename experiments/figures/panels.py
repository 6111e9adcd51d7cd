"""A grid of panels, one for each model, weights and device, under one legend."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.figures.captions import finish
from experiments.figures.style import LINES
from experiments.figures.tables import frame, parts_of
from experiments.records import Record

Shown = TypeVar("Shown")  # what a panel shows
Budgets = TypeVar("Budgets", float, pd.Series)


@dataclass(frozen=True, slots=True)
class Panel:
    """What one panel of curves shows: records of one model, its weights and device, by round and as
    medians.
    """

    records: list[Record]
    rounds: pd.DataFrame  # of `frame`
    medians: pd.DataFrame  # of `summary`

    @property
    def weights_gib(self) -> float:
        return float(self.medians["weights_gib"].max())

    def share(self, budget_gib: Budgets) -> Budgets:
        """Budgets as shares of the weights."""
        return budget_gib / self.weights_gib


def curves_of(records: Sequence[Record]) -> list[tuple[str, Panel]]:
    """A panel for each model, weights and device, with its name; small models first."""
    panels = []
    for name, medians in parts_of(records):
        places = set(zip(medians["model"], medians["weights"], medians["device"], strict=True))
        mine = [one for one in records if one.place[:3] in places]
        panels.append((name, Panel(mine, frame(mine), medians)))
    return panels


def draw_panels(
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
    """Each of `panels`, a name and what it shows, drawn by `draw`, each of `size` inches: `columns`
    in a line; None: up to three, as evenly as may be. `extra`, `shows`: of the caption.
    """
    if not panels:
        return None
    if columns is None:
        columns = -(-len(panels) // -(-len(panels) // 3))  # four as two and two
    lines = -(-len(panels) // columns)
    figsize = (size[0] * max(columns, 2), size[1] * lines + 0.5)
    figure, grid = plt.subplots(
        lines, columns, figsize=figsize, squeeze=False, layout="constrained"
    )
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


def shared_legend(figure: Figure, title: str) -> None:
    """One legend above all panels, each system once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(found.values(), found, loc="outside upper center", ncols=5, title=title)
