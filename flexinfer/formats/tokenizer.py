"""The tokenizer beside the weights, in little memory.

What AutoTokenizer makes of its files is kept in the cache directory, once for the same files, in a
form that loads in half the memory (flexinfer.formats.tokenizer_form), with the memory that this
takes, as measured. A plan can count on those numbers, and the tokenizer is loaded before the
process is measured for its plan. What comes out is a stock transformers tokenizer all the same, of
the same class.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from flexinfer.cache_dir import make_once
from flexinfer.formats.child import make_apart
from flexinfer.formats.gguf_model import NO_TOKENIZER
from flexinfer.formats.tensors import CheckpointError
from flexinfer.formats.tokenizer_form import FACTS, OF_GGUF, load
from flexinfer.memory.heap import return_freed_memory, trim_heap
from flexinfer.messages import one_line

FORM_VERSION = 2
MARKS = ("tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "tekken.json")

# What AutoTokenizer reads.
READ = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".spm", ".vocab", ".bpe"}

MADE_WITH = (
    "transformers",
    "tokenizers",
    "sentencepiece",
    "tiktoken",
    "mistral_common",
    "protobuf",
)

CHUNK_BYTES = 1 << 20

# Of the process that makes the form: for each string of tokenizer.json, and each byte of a file
# that is no JSON (docs/log.md)
MAKING_BYTES, STRING_BYTES, OTHER_BYTES = 96 << 20, 330, 60


@dataclass(frozen=True, slots=True)
class TokenizerMemory:
    """What a tokenizer takes, as measured where it was made."""

    stays_bytes: int = 0
    # Growth when it is used.
    use_bytes: int = 0
    # The most while it is loaded.
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PreparedTokenizer:
    """A tokenizer that can be loaded."""

    # Directory of its files.
    source: Path
    form: Path
    facts: dict[str, Any]

    @property
    def problem(self) -> str | None:
        """Why there is none."""
        return self.facts.get("problem")

    @property
    def memory(self) -> TokenizerMemory:
        if self.problem is not None:
            return TokenizerMemory()
        return TokenizerMemory(*(self.facts[f"{name}_bytes"] for name in ("stays", "use", "peak")))

    @property
    def has_template(self) -> bool:
        """Whether it makes prompts of chats. Raises CheckpointError where there is none."""
        self._check()
        return bool(self.facts["has_template"])

    def _check(self) -> None:
        if self.problem is not None:
            raise CheckpointError(self.problem)

    def load(self) -> PreTrainedTokenizerBase:
        """Raises CheckpointError where there is none."""
        self._check()
        return_freed_memory()
        try:
            tokenizer: PreTrainedTokenizerBase = load(
                self.source, self.form, bool(self.facts["stock"])
            )
        except Exception as error:
            shutil.rmtree(self.form, ignore_errors=True)
            raise CheckpointError(
                f"{self.form}: the tokenizer that was kept there cannot be loaded "
                f"({type(error).__name__}: {one_line(str(error))}); it is removed, and made again "
                "when the model is loaded again"
            ) from error
        trim_heap()
        return tokenizer


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in directory `path`. Raises CheckpointError when there is none."""
    return prepare_tokenizer(path).load()


def prepare_tokenizer(path: Path) -> PreparedTokenizer:
    """What is known of the tokenizer in directory `path`. It is brought into its form, once, where
    that has not been done yet.

    Raises CheckpointError where there is too little memory to do so.
    """
    if not has_tokenizer(path):
        problem = (
            f"{path}: no tokenizer beside the weights; put its files there (tokenizer.json, ...)"
        )
        if (path / NO_TOKENIZER).is_file():
            why = (path / NO_TOKENIZER).read_text()
            problem = f"no tokenizer could be made from the GGUF file: {why}; load one of your own"
        return PreparedTokenizer(path, path, {"problem": problem})
    fingerprint, making_bytes = _read_files(path)
    form = make_once(
        f"tokenizers/{fingerprint}",
        _is_complete,
        lambda unfinished: _make(path, unfinished, making_bytes),
    )
    return PreparedTokenizer(path, form, json.loads((form / FACTS).read_text(encoding="utf-8")))


def has_tokenizer(path: Path) -> bool:
    """Whether the files of a tokenizer lie in directory `path`."""
    return any(file for pattern in MARKS for file in path.glob(pattern))


def _is_complete(form: Path) -> bool:
    try:
        facts = json.loads((form / FACTS).read_text(encoding="utf-8"))
        return "problem" not in facts and all(
            (form / name).stat().st_size == size for name, size in facts["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _files(path: Path) -> Iterator[Path]:
    for folder in (path, path / "additional_chat_templates"):
        for file in sorted(folder.glob("*")):
            if file.suffix in READ and file.is_file() and not file.name.endswith(".index.json"):
                yield file


def _read_files(path: Path) -> tuple[str, int]:
    """A fingerprint of the files and of what reads them, and the memory that reading them takes,
    about.
    """
    digest = hashlib.blake2b(
        json.dumps([FORM_VERSION, _versions(), (path / OF_GGUF).is_file()]).encode(), digest_size=16
    )
    needed_bytes = MAKING_BYTES
    for file in _files(path):
        digest.update(f"\n{file.relative_to(path)} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                digest.update(chunk)
                in_json = file.suffix == ".json"
                needed_bytes += STRING_BYTES * (chunk.count(b'"') // 2) if in_json else 0
                needed_bytes += (
                    OTHER_BYTES * len(chunk)
                    if file.suffix in {".model", ".tiktoken", ".spm"}
                    else 0
                )
    return digest.hexdigest(), needed_bytes


@cache
def _versions() -> list[str]:
    found = []
    for package in MADE_WITH:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def _make(path: Path, form: Path, needed_bytes: int) -> None:
    """Have the form made, and measured, by two processes one after the other."""
    for role in ("make", "measure"):
        why = make_apart(
            path, needed_bytes, "flexinfer.formats.tokenizer_maker", role, str(path), str(form)
        )
        if why is not None:
            problem = (
                f"{path}: no tokenizer can be made of the files beside the weights ({why}); load "
                "one of your own"
            )
            (form / FACTS).write_text(json.dumps({"problem": problem}), encoding="utf-8")
            return
