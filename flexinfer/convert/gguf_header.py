"""What the header of a GGUF file says of a model: flexinfer.formats.gguf_model, the other way round.

Values by transformers' mapping (integrations.ggml), completed with what llama.cpp computes with; tensors by the name map of the `gguf`
package, each with what is to be done to the parameter before it is stored. Whether a header holds all that matters is
not reasoned about: it is read back, and the configuration that comes of it compared with the one it was made of (`difference`).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, PretrainedConfig

from flexinfer.formats.gguf_model import (
    GRANITE_SCALES,
    MIXTRAL,
    MODEL_TYPES,
    TOKEN_IDS,
    corrected,
    llama3_divisors,
    mapped_values,
    processor_of,
    tensor_names,
)
from flexinfer.formats.tensors import ENCODINGS, TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = {theirs: ours for ours, theirs in MODEL_TYPES.items()} | {
    "mistral": "llama",
    MIXTRAL: "llama",
}

TRAINING = (
    "drop",
    "initializer",
    "use_cache",
    "pretraining_tp",
    "label",
    "output_",
    "aux_loss",
    "chunk_size",
    "gradient",
    "jitter",
)

NOT_OF_THE_MODEL = {
    "dtype",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "model_type",
    "problem_type",
    "sliding_window",
}

NOT_OF_THE_MODEL |= {
    "is_encoder_decoder",
    "return_dict",
    "tie_word_embeddings",
    "max_window_layers",
    "quantization_config",
    "n_ctx",
    "num_kv_heads",  # said by multi_query
}

ROPE_DEFAULTS = {"partial_rotary_factor": 1.0}

CLOSE = 1e-6  # of numbers kept as float32


class HeaderError(ValueError):
    """A model that llama.cpp's header has no words for."""


@dataclass(frozen=True, slots=True)
class Stored:
    """How a parameter lies in the file."""

    name: str  # in the file
    order: tuple[int, ...] | None = None  # row i of the parameter is row order[i] of the file
    transposed: bool = False  # the rows of the file are the columns of the parameter
    added: float = 0.0  # what the parameter is more than what is stored
    flat: bool = False  # the file has a dimension less, the first, which is 1


def stored_tensors(
    model: "PreTrainedModel", architecture: str, parameters: Iterable[str]
) -> dict[str, Stored]:
    """The tensor of each of `parameters`, in llama.cpp's names. Raises HeaderError for one that has none."""
    name_of = tensor_names(architecture, model)
    processor = processor_of(architecture, model.config)
    stored: dict[str, Stored] = {}
    state = model.state_dict()
    for parameter in parameters:
        name = name_of(parameter)
        if name is None:
            raise HeaderError(f"llama.cpp's {architecture} has no name for {parameter}")
        shape = tuple(state[parameter].shape)
        spec = corrected(_unplaced(name, shape), processor)
        order = spec.row_order
        if len(shape) == 1:  # said of weights alone: a bias goes with the rows of its weight
            weight = name.removesuffix(".bias").removesuffix(".weight") + ".weight"
            order = corrected(_unplaced(weight, (*shape, 1)), processor).row_order
        stored[parameter] = Stored(
            spec.name, order, spec.transposed, spec.added, len(spec.shape) > len(shape)
        )
    return stored


def _unplaced(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, Path(), 0, 0, ENCODINGS["F32"], shape)


def header_values(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The metadata that says what `config` says, by name. Raises HeaderError where llama.cpp's words do not reach."""
    facts = config.to_dict()
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = facts.get("head_dim") or hidden // heads
    ropes = facts.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    renames = mapped_values(config.model_type)
    values: dict[str, Any] = {key: facts.get(theirs) for key, theirs in renames.items()}
    values |= {
        "context_length": facts.get("max_position_embeddings") or facts.get("n_positions"),
        "feed_forward_length": facts.get("intermediate_size")
        or facts.get("n_inner")
        or facts.get("ffn_hidden_size")
        or 4 * hidden,
        "attention.head_count_kv": _key_value_heads(facts),
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * _partial(rope, facts)),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": ropes.get("sliding_attention", {}).get("rope_theta"),
        "attn_logit_softcapping": facts.get("attn_logit_softcapping"),
        "final_logit_softcapping": facts.get("final_logit_softcapping"),
    }
    if "attention.layer_norm_rms_epsilon" not in renames or architecture in {"falcon", "nemotron"}:
        values.pop("attention.layer_norm_rms_epsilon", None)
        names = ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
        values["attention.layer_norm_epsilon"] = next(facts[name] for name in names if name in facts)
    values |= _scaling(rope, facts) | _of_experts(facts)
    ids = {f"tokenizer.ggml.{ours}_token_id": facts.get(theirs) for ours, theirs in TOKEN_IDS.items()}
    return {
        **{f"{architecture}.{key}": value for key, value in values.items() if value is not None},
        **{key: number for key, number in ids.items() if isinstance(number, int)},
    }


def _of_experts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the header of a mixture has besides."""
    count = facts.get("num_local_experts") or facts.get("num_experts")
    if not count:
        return {}
    width = facts.get("moe_intermediate_size")
    oss = facts["model_type"] == "gpt_oss"
    scales = {key: facts.get(theirs) for key, theirs in GRANITE_SCALES.items()}
    return {
        "expert_count": count,
        "expert_used_count": facts["num_experts_per_tok"],
        "expert_feed_forward_length": facts["intermediate_size"] if oss else width,
        "expert_shared_feed_forward_length": facts.get("shared_expert_intermediate_size"),
        "attention.sliding_window": facts["sliding_window"] if oss else None,
    } | {key: None if scale is None else float(scale) for key, scale in scales.items()}


def _key_value_heads(facts: Mapping[str, Any]) -> int:
    if facts.get("multi_query") and not facts.get("new_decoder_architecture"):  # Falcon 7B
        return 1
    names = ("num_kv_heads", "num_key_value_heads", "num_attention_heads", "n_head")
    return int(next(facts[name] for name in names if facts.get(name)))


def _partial(rope: Mapping[str, Any], facts: Mapping[str, Any]) -> float:
    """The share of a head that is rotated."""
    return float(rope.get("partial_rotary_factor") or facts.get("partial_rotary_factor") or 1)


def _scaling(rope: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """How rotation is scaled; what is kept as a tensor is in `rope_tensors`."""
    kind = rope.get("rope_type", "default")
    if kind in {"linear", "yarn"}:
        original = rope.get("original_max_position_embeddings")
        return {
            "rope.scaling.type": kind,
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": original,
        }
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or facts.get(
            "original_max_position_embeddings"
        )
        return {
            "rope.scaling.original_context_length": original,
            "rope.scaling.attn_factor": rope.get("attention_factor"),
        }
    if kind not in {"default", "llama3"}:
        raise HeaderError(f"llama.cpp's header has no rotation of type {kind!r}")
    return {}


def rope_tensors(config: PretrainedConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that llama.cpp keeps of a scaled rotation: divisors of its frequencies."""
    facts = config.to_dict()
    ropes = facts.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    if rope.get("rope_type") == "longrope":
        factors = {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
        return {name: np.array(numbers, np.float32) for name, numbers in factors.items()}
    if rope.get("rope_type") != "llama3":
        return {}
    rotated = facts.get("head_dim") or config.hidden_size // config.num_attention_heads
    return {"rope_freqs.weight": llama3_divisors(rope, rope["rope_theta"], rotated).astype(np.float32)}


def difference(config: PretrainedConfig, read: Mapping[str, Any]) -> str | None:
    """What matters and is not the same in `config` and in what a header is `read` as; None where all is."""
    there = AutoConfig.for_model(**read)
    ours, theirs = config.to_dict(), there.to_dict()
    for facts in (ours, theirs):
        if facts.get("head_dim", 0) is None:
            facts["head_dim"] = config.hidden_size // config.num_attention_heads
    for key in type(there)().to_dict():
        if key in NOT_OF_THE_MODEL or key.endswith("_token_id") or any(word in key for word in TRAINING):
            continue
        if key in ours and not _alike(ours[key], theirs.get(key)):
            return f"{key} is {ours[key]!r}, and {theirs.get(key)!r} by llama.cpp's header"
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return all(
            _alike(one.get(key, ROPE_DEFAULTS.get(key)), other.get(key, ROPE_DEFAULTS.get(key)))
            for key in {*one, *other}
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=CLOSE)
    return bool(one == other)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written."""

    name: str
    kind: str  # ggml's name of the type
    shape: tuple[int, ...]  # of its elements
    nbytes: int
    offset_bytes: int = 0  # from the start of the file


def write_header(
    file: Path, architecture: str, values: Mapping[str, Any], entries: list[Entry]
) -> list[Entry]:
    """Write a GGUF file of `entries` that has no bytes of theirs yet, with all its length; returns them with their offsets."""
    writer = GGUFWriter(file, architecture)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for entry in entries:
        kind = GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset_bytes = file.stat().st_size
    placed = []
    for entry in entries:
        offset_bytes += -offset_bytes % GGUF_DEFAULT_ALIGNMENT
        placed.append(Entry(entry.name, entry.kind, entry.shape, entry.nbytes, offset_bytes))
        offset_bytes += entry.nbytes
    with file.open("r+b") as stream:
        stream.truncate(offset_bytes)
    return placed
