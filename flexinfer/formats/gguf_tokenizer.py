"""Makes the tokenizer that a GGUF file describes: `python -m flexinfer.formats.gguf_tokenizer FILE DIRECTORY`.

A process of its own, without torch: building a vocabulary of 260,000 tokens takes some hundred megabytes, which would stay. By transformers'
own conversion, completed where it does not know how a vocabulary cuts text before its merges.
"""

import sys
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from flexinfer.formats.gguf import read_gguf

ARRAYS = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
EACH_DIGIT = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
AS_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo", "phi-2"}


def make_tokenizer(file: Path, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template. Raises ValueError for a kind of tokenizer that is not known."""
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    gguf = read_gguf(file, [f"tokenizer.ggml.{name}" for name in ARRAYS])
    values: dict[str, dict[str, Any]] = {
        group: {
            theirs: gguf.metadata[f"tokenizer.{key}"]
            for key, theirs in renames.items()
            if f"tokenizer.{key}" in gguf.metadata
        }
        for group, renames in GGUF_TOKENIZER_MAPPING.items()
    }
    tokens, config = values["tokenizer"], values["tokenizer_config"]
    backend, more = convert_gguf_tokenizer(gguf.architecture, tokens)
    kind = tokens.get("pre_tokenizer_type")
    if kind in EACH_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif tokens["tokenizer_type"] == "gpt2" and kind not in GGUF_PRE_TOKENIZER_SPLITS and kind not in AS_GPT2:
        print(f"tokenizer.ggml.pre is {kind!r}, which is not known: text is cut as GPT-2 does")
    if tokens["tokenizer_type"] == "llama":
        config.setdefault("add_bos_token", True)
    for name, theirs in SPECIAL.items():
        number = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[theirs] = None if number is None else tokens["tokens"][number]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **config, **more)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    make_tokenizer(Path(sys.argv[1]), Path(sys.argv[2]))
