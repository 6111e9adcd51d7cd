"""Coverage-guided fuzzing of what a stranger may have written: headers, indices, configurations,
GGUF files and records.

A target is one reader and the errors it documents. Inputs are the files themselves; they are
changed by their format (tests.stress.json_changes, tests.stress.gguf_changes) or as bytes, and
atheris keeps those that reach new code. Each input is judged: anything but the documented error
that names the file is a finding, and so are files opened outside the checkpoint, sockets,
processes, prompts, memory or seconds out of proportion to the input, descriptors and threads left.
A finding is saved beside the corpus and counted once for each kind and place; fuzzing goes on. One
JSON line a run goes to the record.

    pip install -e '.[bench,fuzz]'
    python -m tests.stress.fuzz header --seconds 3600 --corpus outputs/fuzz --record
    results/reliability/fuzz.jsonl

Targets, seeds and judge need no atheris: the tests run them on the seeds.
"""

import argparse
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

from tests.stress.fuzz_judge import judge
from tests.stress.fuzz_targets import TARGETS
from tests.stress.json_changes import MAX_INPUT_BYTES

MAX_ADDRESS_BYTES = 4 << 30  # the same for memory that is asked for and not touched
HANG_S = 900  # then libFuzzer ends the process: a busy machine is no finding


def fuzz_here(name: str, seconds: int, corpus: Path) -> None:
    """Fuzz in this process, with atheris, for `seconds` from now.

    Does not return: libFuzzer ends the process.
    """
    start_s = perf_counter()
    import atheris

    target = TARGETS[name]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp())
    findings = corpus / f"{name}-findings"
    findings.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=list(target.modules)):
        seeds = target.seeds(folder)
        for seed in seeds:
            target.read(target.place(seed, folder))
            found = judge(target, seed, folder)
            assert found is None, found
    keys = target.keys()
    if not any((corpus / name).iterdir()):
        for i, seed in enumerate(seeds):
            (corpus / name / f"seed-{i}").write_bytes(seed)

    def one_input(data: bytes) -> None:
        found = judge(target, data, folder)
        if found is not None and not (findings / f"{found.key}.txt").exists():
            (findings / f"{found.key}.input").write_bytes(data)
            (findings / f"{found.key}.txt").write_text(found.text, errors="backslashreplace")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        changed = target.change(data, seed, keys) if seed % 8 else None
        if changed is None or len(changed) > max_size:
            return bytes(atheris.Mutate(data, len(data)) if data else b"{}")
        return changed

    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used_bytes + MAX_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    options = [
        f"-max_total_time={max(1, int(seconds - (perf_counter() - start_s)))}",
        f"-timeout={HANG_S}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-rss_limit_mb=0",
        "-print_final_stats=1",
        f"-artifact_prefix={findings}/ended-",
    ]
    atheris.Setup(["fuzz", *options, str(corpus / name)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


def _scratch() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def fuzz(name: str, seconds: int, corpus: Path, record_file: Path | None) -> dict[str, Any]:
    """Fuzz for `seconds`, in a process that is begun anew if an input ends it.

    Returns the record, and appends it to the file.
    """
    from experiments.provenance import provenance

    (corpus / name).mkdir(parents=True, exist_ok=True)
    findings = corpus / f"{name}-findings"
    shutil.rmtree(findings, ignore_errors=True)
    facts = provenance(corpus).model_dump(mode="json")
    start_s, cpu_start_s = perf_counter(), _cpu_of_children_s()
    executions, edges, ends = 0, 0, 0
    log_file = corpus / f"{name}.log"
    log_file.unlink(missing_ok=True)
    while (left_s := seconds - (perf_counter() - start_s)) > 1:
        arguments = ["--here", "--seconds", str(int(left_s)), "--corpus", str(corpus)]
        position = log_file.stat().st_size if log_file.exists() else 0
        with (
            log_file.open("ab") as log,
            tempfile.TemporaryDirectory(
                prefix="fuzz-", dir=_scratch()
            ) as scratch,  # libFuzzer ends without cleaning up
        ):
            done = subprocess.run(
                [sys.executable, "-m", "tests.stress.fuzz", name, *arguments],
                env=os.environ | {"PYTHONHASHSEED": "0", "TMPDIR": scratch},
                stdout=log,
                stderr=log,
                check=False,
            )
        text = log_file.read_bytes()[position:].decode(errors="replace")
        counted = re.findall(r"stat::number_of_executed_units:\s*(\d+)", text)
        if not counted:
            raise RuntimeError(f"fuzzing {name} did not begin: {text[-2000:]}")
        executions += int(counted[-1])
        edges = max([edges, *map(int, re.findall(r"cov: (\d+)", text))])
        ends += done.returncode != 0
    kinds = [file.read_text().partition("\n")[0] for file in sorted(findings.glob("*.txt"))]
    record = {
        "target": name,
        "executions": executions,
        "wall_s": round(perf_counter() - start_s, 1),
        "cpu_s": round(_cpu_of_children_s() - cpu_start_s, 1),
        "edges": edges,
        "corpus": sum(1 for _ in (corpus / name).iterdir()),
        "findings": len(kinds) + ends,
        "ended_the_process": ends,
        "kinds": kinds,
        "provenance": facts,
    }
    if record_file is not None:
        record_file.parent.mkdir(parents=True, exist_ok=True)
        with record_file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    return record


def _cpu_of_children_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument(
        "--corpus", type=Path, default=Path("outputs/fuzz"), help="kept and gone on with"
    )
    parser.add_argument("--record", type=Path)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.here:
        fuzz_here(arguments.target, arguments.seconds, arguments.corpus)
    record = fuzz(arguments.target, arguments.seconds, arguments.corpus, arguments.record)
    print(json.dumps(record, indent=1))
    return int(record["findings"] > 0)


if __name__ == "__main__":
    sys.exit(main())
