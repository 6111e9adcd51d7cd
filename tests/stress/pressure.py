"""What `follow=True` does while another process takes memory and gives it back: budget, speed and
memory, second by second.

One group holds `memory` bytes and no swap. In it a model loaded with memory="auto" and follow=True
makes text, and after a while a neighbour takes `take` bytes, keeps them, and returns them. One JSON
object a run goes to the record.

    python -m tests.stress.pressure MODEL --memory 3GiB --take 1GiB --record
    results/reliability/pressure.jsonl
"""

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from experiments.limits import Limits
from experiments.provenance import provenance
from flexinfer.sizes import parse_size

BEFORE_S, HELD_S, AFTER_S = 20.0, 30.0, 45.0
TAKING_BYTES_PER_S = 200 << 20  # how fast the neighbour takes
NEIGHBOUR = """
import sys, time
held, each = [], 10 << 20
for _ in range(int(sys.argv[1]) // each):
    held.append(bytearray(b"x") * each)
    time.sleep(each / float(sys.argv[2]))
print("taken", flush=True)
sys.stdin.read()
"""


def run(model: str, memory_bytes: int, take_bytes: int, context: int) -> dict[str, Any]:
    """One run; what happened, by the second.

    Raises RuntimeError when a process ended as it should not.
    """
    with Limits(memory_bytes=memory_bytes) as limits:
        arguments = [sys.executable, "-m", "tests.stress.pressure", model, "--role", str(context)]
        ours = subprocess.Popen(
            limits.command(arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert ours.stdin is not None
        assert ours.stdout is not None
        lines: list[dict[str, Any]] = []
        started = threading.Event()

        def listen() -> None:
            for line in ours.stdout or ():
                lines.append({"t_s": monotonic(), **json.loads(line)})
                started.set()

        listener = threading.Thread(target=listen)
        listener.start()
        started.wait(600)
        start_s, marks = monotonic(), {}
        sleep(BEFORE_S)
        command = [sys.executable, "-c", NEIGHBOUR, str(take_bytes), str(TAKING_BYTES_PER_S)]
        marks["takes_s"] = monotonic()
        neighbour = subprocess.Popen(
            limits.command(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert neighbour.stdout is not None
        neighbour.stdout.readline()
        marks["has_s"] = monotonic()
        sleep(HELD_S)
        neighbour.communicate("")
        marks["returned_s"] = monotonic()
        sleep(AFTER_S)
        ours.stdin.close()
        listener.join()
        usage, codes = limits.usage(), (ours.wait(), neighbour.returncode)
    if any(codes) or usage.oom_kills:
        raise RuntimeError(
            f"exit codes of the model and the neighbour {codes}, {usage.oom_kills} killed"
        )
    tokens = [one | {"t_s": round(one["t_s"] - start_s, 3)} for one in lines]
    return {
        "memory_bytes": memory_bytes,
        "take_bytes": take_bytes,
        "group_peak_bytes": usage.peak_memory_bytes,
        "oom_kills": usage.oom_kills,
        "marks": {name: round(at_s - start_s, 3) for name, at_s in marks.items()},
        "tokens": tokens,
    }


def follow(model_path: str, context: int) -> None:
    """Make text until standard input ends, a JSON line for each token."""
    import torch

    import flexinfer
    from flexinfer.memory.process import anonymous_bytes

    done = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        done.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    model: Any = flexinfer.from_pretrained(model_path, "auto", context=context, follow=True)

    class Telling:
        def put(self, value: torch.Tensor) -> None:
            plan = model.flexinfer.plan
            line = {
                "token": value.flatten().tolist()[-1],
                "budget_bytes": plan.budget_bytes,
                "locked_bytes": plan.locked_bytes,
                "process_bytes": anonymous_bytes(),
            }
            print(json.dumps(line), flush=True)

        def end(self) -> None: ...

    ids = torch.tensor([[1, 2, 3, 4]])
    while not done.is_set():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            streamer=Telling(),
        )
    model.flexinfer.close()


def main(argv: list[str] | None = None) -> int:
    """Prints where the run was recorded."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress.pressure", description=__doc__)
    parser.add_argument("model", help="checkpoint directory")
    parser.add_argument("--memory", default="3GiB", help="of the group")
    parser.add_argument("--take", default="1GiB", help="what the neighbour takes")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--record", type=Path, default=Path("results/reliability/pressure.jsonl"))
    parser.add_argument("--role", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.role is not None:
        follow(arguments.model, arguments.role)
        return 0
    found = run(
        arguments.model, parse_size(arguments.memory), parse_size(arguments.take), arguments.context
    )
    found |= {"model": Path(arguments.model).name}
    found |= {"provenance": provenance(Path(arguments.model)).model_dump(mode="json")}
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    with arguments.record.open("a") as stream:
        stream.write(json.dumps(found) + "\n")
    print(f"{len(found['tokens'])} tokens, none killed; recorded in {arguments.record}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
