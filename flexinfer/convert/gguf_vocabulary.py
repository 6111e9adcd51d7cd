"""The tokenizer of a checkpoint in a GGUF header: tokenizer.json as tokens, types, merges or
scores.

For llama.cpp, and whoever reads the file alone; flexinfer itself takes the tokenizer files beside
it. Byte-level BPE is llama.cpp's "gpt2", BPE with bytes to fall back on its "llama"
(SentencePiece): there a merge is made where the token that it makes has the best score, so a
token's score is the place of its merge, negative (the `gguf` package's own vocabularies give all
tokens one score). How text is cut before its merges has a name in llama.cpp, found by the pattern.
"""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

# Of names with one pattern, the one that llama.cpp began with.
CUTS = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")


def add_vocabulary(writer: GGUFWriter, directory: Path, vocab_size: int) -> list[str]:
    """Add the tokenizer in `directory`; returns what of it the header does not say.

    vocab_size: rows of the embedding.
    """
    falls_back = True
    try:
        falls_back, notes = _add_tokens(writer, directory / "tokenizer.json", vocab_size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        notes = [f"the file alone has no tokenizer ({error})"]
    try:
        special = SpecialVocab(directory, load_merges=not falls_back, n_vocab=vocab_size)
        special.add_to_gguf(writer, quiet=True)
    except ValueError as error:
        notes.append(f"the file alone has no special tokens ({error})")
    return notes


def _add_tokens(writer: GGUFWriter, file: Path, vocab_size: int) -> tuple[bool, list[str]]:
    """Add the tokens; returns whether they have scores instead of merges, and notes.

    Raises ValueError for a tokenizer that llama.cpp has no kind for, or that is not there.
    """
    if not file.is_file():
        raise ValueError("there is no tokenizer.json beside the weights")
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a tokenizer of kind {model.get('type')}")
    falls_back = bool(model.get("byte_fallback"))
    ids, kinds = _tokens(tokenizer, falls_back)
    token_of = {number: token for token, number in ids.items()}
    if max(token_of) >= vocab_size:
        raise ValueError(f"token {max(token_of)} has no row in an embedding of {vocab_size}")
    name = _cut(tokenizer.get("pre_tokenizer"))
    merged = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("llama" if falls_back else "gpt2")
    writer.add_token_list([token_of.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types([int(kinds.get(i, TokenType.UNUSED)) for i in range(vocab_size)])
    if not falls_back:
        writer.add_tokenizer_pre(name or "default")
        note = (
            "llama.cpp has no name for how the tokenizer cuts text: there it is cut as GPT-2 does"
        )
        return False, [] if name else [note]
    rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merged)))}
    writer.add_token_scores(
        [rank.get(token_of.get(i, ""), -float(len(merged))) for i in range(vocab_size)]
    )
    steps = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")]).lower()
    writer.add_add_space_prefix("prepend" in steps.replace('"prepend_scheme": "never"', ""))
    return True, []


def _tokens(
    tokenizer: dict[str, Any], falls_back: bool
) -> tuple[dict[str, int], dict[int, TokenType]]:
    """The number of each token, and the kind of each number."""
    model = tokenizer["model"]
    ids: dict[str, int] = dict(model["vocab"])
    kinds = dict.fromkeys(ids.values(), TokenType.NORMAL)
    for added in tokenizer.get("added_tokens", []):
        ids[added["content"]] = added["id"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if falls_back:
        kinds |= {
            n: TokenType.BYTE for token, n in ids.items() if len(token) == 6 and token[:3] == "<0x"
        }
        if model.get("unk_token") in ids:
            kinds[ids[model["unk_token"]]] = TokenType.UNKNOWN
    return ids, kinds


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
