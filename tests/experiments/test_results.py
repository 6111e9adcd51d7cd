"""The committed results: every record fits the schema, and the numbers in README and docs are
theirs.
"""

import json
import re
from pathlib import Path

import pytest

from experiments import claims, figures, reliability
from experiments.records import Record
from tests.experiments.samples import ROOT

RESULTS = ROOT / "results"
# As the docs name them, where the records have another name.
WEIGHTS = {"bf16": "BF16"}
RESULTS_PAGE = ROOT / "docs" / "results.md"
FIGURES = ("overview", "table1", "fig3", "fig4", "fig4-shares", "fig5", "limit")


def table_rows(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the first table below `heading`."""
    paragraphs = text.split(f"\n{heading}\n")[1].strip().split("\n\n")
    lines = next(one for one in paragraphs if one.startswith("|")).splitlines()
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def filled_rows(text: str, heading: str) -> list[dict[str, str]]:
    """`table_rows`, where an empty cell means the one above."""
    filled: list[dict[str, str]] = []
    for row in table_rows(text, heading):
        above = filled[-1] if filled else {}
        filled.append({head: cell or above[head] for head, cell in row.items()})
    return filled


@pytest.fixture(scope="module")
def machines() -> dict[str, list[Record]]:
    return figures.find_records(RESULTS, "python scripts/run.py +exp=claims")


@pytest.mark.parametrize(
    ("page", "heading", "rows_wanted"),
    [(ROOT / "README.md", "## Results", 5), (RESULTS_PAGE, "## FlexInfer and other systems", 12)],
)
def test_numbers_are_medians_of_the_records(
    machines: dict[str, list[Record]], page: Path, heading: str, rows_wanted: int
) -> None:
    rows = filled_rows(page.read_text(encoding="utf-8"), heading)
    assert len(rows) == rows_wanted
    short = figures.short_names(RESULTS)
    records = {short[machine]: found for machine, found in machines.items()}
    tables = {
        name: (figures.frame(found), figures.summary(figures.frame(found)))
        for name, found in records.items()
    }
    for row in rows:
        match = re.search(r"`([\w-]+)`", row["model"])
        assert match, f"{row}: the model's name in the records has to stand in backticks"
        encoding = row["model"].split(", ")[1]
        place = {
            "model": match[1],
            "weights": WEIGHTS.get(encoding, encoding),
            "device": row.get("device", "native"),
        }
        data, medians = (
            table[
                (table[list(place)] == list(place.values())).all(axis=1)
                & (table["budget_gib"].round(2) == float(row["budget"].split()[0]))
            ]
            for table in tables[row["machine"].lower()]
        )
        ours, theirs = (
            medians[medians["label"] == label] for label in ("FlexInfer", row["baseline"])
        )
        read = data[data["label"] == "FlexInfer"]["bytes_per_token"].median()
        shown = {
            "its tokens/s": f"{theirs['tokens_per_s'].item():.3f}",
            "FlexInfer tokens/s": f"{ours['tokens_per_s'].item():.3f}",
            "of its bound": f"{ours['ratio'].item():.2f}",
            "of the best bound": f"{ours['best'].item():.2f}",
            "read per token": f"{read / 1e9:.2f} GB",
            "rounds": str(ours["n"].item()),
            "engine": records[row["machine"].lower()][0].provenance.engine,
        }
        columns = row.keys() & shown.keys()
        assert {"its tokens/s", "FlexInfer tokens/s", "of its bound", "rounds"} <= columns
        assert {head: row[head] for head in columns} == {head: shown[head] for head in columns}, (
            f"of {row}"
        )


def test_larger_models_in_the_docs_are_medians_of_the_records(
    machines: dict[str, list[Record]],
) -> None:
    names = {
        "llama.cpp mmap": "llama-cpp-mmap",
        "synchronous": "sync-2",
        "unbalanced": "unbalanced",
        "attention first": "attention-first",
        "FFN first": "ffn-first",
        "Algorithm 1": "algorithm1",
        "FlexInfer": "flexinfer",
    }
    short = figures.short_names(RESULTS)
    rows = table_rows(RESULTS_PAGE.read_text(encoding="utf-8"), "## Larger models")
    wanted = set()
    for machine, records in machines.items():
        table = figures.summary(figures.frame(records))
        for model in ("llama2-13b", "codellama-34b", "llama2-70b"):
            mine = table[(table["model"] == model) & (table["device"] == "native")]
            for budget, cells in mine.groupby("budget_gib"):
                place = (short[machine], model, f"{budget:.1f}")
                wanted.add(place)
                speeds = cells.set_index("system")["tokens_per_s"].map("{:.3f}".format)
                (row,) = (
                    one for one, here in zip(rows, places(rows), strict=True) if here == place
                )
                assert {head: row[head] for head in names} == {
                    head: speeds.get(system, "") for head, system in names.items()
                }, f"of {place}"
    assert set(places(rows)) == wanted


def places(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Machine, model and budget of each row, of which the first two stand once."""
    found: list[tuple[str, str, str]] = []
    for row in rows:
        machine, model = (row["machine"].lower(), row["model"].strip("`"))
        if not machine:
            machine, model = found[-1][:2]
        found.append((machine, model, row["budget"].split()[0]))
    return found


def least_and_greatest(measured: str) -> str:
    """Of gains by budget, as a verdict tells them, the least and the greatest; of another
    measurement its first words.
    """
    gains = re.findall(r"([+-][\d.]+%|[\d.]+x)[^,]*? at [\d.]+ GiB", measured)
    if not gains:
        return measured.split(";")[0]
    factors = {
        one: float(one[:-1]) if one[-1] == "x" else 1 + float(one[:-1]) / 100 for one in gains
    }
    ends = (min(factors, key=factors.__getitem__), max(factors, key=factors.__getitem__))
    return " to ".join(dict.fromkeys(ends))


def test_verdicts_are_those_of_the_records(machines: dict[str, list[Record]]) -> None:
    paper = json.loads((RESULTS / "paper.json").read_text())["claims"]
    rows = filled_rows(RESULTS_PAGE.read_text(encoding="utf-8"), "## The paper's claims")
    assert [row["claim"].split()[0] for row in rows] == list(paper)
    short = figures.short_names(RESULTS)
    verdicts = claims.judge(machines, paper)
    for row in rows:
        model, device = re.findall(r"`([\w-]+)`", row["here"])
        told = {
            short[one.machine]: (least_and_greatest(one.measured), one.verdict)
            for one in verdicts
            if (one.claim, one.model, one.device) == (row["claim"].split()[0], model, device)
        }
        assert (row["measured on the EPYC-512"], row["verdict"]) == told["epyc-512"], (
            f"of {row['claim']}"
        )
        for machine in ("EPYC", "Xeon-512"):
            assert row[f"on the {machine}"] == ": ".join(told[machine.lower()]), (
                f"of {row['claim']}"
            )


def test_the_headline_is_a_row_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(
        r"\*\*([\d.]+) tokens/s where .* gives ([\d.]+)\*\*.*?\bin ([\d.]+) GiB", text, re.DOTALL
    )
    assert match
    row = next(one for one in filled_rows(text, "## Results") if one["budget"] == f"{match[3]} GiB")
    assert [f"{float(row[head]):.2f}" for head in ("FlexInfer tokens/s", "its tokens/s")] == [
        match[1],
        match[2],
    ]


def test_the_engines_own_runs_stay_in_their_budget(machines: dict[str, list[Record]]) -> None:
    ours = [
        one for found in machines.values() for one in found if one.cell.system.kind == "flexinfer"
    ]
    assert ours
    for one in ours:
        assert one.status == "ok"
        assert one.limits.memory_bytes == one.cell.budget_bytes // 4096 * 4096
        assert one.peak_memory_bytes is not None
        assert one.peak_memory_bytes <= one.limits.memory_bytes


def test_every_figure_of_every_machine_is_there(machines: dict[str, list[Record]]) -> None:
    short = figures.short_names(RESULTS)
    assert set(machines) <= set(short), (
        "results/machines.json names every machine there are records of"
    )

    def file_name(name: str, machine: str) -> str:
        return figures.file_name(name, short[machine])

    wanted = {file_name(name, machine) for name in FIGURES for machine in machines}
    for machine, records in machines.items():
        if not any(one.events_file for one in records):
            wanted.remove(file_name("fig3", machine))
        if not any(one.cell.system.name == "unbalanced" for one in records):
            wanted.remove(file_name("fig5", machine))
        if any(one.prefill_s for one in records):
            wanted.add(file_name("resident", machine))
        if any(one.cell.experiment == "moe" for one in records):
            wanted.add(file_name("moe", machine))
    for name, tokens in (("past", "drafts"), ("batches", "batches")):
        for machine in figures.find_records(RESULTS, "", tokens):
            wanted.add(file_name(name, machine))
    for line in reliability.load(RESULTS, "pressure"):
        wanted.add(file_name("reliability", reliability.machine(line)))
    folder = RESULTS / "figures"
    assert {file.name for file in folder.iterdir()} == {f"{name}.svg" for name in wanted}
    for name in wanted:
        assert "<svg" in (folder / f"{name}.svg").read_text()
