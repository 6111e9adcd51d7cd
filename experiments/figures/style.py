"""How the figures of this repository look: one colour, marker, line and hatch for each system."""

from dataclasses import dataclass
from typing import Any

import seaborn
from matplotlib.lines import Line2D

GIB = 2**30


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
ROUND: dict[str, Any] = {
    "s": 10,
    "color": "white",
    "edgecolor": "black",
    "linewidth": 0.6,
    "zorder": 3,
}
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
