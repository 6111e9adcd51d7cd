"""Where a checkpoint is: a local path, or a model of the Hugging Face Hub."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download

from flexinfer.formats.checkpoint import local_checkpoint, open_checkpoint
from flexinfer.formats.gguf import SPLIT_NAME
from flexinfer.formats.tensors import CheckpointError
from flexinfer.messages import cause


def resolve(
    path_or_hub_id: str | Path,
    gguf_file: str | None = None,
    fetching: Callable[[], None] | None = None,
) -> Path:
    """The checkpoint directory, or the GGUF file: a local one, or in the Hugging Face cache
    (downloaded if need be).

    gguf_file: the file's name in the directory or on the Hub, as transformers' argument of that
    name. fetching: called before a download begins.
    """
    found = local_checkpoint(path_or_hub_id)
    if found is not None and found.is_dir():
        return found / (gguf_file or "")
    if found is not None:
        if gguf_file is not None:
            raise CheckpointError(
                f"{found}: a GGUF file already; leave gguf_file={gguf_file!r} out"
            )
        return found
    name = str(path_or_hub_id)
    local = isinstance(path_or_hub_id, Path) or name.startswith((".", "/", "~", "file:"))
    local = local or name.lower().endswith((".gguf", ".safetensors"))
    if local or name.count("/") != 1:
        raise CheckpointError(
            f"{name}: no such directory, and not a Hub id of the form 'owner/name'; nor is there a "
            "file of that name"
        )
    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    if gguf_file is not None:
        wanted = [SPLIT_NAME.sub(r"\1-*-of-\3.[gG][gG][uU][fF]", gguf_file)]
    try:
        cached = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True)) / (
            gguf_file or ""
        )
        # All of it: a tokenizer that was loaded alone leaves a part of a snapshot.
        open_checkpoint(cached)
        return cached
    except Exception as why:
        if fetching is not None:
            fetching()
        try:
            return Path(snapshot_download(name, allow_patterns=wanted)) / (gguf_file or "")
        except Exception as error:
            partial = (
                f", nor whole in the Hub cache ({why})" if isinstance(why, CheckpointError) else ""
            )
            raise CheckpointError(
                f"{name}: neither a directory{partial}, nor to be had from the Hub "
                f"({cause(error)}); check the name and the network"
            ) from error
