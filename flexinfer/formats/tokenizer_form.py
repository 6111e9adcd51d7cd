"""The form in which a tokenizer is kept: it loads in half the memory, and is what AutoTokenizer
made, attribute by attribute.

A form is a directory with the class, the attributes and the backend of the tokenizer, and
facts.json. flexinfer.formats.tokenizer_maker makes it, in a process of its own.

tokenizer.json holds a vocabulary and its merges as text that the library parses into a tree first:
340 MB at the peak for 262,000 tokens. Byte-pair vocabularies are kept as words and numbers instead,
and handed over one merge after the other: 170 MB.
"""

import importlib
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import is_offline_mode
from tokenizers import AddedToken, Tokenizer, models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS, STATE, WORDS, REST, WHOLE = (
    "facts.json",
    "state.json",
    "words.bin",
    "rest.json",
    "tokenizer.json",
)

# A file beside the tokenizer of a GGUF file that names the GGUF file.
OF_GGUF = "of_gguf"

# Attributes: the last two are copies, for the constructor alone.
KEPT_IN_BACKEND = ("_tokenizer", "_vocab", "_merges")


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
    # As from_pretrained sets it.
    tokenizer.init_kwargs["local_files_only"] = is_offline_mode()
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


def load(source: Path, form: Path, stock: bool) -> Any:
    """The tokenizer, as flexinfer.formats.tokenizer loads it."""
    return stock_tokenizer(source) if stock else read_form(source, form)


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
