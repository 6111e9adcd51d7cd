"""What quantising costs in quality: the perplexity of a checkpoint and of copies of it, by ggml's
types, as records.

    python -m experiments.perplexity CHECKPOINT --types q4_0,q4_k,q8_0 --record
    results/quality/perplexity.jsonl

The text is Python's own documentation (`pydoc_data.topics`), which lies on every machine, or a file
(--text). It is cut into windows that do not overlap, each begun without memory of the one before;
the result is the exponential of the mean negative log-likelihood of all tokens but the first of
each window. Compare checkpoints on one text only: the number depends on text, window and tokenizer.
Copies are made in a temporary directory, one at a time. One JSON line for the checkpoint itself
("source") and for each type. Cost: one forward pass a window.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

import flexinfer
from experiments.agreement import documentation
from experiments.provenance import provenance
from experiments.synth import default_cache_dir
from flexinfer.convert.quantize import Report, quantize
from flexinfer.formats.ggml_types import KINDS
from flexinfer.formats.hub import resolve

WINDOW_TOKENS = 512


def perplexity(
    model: PreTrainedModel, token_ids: torch.Tensor, window_tokens: int = WINDOW_TOKENS
) -> float:
    """Perplexity of `token_ids` [tokens], in windows of `window_tokens`.

    Raises: ValueError for a text of fewer than two tokens or a window of fewer than two.
    """
    if len(token_ids) < 2 or window_tokens < 2:
        raise ValueError(
            f"token_ids: {len(token_ids)} tokens in windows of {window_tokens}; both need two or "
            "more"
        )
    total, count = 0.0, 0
    for window in token_ids.split(window_tokens):
        if len(window) < 2:
            continue
        with torch.inference_mode():
            # [tokens - 1, vocab].
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def measure(
    path: Path, token_ids: torch.Tensor, memory: str, window_tokens: int, dtype: str
) -> dict[str, Any]:
    """Perplexity of the checkpoint in `path`, and the bytes of its weights."""
    model: Any = flexinfer.from_pretrained(
        path, memory, context=window_tokens, logits_to_keep=window_tokens, dtype=dtype
    )
    try:
        value = perplexity(model, token_ids, window_tokens)
        return {"perplexity": value, "weights_bytes": model.flexinfer.plan.total_bytes}
    finally:
        model.flexinfer.close()


def main() -> None:
    """Print one JSON line for the checkpoint and for each type; add them to the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--types", default=",".join(KINDS).lower(), help="ggml's types, or nothing for none"
    )
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    parser.add_argument(
        "--dtype",
        default="float32",
        help="what the checkpoint itself is computed in; copies are in float32",
    )
    parser.add_argument("--record", type=Path)
    arguments = parser.parse_args()
    path = resolve(arguments.checkpoint)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else documentation()
    token_ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0][
        : arguments.tokens
    ]
    facts = {
        "checkpoint": path.resolve().name,
        "text": arguments.text.name if arguments.text else "pydoc_data.topics",
        "tokens": len(token_ids),
        "window_tokens": arguments.window_tokens,
        "provenance": provenance(default_cache_dir()).model_dump(mode="json"),
    }
    for kind in ["source", *filter(None, arguments.types.split(","))]:
        with tempfile.TemporaryDirectory(dir=default_cache_dir()) as scratch:
            report: Report | None = None
            if kind != "source":
                report = quantize(path, Path(scratch) / "copy", kind, progress=False)
            found = measure(
                report.path if report else path,
                token_ids,
                arguments.memory,
                arguments.window_tokens,
                arguments.dtype,
            )
        if report:
            found |= {"copy_bytes": report.nbytes, "seconds_to_make": round(report.seconds, 1)}
            found["relative_error"] = math.sqrt(
                sum(one.relative_error**2 for one in report.packed) / len(report.packed)
            )
        line = json.dumps({"type": kind} | found | facts)
        print(line, flush=True)
        if arguments.record is not None:
            arguments.record.parent.mkdir(parents=True, exist_ok=True)
            with arguments.record.open("a") as stream:
                stream.write(line + "\n")


if __name__ == "__main__":
    main()
