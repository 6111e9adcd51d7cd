"""The form in which a tokenizer is kept: it loads in half the memory, and is what AutoTokenizer
made, attribute by attribute.

`python -m flexinfer.formats.tokenizer_form make SOURCE FORM` has AutoTokenizer build the tokenizer
of directory SOURCE, in a process of its own and without torch, and writes to directory FORM the
class, the attributes and the backend of what came out. It then reads the form and compares both on
awkward texts; where they differ, or the tokenizer has no backend of the tokenizers library,
facts.json says that the stock one has to be used. `... measure SOURCE FORM` loads it as
flexinfer.formats.tokenizer will and adds to facts.json what that takes.

tokenizer.json holds a vocabulary and its merges as text that the library parses into a tree first:
340 MB at the peak for 262,000 tokens. Byte-pair vocabularies are kept as words and numbers instead,
and handed over one merge after the other: 170 MB.
"""

import contextlib
import ctypes
import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import is_offline_mode
from tokenizers import AddedToken, Tokenizer, models

from flexinfer.formats.child import NO_ROOM, guarded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS, STATE, WORDS, REST, WHOLE = (
    "facts.json",
    "state.json",
    "words.bin",
    "rest.json",
    "tokenizer.json",
)

OF_GGUF = "of_gguf"  # a file beside the tokenizer of a GGUF file, which it names

# Attributes: the last two are copies, for the constructor alone.
KEPT_IN_BACKEND = ("_tokenizer", "_vocab", "_merges")

LIMIT_BYTES = 1 << 10  # of a message

DISTINCT_WORDS = 12_000  # more than the library remembers the tokens of

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

# ---- the form


def write_form(tokenizer: Any, source: Path, form: Path) -> None:
    """Write class, attributes and backend.

    Raises TypeError for an attribute that cannot be kept.
    """
    kind = type(tokenizer)
    if kind.__module__.partition(".")[0] != "transformers" or not hasattr(tokenizer, "_tokenizer"):
        raise TypeError(f"{kind.__name__} is not made of the tokenizers library by transformers")
    kept = {name: value for name, value in vars(tokenizer).items() if name not in KEPT_IN_BACKEND}
    state = {
        "module": kind.__module__,
        "class": kind.__qualname__,
        "attributes": _encoded(kept, str(source)),
    }
    (form / STATE).write_text(json.dumps(state), encoding="utf-8")
    tokenizer._tokenizer.save(str(form / WHOLE), pretty=False)


def split_vocabulary(form: Path) -> None:
    """Keep a byte-pair vocabulary as words and numbers, in place of tokenizer.json."""
    whole = json.loads((form / WHOLE).read_text(encoding="utf-8"))
    if whole["model"]["type"] != "BPE":
        return
    vocabulary, merges = whole["model"].pop("vocab"), whole["model"].pop("merges")
    place = {word: i for i, word in enumerate(vocabulary)}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    numbers = (
        vocabulary.values(),
        (place[left] for left, _ in pairs),
        (place[right] for _, right in pairs),
    )
    with (form / WORDS).open("wb") as stream:
        array("Q", (len(place), len(pairs))).tofile(stream)
        for column in numbers:
            array("I", column).tofile(stream)
        stream.write(json.dumps(list(place), ensure_ascii=False).encode())
    (form / REST).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    (form / WHOLE).unlink()


def read_form(source: Path, form: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer that was written to `form`; where it speaks of its files, these are those of
    `source`.
    """
    state = json.loads((form / STATE).read_text(encoding="utf-8"))
    kind: Any = getattr(importlib.import_module(state["module"]), state["class"])
    tokenizer: Any = kind.__new__(kind)
    vars(tokenizer).update(_decoded(state["attributes"], str(source)))
    backend = Tokenizer.from_file(str(form / WHOLE)) if (form / WHOLE).is_file() else _backend(form)
    tokenizer.init_kwargs["local_files_only"] = is_offline_mode()  # as from_pretrained notes it
    backend.encode_special_tokens = tokenizer.split_special_tokens
    tokenizer._tokenizer = backend
    return tokenizer


class _Merges(Sequence[tuple[str, str]]):
    """Pairs of words, each made when it is asked for: the library copies them one by one."""

    def __init__(self, words: list[str], left: "array[int]", right: "array[int]") -> None:
        self._words, self._left, self._right = words, left, right

    def __len__(self) -> int:
        return len(self._left)

    def __getitem__(self, place: Any) -> Any:
        return self._words[self._left[place]], self._words[self._right[place]]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        words = self._words
        return (
            (words[left], words[right]) for left, right in zip(self._left, self._right, strict=True)
        )


def _backend(form: Path) -> Tokenizer:
    with (form / WORDS).open("rb") as stream:

        def numbers(kind: str, count: int) -> "array[int]":
            column = array(kind)
            column.fromfile(stream, count)
            return column

        tokens, merges = numbers("Q", 2)
        ids, left, right = numbers("I", tokens), numbers("I", merges), numbers("I", merges)
        words: list[str] = json.loads(stream.read())
    rest = json.loads((form / REST).read_text(encoding="utf-8"))
    options = {
        name: value for name, value in rest["model"].items() if name != "type" and value is not None
    }
    pairs: Any = _Merges(words, left, right)
    backend = Tokenizer(
        models.BPE(vocab=dict(zip(words, ids, strict=True)), merges=pairs, **options)
    )
    added = sorted(rest.pop("added_tokens"), key=lambda token: token["id"])
    empty = Tokenizer.from_str(
        json.dumps(rest | {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}})
    )
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(empty, part) is not None:
            setattr(backend, part, getattr(empty, part))
    if empty.padding is not None:
        backend.enable_padding(**empty.padding)
    if empty.truncation is not None:
        backend.enable_truncation(**empty.truncation)
    for token in added:
        del token["id"]
    backend.add_tokens([AddedToken(**token) for token in added])
    return backend


def _encoded(value: Any, source: str) -> Any:
    """`value` for JSON: what JSON has no word for as a list of its kind and its parts.

    Raises TypeError for anything else.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        inside = value == source or value.startswith(source + os.sep)
        return ["path", value[len(source) :]] if inside else value
    if isinstance(value, AddedToken):
        facts: Any = value.__getstate__()
        return ["token", facts]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_encoded(one, source) for one in value]]
    if type(value) is dict:
        return [
            "dict",
            [[_encoded(key, source), _encoded(one, source)] for key, one in value.items()],
        ]
    raise TypeError(f"an attribute of class {type(value).__name__}")


def _decoded(value: Any, source: str) -> Any:
    if not isinstance(value, list):
        return value
    kind, parts = value
    if kind == "path":
        return source + parts
    if kind == "token":
        return AddedToken(**parts)
    if kind == "dict":
        return {_decoded(key, source): _decoded(one, source) for key, one in parts}
    items = [_decoded(one, source) for one in parts]
    return tuple(items) if kind == "tuple" else items


# ---- the process that makes it


def make(source: Path, form: Path) -> None:
    """Write the form of the tokenizer in `source`, and facts.json.

    Raises what AutoTokenizer raises.
    """
    facts: dict[str, Any] = {"stock": None}  # why the stock one has to be used, if it has to be
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


def stock_tokenizer(source: Path) -> Any:
    """AutoTokenizer's, or, where that cannot be made, what tokenizer.json says: of a GGUF file too,
    whose header says more than the class of its model.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (source / OF_GGUF).is_file():
        return PreTrainedTokenizerFast.from_pretrained(source)
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        if not (source / WHOLE).is_file():
            raise
        tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
        print(
            f"AutoTokenizer cannot make it ({type(error).__name__}: {error}): tokenizer.json is "
            "taken as it is"
        )
        return tokenizer


def observe(tokenizer: Any, scratch: Path) -> dict[str, Any]:
    """What a tokenizer does with awkward texts, by name. An error is a result too."""

    def batch(side: str) -> Any:
        before = tokenizer.padding_side
        tokenizer.padding_side = side
        try:
            return dict(tokenizer(list(TEXTS), padding=True, truncation=True, max_length=9))
        finally:
            tokenizer.padding_side = before

    def saved() -> Any:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            tokenizer.save_pretrained(folder)
            files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
            return {
                str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
                for f in files
            }

    def vocabulary() -> Any:
        digest = hashlib.sha256()
        for word, number in sorted(tokenizer.get_vocab().items()):
            digest.update(f"{word}\0{number}\0".encode(errors="surrogatepass"))
        return digest.hexdigest()

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
        "padded left": lambda: batch("left"),
        "padded right": lambda: batch("right"),
        "there and back": lambda: [
            tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=skip)
            for text in TEXTS
            for skip in (False, True)
        ],
        "decoded": lambda: [tokenizer.decode([number]) for number in ids] + [tokenizer.decode(ids)],
        "tokens": lambda: tokenizer.convert_ids_to_tokens(ids),
        "vocabulary": vocabulary,
        "sizes": lambda: (len(tokenizer), tokenizer.vocab_size, repr(tokenizer), tokenizer.is_fast),
        "added": lambda: repr(sorted(tokenizer.added_tokens_decoder.items())),
        "special ids": lambda: (tokenizer.all_special_ids, repr(tokenizer.special_tokens_map)),
        "saved": saved,
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


def difference(expected: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """The first thing that differs."""
    return next(
        (f"{name} differs" for name, value in expected.items() if ours[name] != value), None
    )


# ---- the process that measures it


def load(source: Path, form: Path, stock: bool) -> Any:
    """The tokenizer, as flexinfer.formats.tokenizer loads it."""
    return stock_tokenizer(source) if stock else read_form(source, form)


def measure(source: Path, form: Path) -> None:
    """Add to facts.json what the tokenizer takes in memory: at most while it is loaded, afterwards,
    and when it has been used.
    """
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: F401  (as flexinfer.model has them)

    facts = json.loads((form / FACTS).read_text(encoding="utf-8"))
    Tokenizer(models.BPE()).encode("a")
    give_back()
    before, resident = _anonymous_bytes(), _status("VmRSS")
    with contextlib.suppress(OSError):  # else the peak of the whole process counts
        Path("/proc/self/clear_refs").write_text("5")
    tokenizer = load(source, form, bool(facts["stock"]))
    peak = _status("VmHWM")
    give_back()
    loaded = _anonymous_bytes()
    tokenizer(" ".join(str(number * 7919) for number in range(DISTINCT_WORDS)))
    ids = tokenizer(list(TEXTS))["input_ids"]
    tokenizer.batch_decode(ids)
    for chat in CHATS[: 2 if tokenizer.chat_template else 0]:
        with contextlib.suppress(Exception):  # a template that wants something else
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    give_back()
    facts |= {
        "peak_bytes": max(peak - resident, loaded - before),
        "stays_bytes": max(0, loaded - before),
        "use_bytes": max(0, _anonymous_bytes() - loaded),
        "sizes": {file.name: file.stat().st_size for file in form.iterdir() if file.name != FACTS},
    }
    (form / FACTS).write_text(json.dumps(facts), encoding="utf-8")


def give_back() -> None:
    """What is not used any more, to the system."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _anonymous_bytes() -> int:
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def main(role: str, source: str, form: str) -> int:
    """In a process of its own, without torch, which no tokenizer needs."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    from transformers.utils import logging

    logging.set_verbosity_error()
    return guarded(lambda: {"make": make, "measure": measure}[role](Path(source), Path(form)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
