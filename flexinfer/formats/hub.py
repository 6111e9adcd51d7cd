"""Where a checkpoint is: a local path, or a model of the Hugging Face Hub."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.gguf import SPLIT_NAME
from flexinfer.formats.tensors import CheckpointError
from flexinfer.messages import cause


def resolve(
    path_or_hub_id: str | Path, gguf_file: str | None = None, fetching: Callable[[], None] | None = None
) -> Path:
    """The checkpoint directory, or the GGUF file: a local one, or in the Hugging Face cache (downloaded if need be).

    gguf_file: the file's name in the directory or on the Hub, as transformers' argument of that name.
    fetching: called before a download begins.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path / (gguf_file or "")
    if path.is_file() and path.suffix == ".gguf" and gguf_file is None:
        return path
    name = str(path_or_hub_id)
    local = isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~")) or name.endswith(".gguf")
    if local or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: no such directory, and not a Hub id of the form 'owner/name', or a .gguf file"
        )
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    if gguf_file is not None:
        wanted = [SPLIT_NAME.sub(r"\1-*-of-\3.gguf", gguf_file)]
    try:
        cached = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True)) / (
            gguf_file or ""
        )
        Checkpoint.open(cached)  # all of it: a tokenizer that was loaded alone leaves a part of a snapshot
        return cached
    except Exception as why:
        if fetching is not None:
            fetching()
        try:
            return Path(snapshot_download(name, allow_patterns=wanted)) / (gguf_file or "")
        except Exception as error:
            partial = f", nor whole in the Hub cache ({why})" if isinstance(why, CheckpointError) else ""
            raise CheckpointError(
                f"{name}: neither a directory{partial}, nor to be had from the Hub ({cause(error)}); check the name and the network"
            ) from error
