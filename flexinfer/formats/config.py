"""config.json and generation_config.json: checked before transformers reads them, and its errors
made one.

transformers builds what a configuration says. So what would make it build without end, run code of
the checkpoint's, or fetch some from elsewhere is refused before it sees the file: counts of layers,
experts and the like that are larger than anything in the checkpoint's tensors, another file to read
instead, an implementation of attention by the name of a Hub repository. Whatever transformers
raises on the rest becomes one CheckpointError that names the file and the cause. Sizes of weights
are compared with the tensors in `skeleton`, on the meta device.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from flexinfer.formats.tensors import (
    CONFIG_FILE,
    MAX_CONFIG_BYTES,
    Checkpoint,
    CheckpointError,
    read_json,
)
from flexinfer.messages import cause, shown

GENERATION_FILE = "generation_config.json"
# Keys that say how many layers are built.
LAYERS = re.compile(r"(?<!window_)layers?$|blocks$|depth$")
COUNTS = re.compile(r"(^|_)(num|n)_|(experts|heads|labels|groups|codebooks)$")
# Experts, labels and the like that may be named without being there.
FEW = 1024
# Keys of lengths in tokens.
NO_COUNTS = re.compile(r"position|ctx|token|seq|logit|bucket|step|frame|length")
IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?$")
# Of transformers and torch; others are packages, or on the Hub.
OWN_IMPLEMENTATIONS = {None, "eager", "sdpa"}


@contextmanager
def refusing(file: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of `file`: raises CheckpointError with `what`
    and the cause.
    """
    try:
        yield
    except MemoryError:
        raise
    except CheckpointError as error:
        if str(file.parent) in str(error):
            raise
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{file}: {what} ({cause(error)})") from error


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of `checkpoint`.

    Raises CheckpointError when transformers knows no such model, or must not build it.
    """
    file = checkpoint.config_file
    _check(file, read_json(checkpoint.config_dir / CONFIG_FILE, MAX_CONFIG_BYTES), checkpoint)
    with refusing(file, "not a model that transformers knows"):
        config: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.config_dir, trust_remote_code=False, local_files_only=True
        )
        values = config.to_dict()
    # Check the defaults as well.
    _check(file, values, checkpoint)
    return config


def set_generation_config(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give `model` the generation_config.json of `checkpoint`, or what its config.json says of
    generation where there is none.
    """
    path = checkpoint.config_dir
    file, options = path / GENERATION_FILE, dict[str, Any]()
    if not file.is_file():
        file, options = (
            path / CONFIG_FILE,
            {"config_file_name": CONFIG_FILE, "_from_model_config": True},
        )
    read_json(file, MAX_CONFIG_BYTES)
    with refusing(
        checkpoint.path if checkpoint.architecture else file, "no settings of generate()"
    ):
        model.generation_config = GenerationConfig.from_pretrained(
            path, local_files_only=True, **options
        )


def _check(file: Path, values: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Refuse what must not reach transformers, or must not be built."""
    if "configuration_files" in values:
        raise CheckpointError(
            f"{file}: names other files to be read in its place (configuration_files); remove the "
            "entry"
        )
    tensors = len(checkpoint.tensors)
    largest = max((max(spec.shape, default=0) for spec in checkpoint.tensors.values()), default=0)
    for key, value in _entries(values):
        if IMPLEMENTATIONS.match(key):
            used = value.values() if isinstance(value, dict) else [value]
            if any(
                not isinstance(one, str | None) or one not in OWN_IMPLEMENTATIONS for one in used
            ):
                raise CheckpointError(
                    f"{file}: {key}={shown(value)} is code from outside of transformers; choose "
                    "'eager' or 'sdpa'"
                )
        if not isinstance(value, int) or NO_COUNTS.search(key):
            continue
        if LAYERS.search(key) and value > tensors:
            raise CheckpointError(
                f"{file}: {shown(key)} is {shown(value)}, but the checkpoint has {tensors} "
                "tensors; the two do not belong together"
            )
        if COUNTS.search(key) and value > max(tensors, largest, FEW):
            raise CheckpointError(
                f"{file}: {shown(key)} is {shown(value)}, but the largest dimension of a tensor is "
                f"{largest}; the two do not belong together"
            )


def _entries(values: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and value, those of the parts of a composed model too."""
    stack: list[Any] = [values]
    while stack:
        holder = stack.pop()
        for key, value in holder.items() if isinstance(holder, dict) else ():
            yield str(key), value
        stack.extend(
            one
            for one in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(one, dict | list)
        )
