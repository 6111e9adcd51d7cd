"""Makes the form in which a tokenizer is kept, and measures it, in two processes without torch.

`python -m flexinfer.formats.tokenizer_maker make SOURCE FORM` has AutoTokenizer build the tokenizer
of directory SOURCE and writes its form to directory FORM. It then reads the form and compares both
on awkward texts; where they differ, or the tokenizer has no backend of the tokenizers library,
facts.json says that the stock one has to be used. `... measure SOURCE FORM` loads it as
flexinfer.formats.tokenizer will, and adds to facts.json the memory that this takes.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models

from flexinfer.formats.child import NO_ROOM, guarded
from flexinfer.formats.tokenizer_form import (
    FACTS,
    WHOLE,
    load,
    read_form,
    split_vocabulary,
    stock_tokenizer,
    write_form,
)
from flexinfer.memory.heap import give_back
from flexinfer.memory.process import anonymous_bytes, peak_bytes, reset_peak, resident_bytes

# Longest message.
LIMIT_BYTES = 1 << 10
# More words than the library caches.
DISTINCT_WORDS = 12_000

TEXTS = (
    "",
    " ",
    " leading space",
    "trailing space ",
    "two  spaces   three\u00a0hard",
    "a\nb\n\n\nc\r\n\td",
    "12345 3.14 1,000,000 2026-11-28",
    "It's we'll they'RE I'm",
    "caf\u00e9 cafe\u0301 \u1e9b\u0323 A\u030a \ufb01 \u2126",
    "\u65e5\u672c\u8a9e\u306e\u6587 \u4e2d\u6587\uff0c\u6e2c\u8a66\u3002 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600 \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1f3\U0001f1f4",
    "\x00\x01\x07\x1b[0m\x7f\u200b\u202e\ufeff",
    "def f(x):\n    return x  # \u2581 \u0120 <0x0A>",
    "x" * 400,
    "<s>a</s> <|endoftext|><|im_start|>user\n<bos> <unk> [INST]",
    "Hello , world ! do n't .",
)

CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": " Hi "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello \U0001f600"},
        {"role": "user", "content": "Bye"},
    ],
)


def make(source: Path, form: Path) -> None:
    """Write the form of the tokenizer in `source`, and facts.json.

    Raises what AutoTokenizer raises.
    """
    # "stock": why the stock tokenizer has to be used, if it has to be.
    facts: dict[str, Any] = {"stock": None}
    stock: Any = stock_tokenizer(source)
    facts["has_template"] = bool(stock.chat_template)
    try:
        write_form(stock, source, form)
        expected = observe(stock, form)
        del stock
        give_back()
        split_vocabulary(form)
        give_back()
        facts["stock"] = difference(expected, observe(read_form(source, form), form))
        # Numbers of tokens that it does not give by itself.
        if facts["stock"] and not (form / WHOLE).is_file():
            whole: Any = stock_tokenizer(source)
            whole._tokenizer.save(str(form / WHOLE), pretty=False)
            del whole
            give_back()
            facts["stock"] = difference(expected, observe(read_form(source, form), form))
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        facts["stock"] = f"{type(error).__name__}: {error}"[:LIMIT_BYTES]
    (form / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def observe(tokenizer: Any, scratch: Path) -> dict[str, Any]:
    """What a tokenizer does with awkward texts, by name. An error is a result too."""
    words = [
        tokenizer.convert_ids_to_tokens(i) or ""
        for i in range(0, len(tokenizer), max(1, len(tokenizer) // 2000))
    ]
    words = [word for word in words if isinstance(word, str)]
    ids = list(range(0, len(tokenizer), max(1, len(tokenizer) // 500)))
    special = [*map(str, tokenizer.all_special_tokens), "plain"]
    looks: dict[str, Callable[[], Any]] = {
        "ids": lambda: [tokenizer(text)["input_ids"] for text in TEXTS],
        "ids alone": lambda: [
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
        ],
        "encoding": lambda: [dict(tokenizer(text, return_offsets_mapping=True)) for text in TEXTS],
        "pairs": lambda: [dict(tokenizer(text, TEXTS[5])) for text in TEXTS],
        "words": lambda: tokenizer(words, add_special_tokens=False)["input_ids"],
        "special": lambda: [
            tokenizer(f"a {token}b{token} c{token}")["input_ids"] for token in special
        ],
        "padded left": lambda: _batch(tokenizer, "left"),
        "padded right": lambda: _batch(tokenizer, "right"),
        "there and back": lambda: [
            tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=skip)
            for text in TEXTS
            for skip in (False, True)
        ],
        "decoded": lambda: [tokenizer.decode([number]) for number in ids] + [tokenizer.decode(ids)],
        "tokens": lambda: tokenizer.convert_ids_to_tokens(ids),
        "vocabulary": lambda: _vocabulary(tokenizer),
        "sizes": lambda: (len(tokenizer), tokenizer.vocab_size, repr(tokenizer), tokenizer.is_fast),
        "added": lambda: repr(sorted(tokenizer.added_tokens_decoder.items())),
        "special ids": lambda: (tokenizer.all_special_ids, repr(tokenizer.special_tokens_map)),
        "saved": lambda: _saved(tokenizer, scratch),
    }
    for number, chat in enumerate(CHATS):
        for answer in (False, True):
            looks[f"chat {number} {answer}"] = lambda chat=chat, answer=answer: (  # type: ignore[misc]
                tokenizer.apply_chat_template(chat, add_generation_prompt=answer, tokenize=False),
                dict(
                    tokenizer.apply_chat_template(
                        chat, add_generation_prompt=answer, return_dict=True
                    )
                ),
            )
    seen: dict[str, Any] = {}
    for name, look in looks.items():
        try:
            seen[name] = look()
        except Exception as error:
            seen[name] = f"{type(error).__name__}: {error}"
    return seen


def _batch(tokenizer: Any, side: str) -> Any:
    before = tokenizer.padding_side
    tokenizer.padding_side = side
    try:
        return dict(tokenizer(list(TEXTS), padding=True, truncation=True, max_length=9))
    finally:
        tokenizer.padding_side = before


def _saved(tokenizer: Any, scratch: Path) -> Any:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return {
            str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files
        }


def _vocabulary(tokenizer: Any) -> str:
    digest = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{word}\0{number}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def difference(expected: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first thing that differs."""
    return next(
        (f"{name} differs" for name, value in expected.items() if ours[name] != value), None
    )


def measure(source: Path, form: Path) -> None:
    """Add to facts.json what the tokenizer takes in memory: at most while it is loaded, afterwards,
    and when it has been used.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: F401  (as flexinfer.model has them)

    facts = json.loads((form / FACTS).read_text(encoding="utf-8"))
    Tokenizer(models.BPE()).encode("a")
    give_back()
    before, resident = anonymous_bytes(), resident_bytes()
    reset_peak()
    tokenizer = load(source, form, bool(facts["stock"]))
    peak = peak_bytes()
    give_back()
    loaded = anonymous_bytes()
    tokenizer(" ".join(str(number * 7919) for number in range(DISTINCT_WORDS)))
    ids = tokenizer(list(TEXTS))["input_ids"]
    tokenizer.batch_decode(ids)
    for chat in CHATS[: 2 if tokenizer.chat_template else 0]:
        # A template may want something else.
        with contextlib.suppress(Exception):
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    give_back()
    facts |= {
        "peak_bytes": max(peak - resident, loaded - before),
        "stays_bytes": max(0, loaded - before),
        "use_bytes": max(0, anonymous_bytes() - loaded),
        "sizes": {file.name: file.stat().st_size for file in form.iterdir() if file.name != FACTS},
    }
    (form / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def main(role: str, source: str, form: str) -> int:
    """In a process of its own, without torch, which no tokenizer needs."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers.utils import logging

    logging.set_verbosity_error()
    return guarded(lambda: {"make": make, "measure": measure}[role](Path(source), Path(form)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
