"""The checkpoint of a cell: made where it is missing, and described, in a process of its own.

The helper process (`python -m experiments.checkpoints`) imports torch, which the one that measures
does not: libraries it maps would be charged to it and make a cell's memory larger than it is.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from experiments.config import CellConfig, from_dict
from experiments.model_config import GGUF_FORMATS, ModelConfig

ROOT = Path(__file__).parents[1]
EXPERTS = re.compile(r"_exps\.|\.experts\.")  # tensors of experts


@dataclass(slots=True)
class CheckpointFacts:
    """What a cell must know of its checkpoint."""

    path: str
    files: list[str]
    vocab: int
    layers: int
    touched_bytes: int  # of all weights one token touches
    untouched_bytes: int  # of experts that a token does not touch
    kv_bytes_per_token: (
        int  # in 16 bits, which bf16 models and GGUF files have by default in every system here
    )
    bits: float  # per weight of all matrices


def describe_checkpoint(cell: CellConfig) -> CheckpointFacts:
    """Make the cell's checkpoint if need be, and describe it, in a process of its own (it imports
    torch).
    """
    told = json.dumps(
        {"model": asdict(cell.model), "format": cell.system.format, "cache_dir": cell.cache_dir}
    )
    facts = CheckpointFacts(**json.loads(_described(told)))
    if all(Path(file).is_file() for file in facts.files):
        return facts
    _described.cache_clear()  # deleted since
    return CheckpointFacts(**json.loads(_described(told)))


@cache
def _described(told: str) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    cache_dir = str(Path(json.loads(told)["cache_dir"]).expanduser())
    done = subprocess.run(
        [sys.executable, "-m", "experiments.checkpoints"],
        input=told,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": path, "FLEXINFER_CACHE": cache_dir},
    )
    return done.stdout.splitlines()[-1]


def _describe(model: ModelConfig, format: str, cache_dir: str) -> CheckpointFacts:
    """Opening a GGUF file leaves its config and tokenizer in the cache, so that no cell pays for
    them.
    """
    from flexinfer.formats.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(_make(model, format, Path(cache_dir).expanduser()))
    told = json.loads((checkpoint.config_dir / "config.json").read_text())
    told |= told.get("text_config", {})
    experts = sum(spec.nbytes for name, spec in checkpoint.tensors.items() if EXPERTS.search(name))
    count = (
        told.get("num_local_experts")
        or told.get("num_experts")
        or told.get("n_routed_experts")
        or 1
    )
    untouched = experts - experts * (told.get("num_experts_per_tok") or 0) // count
    layers: dict[str, int] = {}
    outside: dict[str, int] = {}
    for name, spec in checkpoint.tensors.items():
        number = next((part for part in name.split(".") if part.isdigit()), None)
        group, key = (outside, name) if number is None else (layers, number)
        group[key] = group.get(key, 0) + spec.nbytes
    heads = told["num_attention_heads"]
    head_width = told.get("head_dim") or told["hidden_size"] // heads
    embeddings = ("token_embd.weight", "wte.weight")
    embedding = sum(
        size for name, size in outside.items() if "embed" in name or name.endswith(embeddings)
    )
    tied = not any(name.startswith(("lm_head", "embed_out", "output.")) for name in outside)
    matrices = [spec for spec in checkpoint.tensors.values() if len(spec.shape) > 1]
    return CheckpointFacts(
        path=str(checkpoint.path),
        files=[str(file) for file in checkpoint.files],
        vocab=told["vocab_size"],
        layers=len(layers),
        touched_bytes=sum(layers.values())
        + sum(outside.values())
        - (0 if tied else embedding)
        - untouched,
        untouched_bytes=untouched,
        kv_bytes_per_token=4
        * len(layers)
        * (told.get("num_key_value_heads") or heads)
        * head_width,
        bits=8
        * sum(spec.nbytes for spec in matrices)
        / sum(math.prod(spec.shape) for spec in matrices),
    )


def _make(model: ModelConfig, format: str, cache_dir: Path) -> Path:
    """Where the checkpoint lies, made now unless it is there.

    It is a file for GGUF, a directory otherwise.
    """
    if model.kind == "path":
        return Path(str(model.path)).expanduser()
    if model.kind == "real":
        from experiments.smollm2 import make_smollm2, smollm2_gguf

        return smollm2_gguf(cache_dir) if format in GGUF_FORMATS else make_smollm2(cache_dir)
    if format in GGUF_FORMATS:
        from experiments.gguf import make_gguf

        return make_gguf(model, format, cache_dir)
    from experiments.synth import make_checkpoint

    return make_checkpoint(model, format, cache_dir)


def main() -> int:
    """The helper process: a model and a format as JSON on stdin, the facts of its checkpoint as the
    last line.
    """
    told = json.loads(sys.stdin.read())
    facts = _describe(from_dict(ModelConfig, told["model"]), told["format"], told["cache_dir"])
    print(json.dumps(asdict(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
