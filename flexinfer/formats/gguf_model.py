"""What a GGUF file says of its model: config, tokenizer, and which tensor is which parameter.

By transformers' own mapping (integrations.ggml, modeling_gguf_pytorch_utils) and the name map of the `gguf` package, and completed where they
leave out what llama.cpp computes with: the width of a head, scaled rotary frequencies, soft caps. Config and tokenizer are kept in
a small directory, ~/.cache/flexinfer/gguf/<digest>, which then plays the part of a checkpoint's directory; the tokenizer is made
once, in a process of its own (flexinfer.formats.gguf_tokenizer), because taking a vocabulary apart takes memory that would not come back.

Where llama.cpp stores a weight in another order of rows, or a norm plus one, this is said of the tensor and put right when it is used.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexinfer.formats.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, CheckpointError, TensorSpec
from flexinfer.formats.experts import Parts, parameters_of, split_stacked
from flexinfer.formats.gguf import AGAIN, GGUF, SPLIT_NAME, LongArray, check_installed, read_gguf
from flexinfer.formats.gguf_families import FAMILIES, Family
from flexinfer.machine import anonymous_bytes, available_bytes
from flexinfer.messages import one_line, shown
from flexinfer.plan import format_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
NAMES_KEY = "flexinfer.names"  # whose names the tensors have, in a file that `flexinfer quantize` wrote beside config.json
MAX_ROWS = 1 << 20  # of a tensor; the largest vocabularies have a quarter of it
RATIOS = ("epsilon", "scale", "softcapping")  # keys that end so are no counts
NO_TOKENIZER = "no_tokenizer.txt"  # why there is none
CACHE_VERSION = 1  # of what is kept
TOKENIZER_BYTES, TOKEN_BYTES = 56 << 20, 1100  # of the process that makes a tokenizer, and for each token


def gguf_in(path: Path) -> Path | None:
    """The (first) GGUF file that `path` is or holds; None where it holds none, or safetensors too.

    Raises CheckpointError when there are several to choose from.
    """
    if path.is_file() and path.suffix == ".gguf":
        named = SPLIT_NAME.fullmatch(path.name)
        return path.with_name(f"{named[1]}-00001-of-{named[3]}.gguf") if named else path
    if not path.is_dir() or (path / SINGLE_FILE).is_file() or (path / INDEX_FILE).is_file():
        return None
    models = [
        file for file in path.glob("*.gguf") if not file.name.startswith("mmproj")
    ]  # that is for pictures
    found = {gguf_in(file) for file in models}
    if len(found) > 1:
        names = ", ".join(sorted(file.name for file in found if file))
        raise CheckpointError(f"{path}: holds several models: {names}; name one of them with gguf_file=")
    return next(iter(found), None)


def open_gguf(file: Path) -> Checkpoint:
    """The checkpoint in `file` and its parts; its config and tokenizer are made now, unless they are kept from an earlier time.

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


def cache_dir() -> Path:
    """$FLEXINFER_CACHE, or ~/.cache/flexinfer."""
    return Path(os.environ.get("FLEXINFER_CACHE", "~/.cache/flexinfer")).expanduser()


def _config_dir(gguf: GGUF) -> Path:
    """The directory of config.json and the tokenizer: written whole or not at all, whoever else asks for it now."""
    facts = [str(CACHE_VERSION), version("transformers")]
    for file in gguf.files:
        stat = file.stat()
        facts.append(f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}")
    kept = cache_dir() / "gguf" / hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]
    if (kept / "config.json").is_file():
        return kept
    config = config_of(gguf)
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{unfinished}: config and tokenizer of {gguf.files[0]} cannot be kept there ({error.strerror}); "
            "set FLEXINFER_CACHE to a directory that can be written to"
        ) from error
    try:
        write_config(config, unfinished)
        _make_tokenizer(gguf, unfinished)
        try:
            unfinished.rename(kept)
        except OSError:
            if not (kept / "config.json").is_file():  # nobody else has made it
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return kept


def write_config(config: dict[str, Any], directory: Path) -> None:
    """Write config.json and generation_config.json of what `config_of` found."""
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    generation = {name: config[name] for name in TOKEN_IDS.values() if name in config}
    (directory / "generation_config.json").write_text(json.dumps(generation))


def _make_tokenizer(gguf: GGUF, directory: Path) -> None:
    """Have the tokenizer made in a process of its own. Where none can be made, the reason is left in its place."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, LongArray):
        (directory / NO_TOKENIZER).write_text("the file has none")
        return
    needed_bytes = TOKENIZER_BYTES + TOKEN_BYTES * tokens.count
    spare_bytes = available_bytes() - anonymous_bytes()
    if spare_bytes < needed_bytes:
        raise CheckpointError(
            f"{gguf.files[0]}: to make its tokenizer takes {format_size(needed_bytes)} of memory, once, and {format_size(spare_bytes)} are "
            f"to spare; run `flexinfer plan {gguf.files[0]}` where there is more: it is kept in {directory.parent}"
        )
    program = [sys.executable, "-P", "-m", "flexinfer.formats.gguf_tokenizer"]
    done = subprocess.run(
        [*program, str(gguf.files[0].resolve()), str(directory.resolve())],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # the modules of this process
        capture_output=True,
        text=True,
        check=False,
    )
    if done.stdout:
        warnings.warn(f"{gguf.files[0]}: {one_line(done.stdout)}", RuntimeWarning, stacklevel=2)
    if done.returncode:
        last = one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        (directory / NO_TOKENIZER).write_text(last)
        warnings.warn(
            f"{gguf.files[0]}: no tokenizer could be made from it ({last})", RuntimeWarning, stacklevel=2
        )


# ---- config


def family_of(gguf: GGUF) -> Family:
    """The entry for the file's architecture. Raises CheckpointError for one that cannot be run."""
    name, experts = gguf.architecture, any("_exps." in tensor for tensor in gguf.tensors)
    found = [family for family in FAMILIES.values() if family.architecture == name]
    if not found:
        works = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        gguf.refuse(f"the architecture {shown(name)} cannot be run; these can: {works}")
    alike = [family for family in found if family.experts == experts]
    if not alike:
        gguf.refuse(f"{name} {'with' if experts else 'without'} experts (a mixture), which cannot be run")
    return alike[0]


def config_of(gguf: GGUF) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for an architecture that cannot be run."""
    family = family_of(gguf)
    tokens = _tensor(gguf, "token_embd.weight").shape[0]
    config: dict[str, Any] = {"dtype": "float32", "model_type": family.model_type, "vocab_size": tokens}
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for key in ("embedding_length", "attention.head_count", "block_count"):
        _needed(gguf, key)
    for key, theirs in family.keys.items():
        if _of(gguf, key) is not None:
            config[theirs] = _ratio(gguf, key) if key.endswith(RATIOS) else _size(gguf, key)
    for key, value in family.only.items():
        if _of(gguf, key) != value:
            gguf.refuse(f"{gguf.architecture}.{key} is {shown(_of(gguf, key))}, only {value} can be run yet")
    if family.experts:
        count, used = _needed(gguf, "expert_count"), _needed(gguf, "expert_used_count")
        if used > count:
            gguf.refuse(f"{used} of {count} experts are used: {AGAIN}")
    return (
        config
        | family.fixed
        | {theirs: name in gguf.tensors for theirs, name in family.present.items()}
        | {theirs: name not in gguf.tensors for theirs, name in family.absent.items()}
        | {theirs: _tensor(gguf, name).shape[-1] for theirs, name in family.widths.items()}
        | _of_heads(gguf, family)
        | _token_ids(gguf)
    )


def _of_heads(gguf: GGUF, family: Family) -> dict[str, Any]:
    """The width of a head, and what is rotated of it."""
    hidden, heads = _needed(gguf, "embedding_length"), _needed(gguf, "attention.head_count")
    width = _size(gguf, "attention.key_length") or hidden // heads
    rotated = _size(gguf, "rope.dimension_count") or width
    if not 1 <= rotated <= width:
        gguf.refuse(f"{rotated} of {width} numbers of a head are rotated: {AGAIN}")
    if family.rotated == "none":
        return {}
    if family.rotated == "all" and rotated != width:
        gguf.refuse(f"{rotated} of {width} numbers of a head are rotated, which cannot be run")
    rope = _rope_parameters(gguf, rotated)
    found: dict[str, Any] = {"rope_parameters": rope}
    if "attention.key_length" in family.keys:
        found["head_dim"] = width
    if family.rotated == "part":
        found["partial_rotary_factor"] = rope["partial_rotary_factor"] = rotated / width
    if rope["rope_type"] == "yarn":
        rope |= family.yarn
    if family.two_rotations:
        local = {"rope_type": "default", "rope_theta": _ratio(gguf, "rope.freq_base_swa") or 10_000.0}
        found["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    if family.layers_of_27b:
        of_27b = _needed(gguf, "block_count") == family.layers_of_27b
        found["query_pre_attn_scalar"] = hidden // heads if of_27b else width
    return found


def _token_ids(gguf: GGUF) -> dict[str, int]:
    keys = {f"tokenizer.ggml.{ours}_token_id": theirs for ours, theirs in TOKEN_IDS.items()}
    found = {theirs: gguf.metadata[key] for key, theirs in keys.items() if key in gguf.metadata}
    for name, value in found.items():
        if type(value) is not int:
            gguf.refuse(f"{name} is {shown(value)}, no number of a token: {AGAIN}")
    return found


def _of(gguf: GGUF, key: str) -> Any:
    """A value of the architecture. One for each layer is one for all, or refused."""
    value = gguf.of_architecture(key)
    if isinstance(value, list) and len(set(value)) == 1:
        return value[0]
    if isinstance(value, list | LongArray):
        gguf.refuse(f"{gguf.architecture}.{key} differs from layer to layer, which cannot be run yet")
    return value


def _tensor(gguf: GGUF, name: str) -> TensorSpec:
    """A tensor that has to be there."""
    if name not in gguf.tensors:
        gguf.refuse(f"has no tensor {name}; it is incomplete")
    return gguf.tensors[name]


def _needed(gguf: GGUF, key: str) -> int:
    """A count or a size, which has to be there."""
    value = _size(gguf, key)
    if not value:
        gguf.refuse(f"{gguf.architecture}.{key} is {_of(gguf, key)}, not a number from 1: {AGAIN}")
    return value


def _size(gguf: GGUF, key: str) -> int:
    """A count or a size; 0 where there is none."""
    value = _of(gguf, key)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        gguf.refuse(f"{gguf.architecture}.{key} is {shown(value)}, not a number from 1: {AGAIN}")
    return value


def _ratio(gguf: GGUF, key: str) -> float | None:
    """A number above 0; None where there is none, or a 0."""
    value = _of(gguf, key)
    if value is None or value == 0:
        return None
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        gguf.refuse(f"{gguf.architecture}.{key} is {shown(value)}, not a number above 0: {AGAIN}")
    return float(value)


def _rope_parameters(gguf: GGUF, rotated: int) -> dict[str, Any]:
    """How positions are rotated, in transformers' words."""
    kind, factor = _of(gguf, "rope.scaling.type"), _ratio(gguf, "rope.scaling.factor")
    original = _size(gguf, "rope.scaling.original_context_length")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": _ratio(gguf, "rope.freq_base") or 10_000.0}
    if "rope_freqs.weight" in gguf.tensors:
        return rope | _llama3(gguf, rope["rope_theta"], rotated)
    if "rope_factors_long.weight" in gguf.tensors:
        return rope | {
            "rope_type": "longrope",
            "long_factor": _numbers(gguf, "rope_factors_long.weight"),
            "short_factor": _numbers(gguf, "rope_factors_short.weight"),
            "original_max_position_embeddings": original or _needed(gguf, "context_length"),
            "attention_factor": _ratio(gguf, "rope.scaling.attn_factor"),
        }
    if kind in {None, "none"} or not factor or factor == 1:
        return rope
    if kind != "linear" and (kind != "yarn" or not original):
        gguf.refuse(f"rope.scaling.type {shown(kind)} cannot be run")
    rope |= {"rope_type": kind, "factor": factor}
    return rope | ({"original_max_position_embeddings": original} if kind == "yarn" else {})


def _llama3(gguf: GGUF, theta: float, rotated: int) -> dict[str, Any]:
    """Llama 3's scaling of frequencies, found from the divisors that llama.cpp keeps of it."""
    divisors = np.array(_numbers(gguf, "rope_freqs.weight"))
    if np.allclose(divisors, 1):
        return {}
    if len(divisors) != -(-rotated // 2):
        wrong = f"{len(divisors)} numbers for {rotated} that are rotated"
        gguf.refuse(f"rope_freqs.weight has {wrong}: {AGAIN}")
    scaling = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0}
    scaling["high_freq_factor"] = 4.0
    tried = [scaling | {"original_max_position_embeddings": 1 << power} for power in range(10, 21)]
    alike = [one for one in tried if np.allclose(divisors, llama3_divisors(one, theta, rotated), rtol=1e-3)]
    if not alike:
        gguf.refuse("rope_freqs.weight scales the rotation in a way that is not Llama 3's; it cannot be run")
    return alike[0]


def llama3_divisors(scaling: Mapping[str, Any], theta: float, rotated: int) -> npt.NDArray[np.float64]:
    """What Llama 3's `scaling`, in transformers' words, divides the frequencies of `rotated` numbers of a head by: [rotated / 2]."""
    lengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)  # of each wave, in tokens
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((scaling["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - share) / scaling["factor"] + share)
    return divisors


def _numbers(gguf: GGUF, name: str) -> list[float]:
    """The numbers of a short tensor of float32, all above 0."""
    spec = _tensor(gguf, name)
    if spec.dtype != "F32" or len(spec.shape) != 1 or spec.nbytes > 1 << 16:
        gguf.refuse(f"{name} is no short row of F32: {AGAIN}")
    with spec.file.open("rb") as stream:
        stream.seek(spec.offset_bytes)
        numbers = list(struct.unpack(f"<{spec.shape[0]}f", stream.read(spec.nbytes)))
    if not all(0 < number < math.inf for number in numbers):
        gguf.refuse(f"{name} has numbers that are not above 0: {AGAIN}")
    return numbers


# ---- tensors


def specs_of(
    model: "PreTrainedModel", checkpoint: Checkpoint, experts: Mapping[str, Any]
) -> tuple[dict[str, TensorSpec], dict[str, Parts]]:
    """The tensor of each parameter that the file has; and of the parameters of the modules `experts`, by name, those of each expert.

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
    """Of each parameter of an experts module the tensors that llama.cpp keeps its rows in, one after another."""
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
    """The heads of a tensor whose rows llama.cpp has by pairs, transformers by halves; 0 where it is no such tensor."""
    if not FAMILIES[config.model_type].rows_by_pairs:
        return 0
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(heads.get(tensor.split(".")[-2], 0))


# Once for each shape: all layers share the order.
@lru_cache
def _by_halves(rows: int, heads: int) -> tuple[int, ...]:
    order = np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2)
    return tuple(order.ravel().tolist())
