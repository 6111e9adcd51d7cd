"""How far FlexInfer and llama.cpp agree on one GGUF file of a real model: the next token, the
distribution, the perplexity.

    python -m experiments.agreement [FILE.gguf] [--positions 1000] [--record
    results/quality/agreement.jsonl]

Mechanism: each system computes the logits of the same token ids in one pass, with its KV cache, in
a process of its own (both bring a ggml, and two of them do not share a process), and leaves them in
a scratch directory as float32. A third of them, as a yardstick, is stock transformers in float32 on
the numbers that the blocks stand for: FlexInfer and llama.cpp round activations to 8 bits before
they multiply, it does not. This process imports none of them and compares: of every pair the share
of positions whose most likely token is the same, and the mean and largest Kullback-Leibler
divergence; of every system the perplexity of the text.

The text is documentation that comes with Python (`pydoc_data.topics`): real prose, on every
machine, and its hash is in the record.
Cost: of each system a pass and positions * vocabulary * 4 bytes, in memory and on the disk (200 MB
for SmolLM2 and 1,000 positions).
What it does not do: say how good a model is; the perplexity belongs to this text and this context.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.provenance import provenance
from experiments.record_files import QUALITY, load_lines

# Of pydoc_data.topics: "Objects, values and types" and "Execution model".
TOPICS = ("objects", "execmodel")
MEMORY = "2GiB"  # FlexInfer's budget; streamed logits are the resident ones, bit for bit
CHUNK_ROWS = 64

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


def documentation(names: Iterable[str] | None = None) -> str:
    """Topics of Python's documentation, by name; all of them, sorted, unless some are named."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in (sorted(topics) if names is None else names))


def load(results_dir: Path) -> list[dict[str, Any]]:
    """The records, oldest first. Says which command makes them where there are none."""
    return load_lines(results_dir / QUALITY / "agreement.jsonl", "make agreement")


# ---- in a process of its own each


def _flexinfer(model: Path, ids: Ids) -> Floats:
    import torch

    import flexinfer

    loaded: Any = flexinfer.from_pretrained(
        model, MEMORY, context=len(ids), logits_to_keep=len(ids)
    )
    with loaded.flexinfer, torch.inference_mode():
        return np.array(loaded(input_ids=torch.from_numpy(ids)[None]).logits[0].float())


def _transformers(model: Path, ids: Ids) -> Floats:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        model.parent, gguf_file=model.name, dtype=torch.float32
    )
    with torch.inference_mode():
        return np.array(loaded(input_ids=torch.from_numpy(ids)[None]).logits[0])


def _llama_cpp(model: Path, ids: Ids) -> Floats:
    import llama_cpp as api

    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.use_extra_bufts = False
    loaded = api.llama_model_load_from_file(str(model).encode(), params)
    if not loaded:
        raise RuntimeError(f"llama.cpp does not load {model}; its reason stands above")
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = len(ids)
    params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
    context = api.llama_init_from_model(loaded, params)
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids.tolist()):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    failed = api.llama_decode(context, batch)
    if failed:
        raise RuntimeError(f"llama.cpp: llama_decode returns {failed}")
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    logits = ctypes.cast(api.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(logits, (len(ids), vocab)).copy()


SYSTEMS: dict[str, Callable[[Path, Ids], Floats]] = {
    "flexinfer": _flexinfer,
    "llama_cpp": _llama_cpp,
    "transformers": _transformers,
}


def _write_ids(model: Path, tokens: int, target: Path) -> None:
    """The first `tokens` ids of the text, by the tokenizer of the file."""
    from flexinfer.formats.checkpoint import open_checkpoint
    from flexinfer.formats.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(open_checkpoint(model).config_dir)
    ids = tokenizer(documentation(TOPICS), add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise ValueError(
            f"positions: the text has {len(ids)} tokens, {tokens} are needed; ask for fewer"
        )
    np.save(target, np.array(ids[:tokens], np.int64))


# ---- what compares them


def perplexity(logits: Floats, ids: Ids) -> float:
    """Of ids[1:], each given those before it.

    logits: [tokens, vocab]; the last position is not used.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(ids) - 1)
        rows = log_softmax(logits[start:stop])
        total -= float(rows[np.arange(stop - start), ids[start + 1 : stop + 1]].sum())
    return math.exp(total / (len(ids) - 1))


def compare(ours: Floats, theirs: Floats) -> dict[str, float]:
    """Share of positions with the same most likely token, and mean and largest KL(theirs || ours)
    in nats. Both [positions, vocab].
    """
    divergences = []
    for start in range(0, len(ours), CHUNK_ROWS):
        p, q = (log_softmax(one[start : start + CHUNK_ROWS]) for one in (theirs, ours))
        divergences.append((np.exp(p) * (p - q)).sum(1))
    found = np.concatenate(divergences)
    same = float((ours.argmax(1) == theirs.argmax(1)).mean())
    return {"top1_equal": same, "mean_kl": float(found.mean()), "max_kl": float(found.max())}


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """In float64, of each row."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def measure(model: Path, positions: int, scratch: Path) -> dict[str, Any]:
    """One record: every system's perplexity, and every pair's agreement, on `positions` predicted
    tokens.

    Raises: RuntimeError with the system's own words when one fails.
    """
    origin = provenance(model)
    ids_file = scratch / "ids.npy"
    _in_process("ids", model, ids_file, str(positions + 1))
    ids = np.load(ids_file)
    logits: dict[str, Floats] = {}
    for name in SYSTEMS:
        _in_process(name, model, scratch / f"{name}.npy", str(ids_file))
        logits[name] = np.load(scratch / f"{name}.npy", mmap_mode="r")
    pairs = [
        {"of": one, "against": other} | compare(logits[one][:-1], logits[other][:-1])
        for one, other in combinations(SYSTEMS, 2)
    ]
    return {
        "run_id": uuid.uuid4().hex,
        "file": model.name,
        "file_sha256": _sha256(model),
        "text": f"pydoc_data.topics of Python {sys.version.split()[0]}: {', '.join(TOPICS)}",
        "text_sha256": hashlib.sha256(documentation(TOPICS).encode()).hexdigest(),
        "positions": positions,
        "perplexity": {name: perplexity(found, ids) for name, found in logits.items()},
        "pairs": pairs,
        "provenance": origin.model_dump(mode="json"),
    }


def _in_process(task: str, model: Path, target: Path, told: str) -> None:
    command = [
        sys.executable,
        "-m",
        "experiments.agreement",
        "--task",
        task,
        str(model),
        str(target),
        told,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{task}: {' | '.join(done.stderr.strip().splitlines()[-2:])}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main() -> None:
    """Measure, print one JSON line, and append it to the records."""
    if sys.argv[1:2] == ["--task"]:
        task, file, target, told = sys.argv[2:]
        if task == "ids":
            _write_ids(Path(file), int(told), Path(target))
        else:
            np.save(target, SYSTEMS[task](Path(file), np.load(told)))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", type=Path, nargs="?", help="a GGUF file (default: SmolLM2's, downloaded once)"
    )
    parser.add_argument("--positions", type=int, default=1000)
    parser.add_argument(
        "--record", type=Path, default=Path("results") / QUALITY / "agreement.jsonl"
    )
    arguments = parser.parse_args()
    model: Path | None = arguments.model
    if model is None:
        find = "from experiments.smollm2 import smollm2_gguf; print(smollm2_gguf())"
        done = subprocess.run(
            [sys.executable, "-c", find], stdout=subprocess.PIPE, text=True, check=True
        )
        model = Path(done.stdout.strip().splitlines()[-1])
    with tempfile.TemporaryDirectory(prefix="flexinfer-agreement-") as scratch:
        line = json.dumps(measure(model, arguments.positions, Path(scratch)))
    print(line)
    arguments.record.parent.mkdir(parents=True, exist_ok=True)
    with arguments.record.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    main()
