"""A soak: random models, budgets and calls, each in a control group of exactly its budget.

Nothing may be killed, wrong, hung or left.

A case is drawn from (seed, number) alone. One process computes its reference, stock transformers
with all weights resident (for weights in ggml's blocks, which that cannot multiply, flexinfer with
all of them resident), and learns the smallest budget. Another, in a memory group of exactly the
case's budget and no swap, loads the model with flexinfer and makes the same calls, one after
another. Outputs are compared token by token, logits bit by bit. A call that is to be refused must
be refused before anything runs. One JSON line a case goes to the record; finished cases are
skipped, so that a soak can be gone on with; those that ended badly are run again.

    python -m tests.stress.soak 1000 --record results/reliability/soak.jsonl
    python -m tests.stress.soak --large --record results/reliability/large.jsonl
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from experiments.limits import Limits
from experiments.provenance import provenance
from experiments.synth import default_cache_dir
from tests.stress.soak_cases import Call, Case, draw, generations_of, large
from tests.stress.soak_child import child, reference
from tests.stress.soak_models import make_checkpoint

TIMEOUT_S = 900
BAD = ("killed", "wrong", "hung", "leak", "error")
# Logits between which kernels for one row and several may choose otherwise.
NEAR = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}


def _same_but_for_ties(case: Case, call: Call, ours: Any, theirs: Any) -> bool:
    """Whether a drafted text is the other one up to where two tokens are as good as equal.

    Drawn ones have a distribution alone.
    """
    if call.kind != "greedy" or ours is None:
        return call.kind == "sample"
    pairs = zip(
        ours["text"][call.prompt_tokens :],
        theirs["text"][call.prompt_tokens :],
        theirs["margins"],
        strict=True,
    )
    margin = next((margin for one, other, margin in pairs if one != other), 0.0)
    # Ggml rounds what it multiplies to 8 bits.
    in_blocks = "bfloat16" if case.blocks else case.file_dtype
    return margin < NEAR[in_blocks if case.dtype == "auto" or case.blocks else case.dtype]


def judge(case: Case, expected: dict[str, Any], report: dict[str, Any]) -> tuple[str, list[str]]:
    """The outcome of a case that ran to its end, and of each call."""
    outcomes = []
    for call, ours, theirs, refusal in zip(
        case.calls, report["outputs"], expected["outputs"], report["refusals"], strict=True
    ):
        same = ours == theirs or (
            case.draft is not None and _same_but_for_ties(case, call, ours, theirs)
        )
        outcomes.append("refused" if refusal else "ok" if same else "wrong")
    if "wrong" in outcomes:
        return "wrong", outcomes
    return ("leak" if any(report["left"]) else "ok"), outcomes


def run_case(case: Case, scratch: Path, verbose: bool = False) -> dict[str, Any]:
    """Run one case; its record."""
    path = scratch / f"soak-{case.seed}-{case.number}"
    shutil.rmtree(path, ignore_errors=True)
    record: dict[str, Any] = {"case": asdict(case), "outcome": "error"}
    try:
        make_checkpoint(case, path)
        done = _process("reference", case, path)
        if done.returncode != 0:
            return record | {"message": "reference: " + done.stderr[-2000:]}
        expected = json.loads(done.stdout.splitlines()[-1])
        spare = int(case.share * expected["weights_bytes"] * 1.02)
        smallest = expected["smallest_bytes"]
        memory = (smallest + spare) // 4096 * 4096
        record |= {"memory_bytes": memory, "smallest_bytes": smallest}
        with Limits(memory_bytes=memory) as limits:
            try:
                done = _process("child", case, path, memory, limits)
            except subprocess.TimeoutExpired:
                return record | {"outcome": "hung"}
            usage = limits.usage()
        record |= {"group_peak_bytes": usage.peak_memory_bytes, "oom_kills": usage.oom_kills}
        if verbose:
            print(done.stderr, file=sys.stderr)
        if usage.oom_kills or done.returncode == -9:
            return record | {"outcome": "killed"}
        if done.returncode != 0:
            return record | {"message": done.stderr[-2000:]}
        report = json.loads(done.stdout.splitlines()[-1])
        if "needed_bytes" in report:
            return record | {
                "message": f"refused the budget that was named, and named {report['needed_bytes']}"
            }
        outcome, outcomes = judge(case, expected, report)
        del report["outputs"]
        planned = report["plan"]["budget_bytes"] - report["plan"]["unused_bytes"]
        return (
            record | report | {"outcome": outcome, "outcomes": outcomes, "planned_bytes": planned}
        )
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _process(
    role: str, case: Case, path: Path, memory: int = 0, limits: Limits | None = None
) -> subprocess.CompletedProcess[str]:
    arguments = json.dumps([role, asdict(case), str(path), memory])
    command = [sys.executable, "-m", "tests.stress.soak", "--role", arguments]
    return subprocess.run(
        limits.command(command) if limits else command,
        env=os.environ | {"FLEXINFER_SOAK_MEMORY": str(memory)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def soak(
    cases: Iterable[Case],
    generations: int,
    record_file: Path | None,
    verbose: bool = False,
    again: bool = False,
) -> Counter[str]:
    """Run `cases`, of one seed, until `generations` texts or logits have been asked for, those of
    the record included. Returns outcomes, counted.
    """
    finished: dict[tuple[int, int], dict[str, Any]] = {}
    if record_file is not None and record_file.exists() and not again:
        records = map(json.loads, record_file.read_text().splitlines())
        finished = {
            (one["case"]["seed"], one["case"]["number"]): one
            for one in records
            if one["outcome"] not in BAD
        }
    scratch = default_cache_dir() / "soak"
    scratch.mkdir(parents=True, exist_ok=True)
    facts = provenance(scratch).model_dump(mode="json")
    outcomes: Counter[str] = Counter()
    made, start_s, new = 0, perf_counter(), 0
    for case in cases:
        record = finished.get((case.seed, case.number))
        if record is None:
            case_start_s = perf_counter()
            record = run_case(case, scratch, verbose)
            record |= {"seconds": round(perf_counter() - case_start_s, 1), "provenance": facts}
            new += generations_of(case)
            if record_file is not None:
                record_file.parent.mkdir(parents=True, exist_ok=True)
                with record_file.open("a") as stream:
                    stream.write(json.dumps(record) + "\n")
        made += generations_of(case)
        outcomes[record["outcome"]] += 1
        outcomes.update(f"call {one}" for one in record.get("outcomes", []))
        left_s = (perf_counter() - start_s) / max(new, 1) * max(0, generations - made)
        print(
            f"case {case.number} {case.family} {case.blocks or case.file_dtype}/{case.dtype} "
            f"vocabulary {case.vocab} share {case.share}: {record['outcome']}; {made} of "
            f"{generations} generations, {dict(outcomes)}, {left_s / 60:.0f} min left",
            flush=True,
        )
        if record["outcome"] in BAD:
            print("  " + record.get("message", "")[-600:], flush=True)
        if made >= generations:
            break
    return outcomes


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was killed, wrong, hung, left behind or in error."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.soak", description=__doc__)
    parser.add_argument("generations", type=int, nargs="?", default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    parser.add_argument(
        "--only", type=int, nargs="+", help="run these cases alone, again if need be"
    )
    parser.add_argument(
        "--large", action="store_true", help="run the twelve cases with large vocabularies"
    )
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.role:
        role, fields, path, memory = json.loads(arguments.role)
        case = Case(**fields | {"calls": tuple(Call(**call) for call in fields["calls"])})
        report = (
            reference(case, Path(path)) if role == "reference" else child(case, Path(path), memory)
        )
        print(json.dumps(report))
        return 0
    numbers = arguments.only or itertools.count()
    cases = large() if arguments.large else (draw(arguments.seed, number) for number in numbers)
    outcomes = soak(
        cases, arguments.generations, arguments.record, arguments.verbose, bool(arguments.only)
    )
    return int(any(outcomes[bad] for bad in BAD))


if __name__ == "__main__":
    sys.exit(main())
