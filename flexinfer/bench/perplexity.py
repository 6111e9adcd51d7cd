"""Perplexity of a checkpoint on a text: what quantising costs in quality, in one number.

    python -m flexinfer.bench.perplexity TEXT_FILE CHECKPOINT [CHECKPOINT ...]

The text is cut into windows that do not overlap, each begun without memory of the one before; the result is the
exponential of the mean negative log-likelihood of all tokens but the first of each window. Compare checkpoints on one
text only: the number depends on text, window and tokenizer. Cost: one forward pass a window.

Works on any transformers model; the command runs checkpoints, packed or not, through flexinfer.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel

import flexinfer

WINDOW_TOKENS = 512


def perplexity(model: PreTrainedModel, token_ids: torch.Tensor, window_tokens: int = WINDOW_TOKENS) -> float:
    """Perplexity of `token_ids` [tokens], in windows of `window_tokens`.

    Raises: ValueError for a text of fewer than two tokens or a window of fewer than two.
    """
    if len(token_ids) < 2 or window_tokens < 2:
        raise ValueError(
            f"token_ids: {len(token_ids)} tokens in windows of {window_tokens}; both need two or more"
        )
    total, count = 0.0, 0
    for window in token_ids.split(window_tokens):
        if len(window) < 2:
            continue
        with torch.inference_mode():
            logits = (
                model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
            )  # [tokens - 1, vocab]
        total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
        count += len(window) - 1
    return math.exp(total / count)


def main() -> None:
    """Print one JSON line a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoint", type=Path, nargs="+")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--window-tokens", type=int, default=WINDOW_TOKENS)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    for path in arguments.checkpoint:
        token_ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[0]
        model = flexinfer.from_pretrained(path, memory=arguments.memory, context=arguments.window_tokens)
        value = perplexity(model, token_ids, arguments.window_tokens)
        model.flexinfer.close()  # type: ignore[union-attr, operator]
        result = {"checkpoint": str(path), "tokens": len(token_ids), "window_tokens": arguments.window_tokens}
        print(json.dumps(result | {"perplexity": value}), flush=True)


if __name__ == "__main__":
    main()
