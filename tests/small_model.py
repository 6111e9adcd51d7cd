"""A small random model that can talk: what the tests of the command line and of the README run."""

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}<assistant>"
CONFIG: dict[str, Any] = {
    "vocab_size": 259,
    "intermediate_size": 192,
    "max_position_embeddings": 4096,
    "eos_token_id": None,  # it never ends by itself
}


def add_tokenizer(checkpoint: Path, path: Path) -> Path:
    """A copy of `checkpoint` (made with CONFIG) at `path`, with a tokenizer of bytes and a chat
    template.
    """
    shutil.copytree(checkpoint, path)
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(path)
    return path
