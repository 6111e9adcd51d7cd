"""A tokenizer in little memory.

`AutoTokenizer` takes a vocabulary apart into Python objects and puts it together again for some families: 220 MB stay, and more are used on
the way, for the 256,000 tokens of Gemma. The file `tokenizer.json` holds the whole tokenizer, and the `tokenizers` library
reads it as it is, in a third of that. What comes out is a stock transformers tokenizer all the same: templates, special tokens, padding.
"""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flexinfer.formats.gguf_model import NO_TOKENIZER
from flexinfer.formats.tensors import CheckpointError
from flexinfer.memory.heap import return_freed_memory, trim_heap

FILE = "tokenizer.json"

OTHER_FILES = ("tokenizer*", "vocab*", "merges*", "*.model")

# For each byte of tokenizer.json (docs/log.md), and of the other files where there is none: those two are estimates
BYTES_IN_MEMORY, BYTES_WHILE_LOADING = 4.8, 10.0

OTHER_BYTES_IN_MEMORY, OTHER_BYTES_WHILE_LOADING = 50.0, 110.0

SMALLEST_BYTES = 2 << 20


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in directory `path`.

    Raises CheckpointError when there is none. Without a tokenizer.json it is AutoTokenizer's, with the memory that takes.
    """
    return_freed_memory()
    if not has_tokenizer(path):
        if (path / NO_TOKENIZER).is_file():
            why = (path / NO_TOKENIZER).read_text()
            raise CheckpointError(
                f"no tokenizer could be made from the GGUF file: {why}; load one of your own"
            )
        raise CheckpointError(
            f"{path}: no tokenizer beside the weights; put its files there (tokenizer.json, ...)"
        )
    if (path / FILE).is_file():
        options = _added_tokens(path)
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(path, **options)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
    trim_heap()
    return tokenizer


def _added_tokens(path: Path) -> dict[str, Any]:
    """The added tokens of tokenizer.json, as a keyword of `from_pretrained`: it takes the whole file apart for them otherwise,
    into half as much memory again. Nothing where other files have a say in it, or the file is laid out in another way.
    """
    if any((path / name).is_file() for name in ("special_tokens_map.json", "added_tokens.json")):
        return {}
    text = (path / FILE).read_bytes()
    start, stop = text.find(b'"added_tokens"'), text.find(b'"normalizer"')
    try:
        listed = json.loads(b"{" + text[start:stop].rstrip().rstrip(b",") + b"}")["added_tokens"]
        return {"added_tokens_decoder": {token.pop("id"): token for token in listed}}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def has_tokenizer(path: Path) -> bool:
    """Whether the files of a tokenizer lie in directory `path`."""
    return any(file for pattern in OTHER_FILES for file in path.glob(pattern))


def tokenizer_bytes(path: Path) -> int:
    """What the tokenizer in `path` will take in memory, about; 0 where there is none."""
    return _bytes(path, BYTES_IN_MEMORY, OTHER_BYTES_IN_MEMORY)


def loading_bytes(path: Path) -> int:
    """The most that loading the tokenizer in `path` will take, about; 0 where there is none."""
    return _bytes(path, BYTES_WHILE_LOADING, OTHER_BYTES_WHILE_LOADING)


def _bytes(path: Path, of_json: float, of_others: float) -> int:
    if not has_tokenizer(path):
        return 0
    if (path / FILE).is_file():
        return SMALLEST_BYTES + int(of_json * (path / FILE).stat().st_size)
    files = {file for pattern in OTHER_FILES for file in path.glob(pattern) if file.suffix != ".json"}
    return SMALLEST_BYTES + int(of_others * sum(file.stat().st_size for file in files))
