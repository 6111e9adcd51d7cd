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
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.gguf import GGUF, SPLIT_NAME, LongArray, check_installed, read_gguf
from flexinfer.formats.safetensors import INDEX_FILE, SINGLE_FILE
from flexinfer.formats.tensors import CheckpointError, TensorSpec
from flexinfer.memory.process import anonymous_bytes, available_bytes
from flexinfer.messages import one_line, shown
from flexinfer.model.experts import Parts, parameters_of, split_stacked
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MODEL_TYPES = {  # llama.cpp's name of an architecture -> transformers'
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gpt2": "gpt2",
    "granitemoe": "granitemoe",
    "llama": "llama",
    "nemotron": "nemotron",
    "olmoe": "olmoe",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
MIXTRAL = "mixtral"  # what llama.cpp calls a llama too, with experts
MIXTURES = {"gpt-oss", "granitemoe", "olmoe", "qwen2moe", "qwen3moe"}
MAPPED_AS = dict.fromkeys(
    (MIXTRAL, "granitemoe", "olmoe"), "llama"
)  # whose headers transformers does not map
MAPPED_AS |= {"gemma3_text": "gemma3"}
COMPLETED = {"rope_theta", "head_dim"}  # said here, see `_completed`
GRANITE_SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}
CORRECTED_AS = {"granitemoe": "llama"}  # whose rows llama.cpp puts in the same order
HAVE_HEAD_DIM = {"llama", "qwen3", "qwen3moe", "gpt-oss", "gemma2", "gemma3", "nemotron"}
ROTATES_A_PART = {"nemotron", "phi3", "stablelm"}  # of each head, by the config
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # the size whose attention is scaled in another way
ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
NAMES_KEY = "flexinfer.names"  # whose names the tensors have, in a file that `flexinfer quantize` wrote beside config.json
MAX_ROWS = 1 << 20  # of a tensor; the largest vocabularies have a quarter of it
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


def config_of(gguf: GGUF) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for an architecture that cannot be run."""
    name = gguf.architecture
    if name not in MODEL_TYPES:
        raise CheckpointError(
            f"{gguf.files[0]}: the architecture {shown(name)} cannot be run; {_what_works()}"
        )
    model_type = MODEL_TYPES[name]
    if any("_exps." in tensor for tensor in gguf.tensors):
        if name == "llama":
            model_type = MIXTRAL
        elif name not in MIXTURES:
            raise CheckpointError(f"{gguf.files[0]}: {name} with experts (a mixture), which cannot be run")
    if "token_embd.weight" not in gguf.tensors:
        raise CheckpointError(f"{gguf.files[0]}: has no tensor token_embd.weight; it is incomplete")
    known = {theirs: _of(gguf, key) for key, theirs in mapped_values(model_type).items()}
    config = {theirs: value for theirs, value in known.items() if value is not None}
    return (
        config
        | _token_ids(gguf)
        | {"model_type": model_type, "dtype": "float32"}
        | {"vocab_size": gguf.tensors["token_embd.weight"].shape[0]}
        | {"tie_word_embeddings": "output.weight" not in gguf.tensors}
        | _completed(gguf, model_type)
        | (_of_experts(gguf) if model_type == MIXTRAL or name in MIXTURES else {})
    )


def mapped_values(model_type: str) -> dict[str, str]:
    """By transformers' mapping: a key of the architecture in a header, and what it is called in the config of `model_type`."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    name = MAPPED_AS.get(model_type, model_type)
    mapping: Mapping[str, str | None] = GGUF_CONFIG_MAPPING[name]  # type: ignore[assignment]
    return {key: theirs for key, theirs in mapping.items() if theirs and theirs not in COMPLETED}


def _token_ids(gguf: GGUF) -> dict[str, int]:
    keys = {f"tokenizer.ggml.{ours}_token_id": theirs for ours, theirs in TOKEN_IDS.items()}
    found = {theirs: gguf.metadata[key] for key, theirs in keys.items() if key in gguf.metadata}
    for name, value in found.items():
        if type(value) is not int:
            raise CheckpointError(
                f"{gguf.files[0]}: {name} is {shown(value)}, no number of a token: damaged; download it again"
            )
    return found


def _what_works() -> str:
    return f"these can: {', '.join(sorted(MODEL_TYPES))}"


def _of(gguf: GGUF, key: str) -> Any:
    """A value of the architecture. One for each layer is one for all, or refused."""
    value = gguf.of_architecture(key)
    if isinstance(value, list) and len(set(value)) == 1:
        return value[0]
    if isinstance(value, list | LongArray):
        raise CheckpointError(
            f"{gguf.files[0]}: {gguf.architecture}.{key} differs from layer to layer, which cannot be run yet"
        )
    return value


def _of_experts(gguf: GGUF) -> dict[str, Any]:
    """What a mixture has besides, as llama.cpp computes it."""
    name = gguf.architecture
    count, used = _needed(gguf, "expert_count"), _needed(gguf, "expert_used_count")
    if used > count:
        raise CheckpointError(
            f"{gguf.files[0]}: {used} of {count} experts are used: damaged; download it again"
        )
    local = name in {"gpt-oss", "granitemoe", "llama"}
    more: dict[str, Any] = {"num_local_experts" if local else "num_experts": count}
    more["num_experts_per_tok"] = used
    if name in {"qwen2moe", "qwen3moe"}:
        more["moe_intermediate_size"] = _width(gguf, "blk.0.ffn_down_exps.weight")
        more["norm_topk_prob"] = name == "qwen3moe"
    if name == "qwen2moe":
        more["shared_expert_intermediate_size"] = _width(gguf, "blk.0.ffn_down_shexp.weight")
    elif name == "gpt-oss":
        more["sliding_window"] = _needed(gguf, "attention.sliding_window")
    elif name == "granitemoe":
        scales = {theirs: _ratio(gguf, key) for key, theirs in GRANITE_SCALES.items()}
        more |= {theirs: scale for theirs, scale in scales.items() if scale is not None}
    return more


def _width(gguf: GGUF, name: str) -> int:
    """The length of the rows of a tensor, which has to be there."""
    if name not in gguf.tensors:
        raise CheckpointError(f"{gguf.files[0]}: has no tensor {name}; it is incomplete")
    return gguf.tensors[name].shape[-1]


def _completed(gguf: GGUF, model_type: str) -> dict[str, Any]:
    """What transformers' mapping leaves out, as llama.cpp reads it."""
    name = gguf.architecture
    hidden, heads = _needed(gguf, "embedding_length"), _needed(gguf, "attention.head_count")
    layers = _needed(gguf, "block_count")
    width = _size(gguf, "attention.key_length") or hidden // heads
    rotated = _size(gguf, "rope.dimension_count") or width
    if not 1 <= rotated <= width:
        raise CheckpointError(
            f"{gguf.files[0]}: {rotated} of {width} numbers of a head are rotated: damaged; download it again"
        )
    epsilon = _of(gguf, "attention.layer_norm_epsilon")
    rope = _rope_parameters(gguf, rotated)
    more: dict[str, Any] = {"rope_parameters": rope}
    if name in HAVE_HEAD_DIM:
        more["head_dim"] = width
    if name in ROTATES_A_PART:
        more["partial_rotary_factor"] = rope["partial_rotary_factor"] = rotated / width
    elif rotated != width and name != "gpt2":
        raise CheckpointError(
            f"{gguf.files[0]}: {name} with {rotated} of {width} numbers of a head rotated, which cannot be run"
        )
    if model_type == "gpt_oss" and rope["rope_type"] == "yarn":
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    elif model_type == "llama":
        more["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        more["mlp_bias"] = "blk.0.ffn_up.bias" in gguf.tensors
    elif name in LAYERS_OF_27B:
        more["query_pre_attn_scalar"] = hidden // heads if layers == LAYERS_OF_27B[name] else width
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if _of(gguf, key) is not None:
                more[key] = _ratio(gguf, key)
        if name == "gemma3":
            local = {"rope_type": "default", "rope_theta": _ratio(gguf, "rope.freq_base_swa") or 10_000.0}
            more["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    elif name == "phi3":
        original = _size(gguf, "rope.scaling.original_context_length")
        more |= {"sliding_window": None} | (
            {"original_max_position_embeddings": original} if original else {}
        )
    elif name == "stablelm":
        more["use_qkv_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        more["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in gguf.tensors
    elif name == "nemotron":
        more["norm_eps"] = epsilon
    elif name == "gpt2":
        more = {
            "n_positions": _needed(gguf, "context_length"),
            "n_inner": _of(gguf, "feed_forward_length"),
        }
    elif name == "falcon":
        if _of(gguf, "attention.head_count_kv") != 1 or "blk.0.attn_norm_2.weight" in gguf.tensors:
            raise CheckpointError(
                f"{gguf.files[0]}: a falcon with several heads of keys (40B), whose rows llama.cpp sorts anew; it cannot be run yet"
            )
        more |= {
            "layer_norm_epsilon": epsilon,
            "ffn_hidden_size": _of(gguf, "feed_forward_length"),
        }
    return more


def _needed(gguf: GGUF, key: str) -> int:
    """A count or a size, which has to be there."""
    value = _size(gguf, key)
    if not value:
        raise CheckpointError(
            f"{gguf.files[0]}: {gguf.architecture}.{key} is {_of(gguf, key)}, not a number from 1: damaged; download it again"
        )
    return value


def _size(gguf: GGUF, key: str) -> int:
    """A count or a size; 0 where there is none."""
    value = _of(gguf, key)
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"{gguf.files[0]}: {gguf.architecture}.{key} is {shown(value)}, not a number from 1: damaged; download it again"
        )
    return value


def _ratio(gguf: GGUF, key: str) -> float | None:
    """A number above 0; None where there is none, or a 0."""
    value = _of(gguf, key)
    if value is None or value == 0:
        return None
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"{gguf.files[0]}: {gguf.architecture}.{key} is {shown(value)}, not a number above 0: damaged; download it again"
        )
    return float(value)


def _rope_parameters(gguf: GGUF, rotated: int) -> dict[str, Any]:
    """How positions are rotated, in transformers' words."""
    theta = _ratio(gguf, "rope.freq_base") or 10_000.0
    kind, factor = _of(gguf, "rope.scaling.type"), _ratio(gguf, "rope.scaling.factor")
    original = _size(gguf, "rope.scaling.original_context_length")
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if "rope_freqs.weight" in gguf.tensors:
        return parameters | _llama3(gguf, theta, rotated)
    if "rope_factors_long.weight" in gguf.tensors:
        return parameters | {
            "rope_type": "longrope",
            "long_factor": _numbers(gguf, "rope_factors_long.weight"),
            "short_factor": _numbers(gguf, "rope_factors_short.weight"),
            "original_max_position_embeddings": original or _needed(gguf, "context_length"),
            "attention_factor": _ratio(gguf, "rope.scaling.attn_factor"),
        }
    if kind in {None, "none"} or not factor or factor == 1:
        return parameters
    if kind == "linear":
        return parameters | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and original:
        return parameters | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise CheckpointError(f"{gguf.files[0]}: rope.scaling.type {shown(kind)} cannot be run")


def _llama3(gguf: GGUF, theta: float, rotated: int) -> dict[str, Any]:
    """Llama 3's scaling of frequencies, found from the divisors that llama.cpp keeps of it."""
    divisors = np.array(_numbers(gguf, "rope_freqs.weight"))
    factor = float(divisors.max())
    if np.allclose(divisors, 1):
        return {}
    if len(divisors) != -(-rotated // 2):
        raise CheckpointError(
            f"{gguf.files[0]}: rope_freqs.weight has {len(divisors)} numbers for {rotated} that are rotated: damaged; download it again"
        )
    for original in (1 << power for power in range(10, 21)):
        scaling = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        if np.allclose(divisors, llama3_divisors(scaling, theta, rotated), rtol=1e-3):
            return scaling
    raise CheckpointError(
        f"{gguf.files[0]}: rope_freqs.weight scales the rotation in a way that is not Llama 3's; it cannot be run"
    )


def llama3_divisors(scaling: Mapping[str, Any], theta: float, rotated: int) -> npt.NDArray[np.float64]:
    """What Llama 3's `scaling`, in transformers' words, divides the frequencies of `rotated` numbers of a head by: [rotated / 2]."""
    lengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)  # of each wave, in tokens
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((scaling["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1)
    divisors: npt.NDArray[np.float64] = 1 / ((1 - share) / scaling["factor"] + share)
    return divisors


def _numbers(gguf: GGUF, name: str) -> list[float]:
    """The numbers of a short tensor of float32, all above 0."""
    spec = gguf.tensors.get(name)
    if spec is None:
        raise CheckpointError(f"{gguf.files[0]}: has no tensor {name}; it is incomplete")
    if spec.dtype != "F32" or len(spec.shape) != 1 or spec.nbytes > 1 << 16:
        raise CheckpointError(f"{spec.file}: {name} is no short row of F32: damaged; download it again")
    with spec.file.open("rb") as stream:
        stream.seek(spec.offset_bytes)
        numbers = list(struct.unpack(f"<{spec.shape[0]}f", stream.read(spec.nbytes)))
    if not all(0 < number < math.inf for number in numbers):
        raise CheckpointError(
            f"{spec.file}: {name} has numbers that are not above 0: damaged; download it again"
        )
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
    processor = processor_of(str(checkpoint.architecture), model.config)
    orders: dict[tuple[int, ...], tuple[int, ...]] = {}  # each once: all layers share them
    for parameter in model.state_dict():
        tensor = name_of(parameter)
        if parameter not in parts | specs and tensor in checkpoint.tensors:
            spec = corrected(checkpoint.tensors[tensor], processor)
            if spec.row_order is not None:
                spec = replace(spec, row_order=orders.setdefault(spec.row_order, spec.row_order))
            specs[parameter] = spec
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


def processor_of(architecture: str, config: "PretrainedConfig") -> Any:
    """What transformers changes the tensors of `architecture` with."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    architecture = CORRECTED_AS.get(architecture, architecture)
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config.to_dict())


def corrected(spec: TensorSpec, processor: Any) -> TensorSpec:
    """`spec` with what transformers does to its numbers, found by having it done to the numbers of the rows."""
    if spec.name == "output.weight":
        return spec
    if spec.shape[0] > MAX_ROWS:
        raise CheckpointError(
            f"{spec.file}: {spec.name} has {spec.shape[0]} rows, at most {MAX_ROWS} can be put in order; this kind of model cannot be run yet"
        )
    rows = np.arange(spec.shape[0], dtype=np.float64)
    column = rows.reshape(-1, *(1 for _ in spec.shape[1:]))  # [rows, 1] or [rows]
    done: npt.NDArray[np.float64] = processor.process(weights=column, name=spec.name).weights
    if done.shape == (1, *column.shape):
        return replace(spec, shape=(1, *spec.shape))
    if done.shape == column.shape[::-1] and len(spec.shape) == 2 and done.shape != column.shape:
        return replace(spec, transposed=True)
    if done.shape == column.shape:
        moved: Sequence[float] = done.ravel().tolist()
        added = moved[0]
        if moved == (rows + added).tolist():
            return replace(spec, added=added)
        if sorted(moved) == rows.tolist():
            # A bias is added before the rows are put in order: both are in the file's.
            return replace(spec, row_order=tuple(map(int, moved))) if len(spec.shape) == 2 else spec
    raise CheckpointError(
        f"{spec.file}: {spec.name}: transformers converts it in a way that cannot be streamed"
    )
