"""Read-only index of a checkpoint: which tensor lies where.

A checkpoint is a directory with `config.json` and either `model.safetensors` or, where there is
none, shards named by `model.safetensors.index.json`, or the file that config.json names as
`transformers_weights`; or a GGUF file (flexinfer.formats.gguf). Opening one reads the headers alone
(a few KB a file) and checks every offset against the file, so that a damaged checkpoint is refused
before memory is planned. The bytes themselves are read later, by `flexinfer.streaming.reader`,
straight from the offsets found here: nothing is converted and no second copy is made.
"""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flexinfer.cache_dir import user_path
from flexinfer.formats.gguf import is_gguf
from flexinfer.formats.gguf_model import gguf_in, open_gguf
from flexinfer.formats.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    is_file,
    read_index,
    tensors_by_name,
)
from flexinfer.formats.tensors import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    Checkpoint,
    CheckpointError,
    read_json,
)
from flexinfer.messages import shown

ADAPTER_FILE = "adapter_config.json"


def open_checkpoint(given: str | Path) -> Checkpoint:
    """Index the checkpoint in directory `path` or that a file there belongs to, or the only GGUF
    file in the directory.

    Raises CheckpointError when it is not a checkpoint, a shard is missing or truncated, a header
    lies about sizes or overlaps, the index points outside the directory, or a tensor has a type
    that is not supported.
    """
    path = local_checkpoint(given)
    if path is None:
        raise CheckpointError(f"{given}: no such directory or file")
    if (path / ADAPTER_FILE).is_file():
        raise CheckpointError(_adapter_refusal(path))
    gguf_file = gguf_in(path)
    if gguf_file is not None:
        return open_gguf(gguf_file)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: not a checkpoint: config.json is missing; save it with "
            "model.save_pretrained()"
        )
    file = _weights_file(path)
    if file.is_file():
        read = read_index if file.suffix == ".json" else tensors_by_name
        return Checkpoint(path, read(file), path)
    other = sorted(
        p.name
        for p in path.iterdir()
        if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".safetensors"}
    )
    found = f" (found {', '.join(other[:4])})" if other else ""
    raise CheckpointError(
        f"{path}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}; load the model with transformers "
        "and save it with model.save_pretrained(), which writes safetensors"
    )


def local_checkpoint(given: str | Path) -> Path | None:
    """The directory or GGUF file on this disk that `given` means; None where there is nothing of
    that name.

    ~ is the home directory, and file:// may stand before a path. A file of a checkpoint stands for
    its directory. Raises CheckpointError for a file that belongs to no checkpoint, saying what it
    is.
    """
    text = os.fspath(given)
    if not text:
        raise CheckpointError(
            "the path of the checkpoint is empty; name a directory, a GGUF file or a Hub id"
        )
    path = user_path(unquote(urlsplit(text).path) if text.startswith("file://") else text)
    if path.is_dir() or is_gguf(path):
        return path
    if path.is_file():
        for file in (path, path.resolve()):
            if file.name in _own_files(file.parent):
                return file.parent
        raise CheckpointError(f"{path}: {_what_it_is(path)}")
    if path.is_symlink():
        raise CheckpointError(
            f"{path}: a link to {os.readlink(path)}, which is not there; download the file again"
        )
    if path.exists():
        raise CheckpointError(
            f"{path}: neither a file nor a directory; name a checkpoint directory or a GGUF file"
        )
    return None


def _own_files(folder: Path) -> set[str]:
    """Names of the files that the checkpoint in `folder` is made of; none where there is no
    checkpoint.
    """
    if not (folder / CONFIG_FILE).is_file():
        return set()
    file = _weights_file(folder)
    if file.suffix != ".json" or not file.is_file():
        return {CONFIG_FILE, file.name}
    shards = read_json(file).get("weight_map")
    return {
        CONFIG_FILE,
        file.name,
        *(map(str, shards.values()) if isinstance(shards, dict) else ()),
    }


def _weights_file(folder: Path) -> Path:
    """The file of weights, or their index, that transformers would read in `folder`; it may be
    missing.
    """
    file = folder / (_named_file(folder / CONFIG_FILE) or SINGLE_FILE)
    return folder / INDEX_FILE if not file.is_file() and file.name == SINGLE_FILE else file


def _what_it_is(file: Path) -> str:
    """Why `file` is no checkpoint, and what to do."""
    beside = (file.parent / CONFIG_FILE).is_file()
    if file.suffix.lower() in {".bin", ".pt", ".pth", ".ckpt"}:
        return (
            "weights in PyTorch's format, which can hold code; load the model with transformers "
            "and save it with model.save_pretrained(), which writes safetensors"
        )
    if file.suffix.lower() != ".safetensors":
        return (
            "not a checkpoint: neither a GGUF file nor safetensors; name a checkpoint directory "
            "or a GGUF file"
        )
    if not beside:
        return (
            f"not a checkpoint by itself: there is no {CONFIG_FILE} beside it; download the whole "
            "directory"
        )
    return (
        f"not part of the checkpoint in {file.parent}, which is in {SINGLE_FILE} or the files that "
        f"{INDEX_FILE} names; name the directory, or give the file that name"
    )


def _adapter_refusal(path: Path) -> str:
    """What to do about an adapter, which transformers would apply to the weights in `path`, or to
    others.
    """
    try:
        base = shown(
            read_json(path / ADAPTER_FILE, MAX_CONFIG_BYTES).get("base_model_name_or_path")
        )
    except CheckpointError:
        base = "a model that it does not name"
    return (
        f"{path / ADAPTER_FILE}: an adapter (PEFT) of {base}, which is not applied here; merge it "
        f"once: peft.AutoPeftModelForCausalLM.from_pretrained({str(path)!r}).merge_and_unload()"
        ".save_pretrained(DST), and load DST; or, to run the weights beside it without it, move "
        "the file away (of a GGUF file: give its name)"
    )


def _named_file(config: Path) -> str | None:
    """The weights that config.json names, which transformers loads in place of the usual ones."""
    name = read_json(config, MAX_CONFIG_BYTES).get("transformers_weights")
    if name is None:
        return None
    known = isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))
    if not known or Path(name).name != name or not is_file(config.parent / name):
        raise CheckpointError(
            f"{config}: transformers_weights is {shown(name)}, no file of safetensors or index of "
            "some in this directory; correct the entry or remove it"
        )
    return str(name)
