"""A soak of the server: many clients at once, polite and rude ones, with `flexinfer serve` in a
control group of exactly its budget.

The budget is the smallest that the server accepts and `share` of the weights, without swap. Each
client draws from (seed, number) what it does next: a chat or a completion, streamed or not, with a
prompt and an answer of some length; or something that no client should do. What polite clients get
is compared with what stock transformers says, token by token. Nothing may be killed, wrong, hung or
answered otherwise than it should be, and the server has to stop when it is told to. One JSON line a
run goes to the record.

    python -m tests.stress.serve --minutes 30 --record results/reliability/serve.jsonl
"""

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

from experiments.limits import Limits
from experiments.provenance import provenance
from experiments.smollm2 import make_smollm2
from flexinfer.cli.interrupt import terminable
from flexinfer.sizes import format_size
from tests.stress.serve_clients import Tally, Target, client, expected_texts

START_S = 300.0
# Times in a row that a process may be larger than the one before, which named the smallest
# budget.
REFUSED_STARTS = 3


@contextlib.contextmanager
def _server(
    path: Path, limits: Limits, memory: int, context: int, queue: int
) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """The process, its URL, and 0; or, where the budget is refused, no URL and the smallest one."""
    command = [sys.executable, "-m", "flexinfer", "serve", str(path), "--memory", str(memory)]
    command += ["--port", "0", "--context", str(context), "--queue", str(queue), "--grace", "2"]
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(limits.command(command), stderr=log)
        try:
            deadline_s, url, smallest = monotonic() + START_S, "", 0
            while not url and process.poll() is None and monotonic() < deadline_s:
                sleep(0.2)
                text = Path(log.name).read_text(errors="replace")
                found = re.search(r"(http://\S+)/v1: ", text)
                url = found[1] if found else ""
            text = Path(log.name).read_text(errors="replace")
            if not url:
                named = re.search(r"at least (?:memory=)?(\d+)", text)
                if named is None:
                    raise RuntimeError(f"the server did not start: {text[-1500:]}")
                smallest = int(named[1])
            yield process, url, smallest
        finally:
            process.kill()
            process.wait()


def _metrics(url: str) -> dict[str, float]:
    rows = (
        line.rsplit(" ", 1)
        for line in httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
        if line[0] != "#"
    )
    return {name: float(value) for name, value in rows}


def _anonymous_bytes(process: subprocess.Popen[bytes]) -> int:
    resident, shared = Path(f"/proc/{process.pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * 4096


def run(
    path: Path,
    clients: int = 8,
    seconds: float = 60.0,
    context: int = 512,
    share: float = 0.3,
    new_tokens: int = 32,
    seed: int = 0,
) -> dict[str, Any]:
    """One run; its record. Raises RuntimeError where the server does not start."""
    texts = expected_texts(path, new_tokens)
    weights = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    queue = max(1, clients // 2)
    record: dict[str, Any] = {
        "model": path.name,
        "clients": clients,
        "seconds": seconds,
        "context": context,
    }
    record |= {"queue": queue, "seed": seed, "share": share, "outcome": "error"}
    with _server(path, Limits(), 1 << 20, context, queue) as (_, _, smallest):
        pass
    for _ in range(REFUSED_STARTS):
        memory = (smallest + (1 << 20) + int(share * weights)) // 4096 * 4096
        record |= {"memory_bytes": memory, "smallest_bytes": smallest}
        with (
            Limits(memory_bytes=memory) as limits,
            _server(path, limits, memory, context, queue) as one,
        ):
            process, url, smallest = one
            if not url:
                continue
            return record | _measured(
                process, limits, Target(url, path.name, texts, context), clients, seconds, seed
            )
    return record | {"message": f"refused {REFUSED_STARTS} times the budget that it had named"}


def _measured(
    process: subprocess.Popen[bytes],
    limits: Limits,
    target: Target,
    clients: int,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """What clients saw of a server that listens, what it counted, and how it stopped."""
    tally, samples = Tally(), list[int]()
    until_s = monotonic() + seconds
    threads = [
        threading.Thread(target=client, args=(number, seed, target, tally, until_s))
        for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while process.poll() is None and any(thread.is_alive() for thread in threads):
        samples.append(_anonymous_bytes(process))
        sleep(min(10.0, seconds / 10))
    alive = process.poll() is None
    if alive:
        for thread in threads:
            thread.join()
        counted = _metrics(target.url)
        stop_s = monotonic()
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    else:
        counted, stop_s = {}, monotonic()
    usage = limits.usage()
    ended_well = alive and process.returncode == 143
    outcome = "killed" if usage.oom_kills else "ok" if ended_well and not tally.bad else "error"
    return {
        "outcome": outcome,
        "answers": dict(tally.answers),
        "rude": {kind: dict(counter) for kind, counter in sorted(tally.rude.items())},
        "complaints": tally.complaints,
        "counted": {
            name: value
            for name, value in counted.items()
            if "bucket" not in name and "created" not in name
        },
        "process_bytes": samples,
        "group_peak_bytes": usage.peak_memory_bytes,
        "oom_kills": usage.oom_kills,
        "exit_code": process.returncode,
        "stop_s": round(monotonic() - stop_s, 2),
    }


def main(argv: list[str] | None = None) -> int:
    """0 when nothing was killed, wrong, hung or answered otherwise than it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.serve", description=__doc__)
    parser.add_argument(
        "model", nargs="?", help="checkpoint directory (default: SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--share", type=float, default=0.3, help="of the weights, on top of the smallest budget"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="of the longest answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args(argv)
    path = Path(arguments.model) if arguments.model else make_smollm2()
    facts = provenance(path).model_dump(mode="json")
    with terminable():
        record = run(
            path,
            arguments.clients,
            60 * arguments.minutes,
            arguments.context,
            arguments.share,
            arguments.new_tokens,
            arguments.seed,
        )
    record["provenance"] = facts
    if arguments.record is not None:
        arguments.record.parent.mkdir(parents=True, exist_ok=True)
        with arguments.record.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
    peak = record.get("group_peak_bytes")
    print(
        f"{record['outcome']}: answers {record.get('answers')}, rude {record.get('rude')}, peak "
        f"{format_size(peak) if peak else '?'} of {format_size(record['memory_bytes'])}"
    )
    for complaint in record.get("complaints", [record.get("message", "")]):
        print(f"  {complaint}")
    return int(record["outcome"] != "ok")


if __name__ == "__main__":
    sys.exit(main())
