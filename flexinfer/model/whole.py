"""Models that cannot be streamed, loaded whole by transformers: what they take, and how they are
loaded.
"""

import math

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexinfer.formats.config import load_config, refusing
from flexinfer.formats.tensors import Checkpoint, CheckpointError
from flexinfer.model.dry_run import dry_run
from flexinfer.model.pass_memory import PassMeter, meta_model
from flexinfer.model.skeleton import Skeleton, compute_dtype_of
from flexinfer.streaming.kv_cache import reserved_bytes


def whole_skeleton(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Skeleton:
    """A checkpoint that is to be loaded whole: no weights to stream, the model on the meta device.

    Reads headers alone.
    """
    config = load_config(checkpoint)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{checkpoint.config_file}: quantization_config: a model that cannot be streamed is "
            "loaded whole, and then only from a checkpoint in floats; take the original one"
        )
    compute_dtype = compute_dtype_of(dtype, config, checkpoint)
    with refusing(checkpoint.config_file, "no causal LM"):
        # In bfloat16, the one dtype in which torch's product for experts runs on the meta device;
        # scaled to the other.
        model = meta_model(config, torch.bfloat16)
        cache = dry_run(model, ())[2]
    whole_bytes = sum(
        math.prod(spec.shape)
        * (compute_dtype.itemsize if spec.encoding.is_float else spec.torch_dtype.itemsize)
        for spec in checkpoint.tensors.values()
    )
    return Skeleton(
        model,
        checkpoint,
        specs={},
        weights=[],
        experts=None,
        kernels={},
        row_orders={},
        together=[],
        cache=cache,
        kv_dtype=compute_dtype,
        meter=PassMeter(
            config,
            torch.bfloat16,
            cache,
            [],
            scale=compute_dtype.itemsize // torch.bfloat16.itemsize,
        ),
        whole_bytes=whole_bytes,
        whole_dtype=compute_dtype,
    )


def whole_model_bytes(skeleton: Skeleton, context: int) -> int:
    """What a model that is loaded whole takes: weights, KV cache and activations."""
    kv_bytes, _ = reserved_bytes(skeleton.cache.layers, context, skeleton.dtype, skeleton.dtype)
    activation_bytes = skeleton.meter.planned_bytes(context, 1)
    return skeleton.whole_bytes + kv_bytes + activation_bytes


def load_whole(skeleton: Skeleton) -> PreTrainedModel:
    """The model of a `whole_skeleton`, with its weights."""
    checkpoint = skeleton.checkpoint
    with refusing(checkpoint.path, "transformers cannot load it"):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=load_config(checkpoint),
            dtype=skeleton.dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    return model.eval().requires_grad_(False)
