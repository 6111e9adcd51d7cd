"""What a figure says below itself (machine, limits, rounds, commit), and its file."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from experiments.figures.style import LINES
from experiments.figures.tables import frame, span, summary
from experiments.records import Record, check_comparable


def caption(records: Sequence[Record], extra: str = "", shows: str = LINES) -> str:
    """Machine, limits, rounds and commit of what a figure shows.

    `shows`: what its marks are, {n} for the number of rounds.
    """
    first = records[0]
    methods = ", ".join(
        sorted(
            {
                f"cgroup {one.limits.method}"
                if one.limits.method.startswith("v")
                else one.limits.method
                for one in records
            }
        )
    )
    rates = sorted({f"{one.cell.device.name} {_rate(one)}" for one in records})
    commits = sorted(
        {
            one.provenance.git_commit[:8] + ("+" if one.provenance.git_dirty else "")
            for one in records
        }
    )
    engines = sorted({one.provenance.engine for one in records})
    days = sorted({one.provenance.started.date().isoformat() for one in records})
    counted = [one.tokens for one in records if one.status == "ok"]
    tokens = f"{span(counted)} tokens counted a cell" if counted else ""
    parts = [
        f"{first.provenance.machine}; Linux {first.provenance.kernel}, "
        f"{first.provenance.file_system}"
        + "".join(
            f"; {name.replace('_', ' ')} {value}" for name, value in first.provenance.about.items()
        )
        + ".",
        f"Memory and read limits: {methods}; device {', '.join(rates)}.",
        f"{shows.format(n=_rounds(records))}; {tokens}.",
        f"FlexInfer {', '.join(engines)}, commit {', '.join(commits)}; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}.",
        extra,
    ]
    return " ".join(part for part in parts if part)


def _rate(record: Record) -> str:
    rate = record.cell.device.read_bytes_per_s
    return f"({rate / 1e6:.0f} MB/s)" if rate else "(no limit)"


def _rounds(records: Sequence[Record]) -> str:
    counts = [count for count in summary(frame(records))["n"] if count] or [1]
    return span(counts)


def finish(
    figure: Figure, records: Sequence[Record], extra: str = "", shows: str = LINES
) -> Figure:
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
    """Of machines, what figures' files are called after: results/machines.json.

    The others go by their whole name.
    """
    file = results_dir / "machines.json"
    names: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    return names
