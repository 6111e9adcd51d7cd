"""Makes the tokenizer that a GGUF file describes: `python -m flexinfer.formats.gguf_tokenizer FILE
DIRECTORY`.

A process of its own, without torch: building a vocabulary of 260,000 tokens takes some hundred
megabytes, which would stay. By transformers' own conversion, completed where it does not know how a
vocabulary cuts text before its merges.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, processors

from flexinfer.formats.child import guarded
from flexinfer.formats.gguf import read_gguf

ARRAYS = ("tokens", "scores", "token_type", "merges", "precompiled_charsmap")
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
END_KEYS = (
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
)
EACH_DIGIT = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
# Of an answer.
ENDS = {"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"}
# Of these a word of the vocabulary is never cut, and a text begins with BOS unless it is said
# otherwise.
WHOLE_WORDS = {"falcon3", "llama-bpe", "llama-v3", "llama3", "tekken"}
AS_GPT2 = {"default", "gpt-2", "jais", "mpt", "olmo", "phi-2"}


def make_tokenizer(file: Path, directory: Path) -> None:
    """Write tokenizer.json and, with the chat template, tokenizer_config.json; add to
    generation_config.json what ends an answer.

    Raises ValueError for a kind of tokenizer that is not known.
    """
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
    backend, _ = convert_gguf_tokenizer(gguf.architecture, tokens)
    kind = tokens.get("pre_tokenizer_type")
    known = kind in GGUF_PRE_TOKENIZER_SPLITS or kind in AS_GPT2
    if kind in EACH_DIGIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif tokens["tokenizer_type"] == "gpt2" and not known:
        print(f"tokenizer.ggml.pre is {kind!r}, which is not known: text is cut as GPT-2 does")
    if kind in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if kind in WHOLE_WORDS or tokens["tokenizer_type"] == "llama":
        config.setdefault("add_bos_token", True)
    for name, theirs in SPECIAL.items():
        number = gguf.metadata.get(f"tokenizer.ggml.{name}_token_id")
        config[theirs] = None if number is None else tokens["tokens"][number]
    backend.post_processor = _with_ends(config, tokens["tokens"])
    backend.save(str(directory / "tokenizer.json"), pretty=False)
    config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ends = {number for number, token in enumerate(tokens["tokens"]) if token in ENDS}
    ends |= {gguf.metadata[key] for key in END_KEYS if key in gguf.metadata}
    generation = directory / "generation_config.json"
    generation.write_text(
        json.dumps(json.loads(generation.read_text()) | {"eos_token_id": sorted(ends)})
    )


def _with_ends(config: dict[str, Any], words: list[str]) -> Any:
    """What puts BOS and EOS around a text, by settings that it takes out of `config`."""

    def end(name: str) -> list[str]:
        wanted = config.pop(f"add_{name}", False)
        return [config[name]] if wanted and config[name] else []

    before, after = end("bos_token"), end("eos_token")
    second = [f"{token}:1" for token in before], [f"{token}:1" for token in after]
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second[0], "$B:1", *second[1]],
        special_tokens=[(token, words.index(token)) for token in before + after],
    )


def main(file: str, directory: str) -> int:
    """In a process of its own."""
    return guarded(lambda: make_tokenizer(Path(file), Path(directory)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
