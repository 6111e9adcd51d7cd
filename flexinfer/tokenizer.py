"""A tokenizer in little memory.

`AutoTokenizer` takes a vocabulary apart into Python objects and puts it together again for some families: 220 MB stay, and more are used on
the way, for the 256,000 tokens of Gemma. The file `tokenizer.json` holds the whole tokenizer, and the `tokenizers` library
reads it as it is, in a third of that. What comes out is a stock transformers tokenizer all the same: templates, special tokens, padding.
"""

from pathlib import Path

from flexinfer.formats.checkpoint import CheckpointError
from flexinfer.formats.gguf_model import NO_TOKENIZER
from flexinfer.imports import deferred
from flexinfer.streaming.memory import return_freed_memory, trim_heap

with deferred():
    from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILE = "tokenizer.json"
OTHER_FILES = ("tokenizer*", "vocab*", "*.model")
BYTES_IN_MEMORY = 5.2  # for each byte of tokenizer.json, with what is used on the way given back
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
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(path)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path)
    trim_heap()
    return tokenizer


def has_tokenizer(path: Path) -> bool:
    """Whether the files of a tokenizer lie in directory `path`."""
    return any(file for pattern in OTHER_FILES for file in path.glob(pattern))


def tokenizer_bytes(path: Path) -> int:
    """What the tokenizer in `path` will take in memory, about; 0 where there is none."""
    if not has_tokenizer(path):
        return 0
    file = path / FILE
    size_bytes = file.stat().st_size if file.is_file() else 0
    return SMALLEST_BYTES + int(BYTES_IN_MEMORY * size_bytes)
