"""What the header of a GGUF file says of a model: flexinfer.formats.gguf_config, the other way
round.

Values by the table of families; how each parameter is changed before it is stored. Whether a header
holds all that matters is not reasoned about: it is read back, and the configuration that comes of
it is compared with the one it was made of (`difference`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, PretrainedConfig

from flexinfer.formats.gguf_config import RATIOS, llama3_divisors
from flexinfer.formats.gguf_families import FAMILIES, Family
from flexinfer.model.gguf_tensors import rotated_heads

# Parts of the names of settings that do not change what a model computes.
TRAINING = {"drop", "initializer", "use_cache", "pretraining_tp", "label", "output_", "aux_loss"}

TRAINING |= {"chunk_size", "gradient", "jitter", "_token_id"}

NOT_OF_THE_MODEL = {"dtype", "_name_or_path", "transformers_version", "architectures", "model_type"}

NOT_OF_THE_MODEL |= {"problem_type", "sliding_window", "is_encoder_decoder", "return_dict", "n_ctx"}

NOT_OF_THE_MODEL |= {"tie_word_embeddings", "max_window_layers", "quantization_config"}

# Said by multi_query.
NOT_OF_THE_MODEL |= {"num_kv_heads"}

ROPE_DEFAULTS = {"partial_rotary_factor": 1.0}
# Relative difference that float32 storage may cause.
CLOSE = 1e-6

Take = Callable[[torch.Tensor], torch.Tensor]


class HeaderError(ValueError):
    """A model that llama.cpp's header has no words for."""


def stored_as(tensor: str, shape: tuple[int, ...], config: PretrainedConfig) -> Take | None:
    """What makes the numbers of `tensor` of its parameter, which has `shape`; None where they are
    the same.
    """
    family = FAMILIES[config.model_type]
    if tensor.endswith(family.flat) and 1 in shape:
        return torch.squeeze
    if family.norms_plus_one and tensor.endswith("norm.weight"):
        return lambda weight: weight.float() + 1
    if heads := rotated_heads(tensor, config):
        return lambda rows: rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    return None


def filled(config: PretrainedConfig) -> dict[str, Any]:
    """The values of `config`, with those that follow from others where they are left out."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    derived = {"head_dim": hidden // heads, "num_key_value_heads": heads}
    derived |= {"n_inner": 4 * hidden, "ffn_hidden_size": 4 * hidden}
    facts: dict[str, Any] = config.to_dict()
    return facts | {key: value for key, value in derived.items() if facts.get(key, 0) is None}


def add_model(writer: GGUFWriter, config: PretrainedConfig, family: Family) -> None:
    """Add the values that say what `config` says. Raises HeaderError where llama.cpp's words do not
    reach.
    """
    facts = filled(config)
    width = facts.get("head_dim") or config.hidden_size // config.num_attention_heads
    ropes = facts.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    part = rope.get("partial_rotary_factor") or facts.get("partial_rotary_factor") or 1
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": int(width * part),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": ropes.get("sliding_attention", {}).get("rope_theta"),
    }
    known = {
        key: facts.get(theirs, getattr(config, theirs, None)) for key, theirs in family.keys.items()
    }
    values |= {key: value for key, value in known.items() if value is not None}
    if family.convolutions:
        heads = config.num_key_value_heads
        values["attention.head_count_kv"] = [
            heads if kind == "full_attention" else 0 for kind in config.layer_types
        ]
    for key, value in (values | family.only | _scaling(rope)).items():
        if value is not None:
            add(
                writer,
                f"{family.architecture}.{key}",
                float(value) if key.endswith(RATIOS) else value,
            )


def add(writer: GGUFWriter, key: str, value: bool | int | float | str | list[int]) -> None:
    """Add one value, its type being that which llama.cpp reads."""
    adders: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32}
    adders |= {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    adders[type(value)](key, value)


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """How rotation is scaled; what is kept as a tensor is in `rope_tensors`."""
    kind, original = rope.get("rope_type", "default"), rope.get("original_max_position_embeddings")
    if kind in {"linear", "yarn"}:
        found = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    elif kind == "longrope":
        found = {"rope.scaling.attn_factor": rope.get("attention_factor")}
    elif kind in {"default", "llama3"}:
        return {}
    else:
        raise HeaderError(f"llama.cpp's header has no rotation of type {kind!r}")
    return found | ({"rope.scaling.original_context_length": original} if original else {})


def rope_tensors(config: PretrainedConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors that llama.cpp keeps of a scaled rotation: divisors of its frequencies."""
    facts = filled(config)
    ropes = facts.get("rope_parameters") or {}
    rope = ropes.get("full_attention", ropes)
    kind = rope.get("rope_type")
    if kind == "longrope":
        rows = {
            f"rope_factors_{length}.weight": rope[f"{length}_factor"]
            for length in ("long", "short")
        }
    elif kind == "llama3":
        rotated = facts.get("head_dim") or config.hidden_size // config.num_attention_heads
        rows = {"rope_freqs.weight": llama3_divisors(rope, rope["rope_theta"], rotated)}
    else:
        return {}
    return {name: np.array(numbers, np.float32) for name, numbers in rows.items()}


def difference(config: PretrainedConfig, read: Mapping[str, Any]) -> str | None:
    """What matters and differs between `config` and what a header is `read` as; None where nothing
    does.
    """
    there = AutoConfig.for_model(**read)
    ours, theirs = filled(config), filled(there)
    for key in type(there)().to_dict():
        if key in NOT_OF_THE_MODEL or any(word in key for word in TRAINING):
            continue
        if key in ours and not _alike(ours[key], theirs.get(key)):
            return f"{key} is {ours[key]!r}, and {theirs.get(key)!r} by llama.cpp's header"
    return None


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = (
            [side.get(key, ROPE_DEFAULTS.get(key)) for side in (one, other)]
            for key in {*one, *other}
        )
        return all(_alike(*pair) for pair in pairs)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=CLOSE)
    return bool(one == other)
