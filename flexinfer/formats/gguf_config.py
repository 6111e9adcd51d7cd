"""What config.json would say of the model in a GGUF file: by the table of families, and what
follows from its tensors.

Every value is checked before anything is computed with it: files come from strangers.
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from flexinfer.formats.gguf import AGAIN, GGUF, LongArray
from flexinfer.formats.gguf_families import FAMILIES, Family
from flexinfer.formats.tensors import TensorSpec
from flexinfer.messages import shown

TOKEN_IDS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
# Keys with these endings are not counts.
RATIOS = ("epsilon", "scale", "softcapping")


def family_of(gguf: GGUF) -> Family:
    """The entry for the file's architecture. Raises CheckpointError for one that cannot be run."""
    name, experts = gguf.architecture, any("_exps." in tensor for tensor in gguf.tensors)
    found = [family for family in FAMILIES.values() if family.architecture == name]
    if not found:
        works = ", ".join(sorted({family.architecture for family in FAMILIES.values()}))
        gguf.refuse(f"the architecture {shown(name)} cannot be run; these can: {works}")
    alike = [family for family in found if family.experts == experts]
    if not alike:
        gguf.refuse(
            f"{name} {'with' if experts else 'without'} experts (a mixture), which cannot be run"
        )
    return alike[0]


def config_of(gguf: GGUF) -> dict[str, Any]:
    """What config.json would say. Raises CheckpointError for an architecture that cannot be run."""
    family = family_of(gguf)
    tokens = _tensor(gguf, "token_embd.weight").shape[0]
    config: dict[str, Any] = {
        "dtype": "float32",
        "model_type": family.model_type,
        "vocab_size": tokens,
    }
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    for key in ("embedding_length", "attention.head_count", "block_count"):
        _needed(gguf, key)
    for key, theirs in family.keys.items():
        if key not in family.only and _of(gguf, key) is not None:
            config[theirs] = _ratio(gguf, key) if key.endswith(RATIOS) else _size(gguf, key)
    for key, value in family.only.items():
        if _of(gguf, key) != value:
            gguf.refuse(
                f"{gguf.architecture}.{key} is {shown(_of(gguf, key))}, only {value} can be run yet"
            )
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
        | (_layer_types(gguf) if family.convolutions else {})
        | _of_heads(gguf, family)
        | _token_ids(gguf)
    )


def _layer_types(gguf: GGUF) -> dict[str, Any]:
    """Which layers are convolutions: those without heads of keys."""
    layers = _needed(gguf, "block_count")
    counts = gguf.of_architecture("attention.head_count_kv")
    counts = counts if isinstance(counts, list) else [counts] * layers
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or len(counts) != layers or len({*counts} - {0}) != 1:
        gguf.refuse(
            f"{gguf.architecture}.attention.head_count_kv is {shown(counts)} for {layers} layers, "
            f"not one number or 0 for each: {AGAIN}"
        )
    return {
        "num_key_value_heads": max(counts),
        "layer_types": ["full_attention" if count else "conv" for count in counts],
    }


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
        local = {
            "rope_type": "default",
            "rope_theta": _ratio(gguf, "rope.freq_base_swa") or 10_000.0,
        }
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
        gguf.refuse(
            f"{gguf.architecture}.{key} differs from layer to layer, which cannot be run yet"
        )
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
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": _ratio(gguf, "rope.freq_base") or 10_000.0,
    }
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
    alike = [
        one
        for one in tried
        if np.allclose(divisors, llama3_divisors(one, theta, rotated), rtol=1e-3)
    ]
    if not alike:
        gguf.refuse(
            "rope_freqs.weight scales the rotation in a way that is not Llama 3's; it cannot be run"
        )
    return alike[0]


def llama3_divisors(
    scaling: Mapping[str, Any], theta: float, rotated: int
) -> npt.NDArray[np.float64]:
    """What Llama 3's `scaling`, in transformers' words, divides the frequencies of `rotated`
    numbers of a head by: [rotated / 2].
    """
    # Wavelengths in tokens.
    lengths = 2 * math.pi * theta ** (np.arange(0, rotated, 2) / rotated)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip(
        (scaling["original_max_position_embeddings"] / lengths - low) / (high - low), 0, 1
    )
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
