"""A GGUF file as a checkpoint: config, tokenizer, and which tensor is which parameter.

The config is by the table of families (gguf_config), names of tensors by the map of the `gguf`
package. Config and tokenizer are kept in a small directory, ~/.cache/flexinfer/gguf/<digest>, which
then plays the part of a checkpoint's directory; the tokenizer is made once, in a process of its own
(gguf_tokenizer), because taking a vocabulary apart takes memory that would not come back.

Where llama.cpp stores a weight in another order of rows, or a norm plus one, the tensor's spec says
so, and it is put right when it is used.
"""

import hashlib
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from flexinfer.cache_dir import make_once
from flexinfer.formats.child import make_apart
from flexinfer.formats.gguf import (
    GGUF,
    LongArray,
    check_installed,
    is_gguf,
    is_model,
    part_name,
    read_gguf,
)
from flexinfer.formats.gguf_config import TOKEN_IDS, config_of
from flexinfer.formats.safetensors import INDEX_FILE, SINGLE_FILE
from flexinfer.formats.tensors import Checkpoint, CheckpointError
from flexinfer.formats.tokenizer_form import OF_GGUF

# Whose names the tensors have, in a file that `flexinfer quantize` wrote beside config.json.
NAMES_KEY = "flexinfer.names"
# Says why a file has no usable tokenizer.
NO_TOKENIZER = "no_tokenizer.txt"
# Version of what is cached.
CACHE_VERSION = 2
# Of the process that makes a tokenizer, and for each token.
TOKENIZER_BYTES, TOKEN_BYTES = 56 << 20, 1100


def gguf_in(path: Path) -> Path | None:
    """The (first) GGUF file that `path` is or holds; None where it holds none, or safetensors too.

    Raises CheckpointError when there are several to choose from.
    """
    if is_gguf(path):
        return path.with_name(part_name(path.name, 1))
    if not path.is_dir() or (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return None
    models = [
        file for file in path.iterdir() if file.suffix.lower() in {".gguf", ""} and is_gguf(file)
    ]
    found = {file for file in map(gguf_in, models) if file}
    # Beside a model lie projectors of pictures, importance matrices and adapters.
    if len(found) > 1:
        found = {file for file in found if not file.is_file() or is_model(file)} or found
    if len(found) > 1:
        names = ", ".join(sorted(file.name for file in found))
        raise CheckpointError(
            f"{path}: holds several models: {names}; name one of them with gguf_file="
        )
    return next(iter(found), None)


def open_gguf(file: Path) -> Checkpoint:
    """The checkpoint in `file` and its parts; its config and tokenizer are made now, unless they
    are kept from an earlier time.

    Raises CheckpointError when the file is damaged or of an architecture that cannot be run.
    """
    check_installed()
    gguf = read_gguf(file)
    whose = gguf.metadata.get(NAMES_KEY)
    if whose == "transformers":
        if not (file.parent / "config.json").is_file():
            raise CheckpointError(
                f"{file}: has no config.json beside it, as `flexinfer quantize` has put there; "
                "copy the whole directory"
            )
        return Checkpoint(file, gguf.tensors, file.parent)
    beside = whose is not None and (file.parent / "config.json").is_file()
    return Checkpoint(
        file, gguf.tensors, file.parent if beside else _config_dir(gguf), gguf.architecture
    )


def _config_dir(gguf: GGUF) -> Path:
    """The directory of config.json and the tokenizer: written whole or not at all, whoever else
    asks for it now.
    """
    facts = [str(CACHE_VERSION), version("transformers")]
    for file in gguf.files:
        stat = file.stat()
        facts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]

    def make(directory: Path) -> None:
        write_config(config_of(gguf), directory)
        (directory / OF_GGUF).write_text(str(gguf.files[0].resolve()))
        _make_tokenizer(gguf, directory)

    return make_once(f"gguf/{digest}", lambda kept: (kept / "config.json").is_file(), make)


def write_config(config: dict[str, Any], directory: Path) -> None:
    """Write config.json and generation_config.json of what `config_of` found."""
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generation = {name: config[name] for name in TOKEN_IDS.values() if name in config}
    (directory / "generation_config.json").write_text(json.dumps(generation))


def _make_tokenizer(gguf: GGUF, directory: Path) -> None:
    """Have the tokenizer made in a process of its own. Where none can be made, the reason is left
    in its place.
    """
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, LongArray):
        (directory / NO_TOKENIZER).write_text("the file has none")
        return
    needed_bytes = TOKENIZER_BYTES + TOKEN_BYTES * tokens.count
    file = gguf.files[0]
    paths = str(file.resolve()), str(directory.resolve())
    why = make_apart(file, needed_bytes, "flexinfer.formats.gguf_tokenizer", *paths)
    if why is not None:
        (directory / NO_TOKENIZER).write_text(why)
        warnings.warn(
            f"{file}: no tokenizer could be made from it ({why})", RuntimeWarning, stacklevel=2
        )
