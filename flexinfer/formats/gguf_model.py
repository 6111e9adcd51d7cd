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
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexinfer.cache_dir import cache_dir
from flexinfer.formats.checkpoint import Checkpoint, is_gguf
from flexinfer.formats.gguf import AGAIN, GGUF, LongArray, check_installed, is_model, part_name, read_gguf
from flexinfer.formats.gguf_config import TOKEN_IDS, config_of
from flexinfer.formats.gguf_families import FAMILIES
from flexinfer.formats.safetensors import INDEX_FILE, SINGLE_FILE
from flexinfer.formats.tensors import CheckpointError, TensorSpec
from flexinfer.formats.tokenizer_form import OF_GGUF
from flexinfer.kept import KILLED, make_once, run_apart
from flexinfer.memory.process import anonymous_bytes, available_bytes
from flexinfer.messages import one_line, shown
from flexinfer.model.experts import Parts, parameters_of, split_stacked
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
NAMES_KEY = "flexinfer.names"  # whose names the tensors have, in a file that `flexinfer quantize` wrote beside config.json
MAX_ROWS = 1 << 20  # of a tensor; the largest vocabularies have a quarter of it
NO_TOKENIZER = "no_tokenizer.txt"  # why there is none
CACHE_VERSION = 2  # of what is kept
TOKENIZER_BYTES, TOKEN_BYTES = 56 << 20, 1100  # of the process that makes a tokenizer, and for each token


def gguf_in(path: Path) -> Path | None:
    """The (first) GGUF file that `path` is or holds; None where it holds none, or safetensors too.

    Raises CheckpointError when there are several to choose from.
    """
    if is_gguf(path):
        return path.with_name(part_name(path.name, 1))
    if not path.is_dir() or (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return None
    models = [file for file in path.iterdir() if file.suffix.lower() in {".gguf", ""} and is_gguf(file)]
    found = {file for file in map(gguf_in, models) if file}
    if len(found) > 1:  # beside a model lie projectors of pictures, importance matrices and adapters
        found = {file for file in found if not file.is_file() or is_model(file)} or found
    if len(found) > 1:
        names = ", ".join(sorted(file.name for file in found))
        raise CheckpointError(f"{path}: holds several models: {names}; name one of them with gguf_file=")
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
                f"{file}: has no config.json beside it, as `flexinfer quantize` has put there; copy the whole directory"
            )
        return Checkpoint(file, gguf.tensors, file.parent)
    beside = whose is not None and (file.parent / "config.json").is_file()
    return Checkpoint(file, gguf.tensors, file.parent if beside else _config_dir(gguf), gguf.architecture)


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
    spare_bytes = available_bytes() - anonymous_bytes()
    too_little = CheckpointError(
        f"{gguf.files[0]}: to make its tokenizer takes {format_size(needed_bytes)} of memory, once, and {format_size(spare_bytes)} are "
        f"to spare; run `flexinfer plan {gguf.files[0]}` where there is more: it is kept in {cache_dir()}"
    )
    if spare_bytes < needed_bytes:
        raise too_little
    done = run_apart(
        "flexinfer.formats.gguf_tokenizer", str(gguf.files[0].resolve()), str(directory.resolve())
    )
    if done.returncode == KILLED:
        raise too_little
    if done.stdout:
        warnings.warn(f"{gguf.files[0]}: {one_line(done.stdout)}", RuntimeWarning, stacklevel=2)
    if done.returncode:
        last = one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        (directory / NO_TOKENIZER).write_text(last)
        warnings.warn(
            f"{gguf.files[0]}: no tokenizer could be made from it ({last})", RuntimeWarning, stacklevel=2
        )


def specs_of(
    model: "PreTrainedModel", checkpoint: Checkpoint, experts: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensor of each parameter that the file has; and of the parameters of the modules
    `experts`, by name, those of each expert.

    Raises CheckpointError when the file has tensors that the model has no place for.
    """
    parts: dict[str, Parts] = {}
    specs: dict[str, TensorSpec] = {}
    for name, module in experts.items():
        of_module, biases = _experts_of(name, module, checkpoint.tensors)
        parts |= of_module
        specs |= biases
    name_of = tensor_names(str(checkpoint.architecture), model)
    for parameter, value in model.state_dict().items():
        tensor = name_of(parameter)
        if parameter not in parts | specs and tensor in checkpoint.tensors:
            module = model.get_submodule(parameter.rpartition(".")[0])
            specs[parameter] = _corrected(checkpoint.tensors[tensor], module, value.shape, model.config)
    used = {spec.name for one in specs.values() for spec in (one, one.alternate) if spec} | ROPE_TENSORS
    used |= {spec.name for of_parameter in parts.values() for spec in of_parameter[0]}
    if unused := [name for name in checkpoint.tensors if name not in used]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(unused)} tensors have no place in {type(model).__name__}, such as {shown(unused[0])}; "
            "this kind of model cannot be run yet"
        )
    return specs, parts


def tensor_names(architecture: str, model: "PreTrainedModel") -> Callable[[str], str | None]:
    """A function from a parameter's name to that of its tensor; None where llama.cpp has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(number, model.config.num_hidden_layers)

    def name_of(parameter: str) -> str | None:
        module, _, leaf = parameter.rpartition(".")
        if leaf in {"weight", "bias"}:
            found = names.get_name(module) or names.get_name(
                f"{module}.layer"
            )  # as it once was in transformers
            return f"{found}.{leaf}" if found else None
        found = names.get_name(parameter)  # a parameter of a layer's own
        return f"{found}.weight" if found else None

    return name_of


def expert_tensors(name: str, module: Any) -> dict[str, tuple[str, ...]]:
    """Of each parameter of an experts module the tensors that llama.cpp keeps its rows in, one
    after another.
    """
    up, down = parameters_of(name, module)
    place = re.search(r"\.(\d+)\.", name)
    block = f"blk.{place[1] if place else ''}.ffn_"
    ways = ("gate", "up") if module.has_gate else ("up",)
    return {up: tuple(f"{block}{way}_exps" for way in ways), down: (f"{block}down_exps",)}


def _experts_of(
    name: str, module: Any, tensors: Mapping[str, TensorSpec]
) -> tuple[dict[str, Parts], dict[str, TensorSpec]]:
    """By parameter the tensors of each expert, and the biases."""
    parts: dict[str, Parts] = {}
    biases: dict[str, TensorSpec] = {}
    for parameter, names in expert_tensors(name, module).items():
        joined = names[0].replace("_gate_", "_gate_up_")
        names = (joined,) if f"{joined}.weight" in tensors else names
        found = [tensors[f"{one}.weight"] for one in names if f"{one}.weight" in tensors]
        alike = {spec.shape[0] for spec in found if len(spec.shape) == 3}
        if len(found) == len(names) and len(alike) == 1:
            stacked = [split_stacked(replace(spec, transposed=module.is_transposed)) for spec in found]
            parts[parameter] = [[*chain(*of_expert)] for of_expert in zip(*stacked, strict=True)]
        bias = [tensors[f"{one}.bias"] for one in names if f"{one}.bias" in tensors]
        if module.has_bias and len(bias) == len(names):
            first, other = bias[0], bias[1] if len(bias) > 1 else None
            shape = (*first.shape[:-1], sum(spec.shape[-1] for spec in bias))
            biases[f"{parameter}_bias"] = replace(first, shape=shape, alternate=other)
    return parts, biases


def _corrected(spec: TensorSpec, module: Any, shape: Sequence[int], config: "PretrainedConfig") -> TensorSpec:
    """`spec` with how it differs from its parameter, which has `shape` in `module`."""
    from transformers.pytorch_utils import Conv1D

    family = FAMILIES[config.model_type]
    if isinstance(module, Conv1D) and len(spec.shape) == 2:
        return replace(spec, transposed=True)
    if spec.name.endswith(family.flat) and (1, *spec.shape) == tuple(shape):
        return replace(spec, shape=(1, *spec.shape))
    if family.norms_plus_one and spec.name.endswith("norm.weight"):
        return replace(spec, added=-1.0)
    heads = rotated_heads(spec.name, config)
    # The bias of such a weight is added before the rows are put in order: both are in the file's.
    if heads and len(spec.shape) == 2:
        if spec.shape[0] > MAX_ROWS or spec.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{spec.file}: {spec.name} has {spec.shape[0]} rows for {heads} heads: {AGAIN}"
            )
        return replace(spec, row_order=_by_halves(spec.shape[0], heads))
    return spec


def rotated_heads(tensor: str, config: "PretrainedConfig") -> int:
    """The heads of a tensor whose rows llama.cpp has by pairs, transformers by halves; 0 where it
    is no such tensor.
    """
    if not FAMILIES[config.model_type].rows_by_pairs:
        return 0
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(heads.get(tensor.split(".")[-2], 0))


# Once for each shape: all layers share the order.
@lru_cache
def _by_halves(rows: int, heads: int) -> tuple[int, ...]:
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2)
    return tuple(order.ravel().tolist())
