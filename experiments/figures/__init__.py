"""Figures and tables from records, in one style. They measure nothing and write no records.

Records become a table (`frame`), a table becomes medians over the rounds (`summary`). Every drawing
function takes records and returns a matplotlib figure with units on its axes, y from 0 or
logarithmic, the bound as a line, and a caption that says machine, limits, rounds and commit.
Records that must not meet in one figure are refused.
"""

from experiments.figures.captions import caption, file_name, finish, save, short_names
from experiments.figures.charts import against_bound, bars, residents
from experiments.figures.curves import overview, shares, throughput
from experiments.figures.select import find_records, of_systems
from experiments.figures.style import ABLATION, BOUND, GIB, LOOKS, Look, use_style
from experiments.figures.tables import (
    agreements,
    coverage,
    frame,
    prefills,
    show_table,
    side_by_side,
    summary,
    why_faster,
)
from experiments.figures.timeline import load_events, timelines

__all__ = [
    "ABLATION",
    "BOUND",
    "GIB",
    "LOOKS",
    "Look",
    "against_bound",
    "agreements",
    "bars",
    "caption",
    "coverage",
    "file_name",
    "find_records",
    "finish",
    "frame",
    "load_events",
    "of_systems",
    "overview",
    "prefills",
    "residents",
    "save",
    "shares",
    "short_names",
    "show_table",
    "side_by_side",
    "summary",
    "throughput",
    "timelines",
    "use_style",
    "why_faster",
]
