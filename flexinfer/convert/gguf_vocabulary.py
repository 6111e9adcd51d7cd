"""The tokenizer of a checkpoint in the words of a GGUF header: tokenizer.json as tokens, types, merges or scores.

For llama.cpp, and whoever reads the file alone; flexinfer itself takes the tokenizer files beside it. Byte-level BPE is llama.cpp's "gpt2", BPE
with bytes to fall back on its "llama" (SentencePiece): there a merge is made where the token that it makes has the best score, so a token's score is the
place of its merge, negative. How text is cut before its merges has a name in llama.cpp ("pre"), found by the pattern.
"""

import json
from pathlib import Path
from typing import Any

from gguf import SpecialVocab, TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

CUTS = (
    "llama-bpe",
    "qwen2",
    "tekken",
    "gpt-4o",
    "qwen35",
)  # of names with one pattern, the one that llama.cpp began with


def vocabulary(directory: Path, vocab_size: int) -> tuple[dict[str, Any], list[str]]:
    """Values "tokenizer..." of a header, by name, and what of the tokenizer they do not say. `vocab_size`: rows of the embedding.

    Raises ValueError for a tokenizer that llama.cpp has no kind for, or that is not there.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ValueError("there is no tokenizer.json beside the weights")
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model, notes = tokenizer["model"], []
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a tokenizer of kind {model.get('type')}")
    ids: dict[str, int] = dict(model["vocab"])
    kinds = dict.fromkeys(ids.values(), TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        ids[added["content"]] = added["id"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    token_of = {number: token for token, number in ids.items()}
    if max(token_of) >= vocab_size:
        raise ValueError(f"token {max(token_of)} has no row in an embedding of {vocab_size}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    bytes_apart = bool(model.get("byte_fallback"))
    if bytes_apart:
        for token, number in ids.items():
            if len(token) == 6 and token.startswith("<0x"):
                kinds[number] = TokenType.BYTE
        if model.get("unk_token") in ids:
            kinds[ids[model["unk_token"]]] = TokenType.UNKNOWN
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if bytes_apart else "gpt2",
        "tokenizer.ggml.tokens": [token_of.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [int(kinds.get(i, TokenType.UNUSED)) for i in range(vocab_size)],
    }
    if bytes_apart:
        rank = {merge.replace(" ", ""): -float(place) for place, merge in reversed(list(enumerate(merges)))}
        lowest = -float(len(merges))
        values["tokenizer.ggml.scores"] = [rank.get(token_of.get(i, ""), lowest) for i in range(vocab_size)]
        values["tokenizer.ggml.add_space_prefix"] = "prepend" in json.dumps(
            [tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]
        ).lower().replace('"prepend_scheme": "never"', "")
    else:
        name = _cut(tokenizer.get("pre_tokenizer"))
        if name is None:
            notes.append(
                "how the tokenizer cuts text has no name in llama.cpp: there it is cut as GPT-2 does"
            )
        values |= {"tokenizer.ggml.pre": name or "default", "tokenizer.ggml.merges": merges}
    special = SpecialVocab(directory, n_vocab=vocab_size)
    values |= {
        f"tokenizer.ggml.{_gguf_name(name)}_token_id": number
        for name, number in special.special_token_ids.items()
    }
    values |= {f"tokenizer.ggml.add_{name}_token": add for name, add in special.add_special_token.items()}
    if isinstance(special.chat_template, str):
        values["tokenizer.chat_template"] = special.chat_template
    return values, notes


def _gguf_name(name: str) -> str:
    return {"unk": "unknown", "sep": "seperator", "pad": "padding"}.get(name, name)


def _cut(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name of how text is cut, or None."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps if step]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = steps[0]["pattern"].get("Regex")
        return next((name for name in CUTS if GGUF_PRE_TOKENIZER_SPLITS.get(name) == pattern), None)
    return None
