"""TODO"""

import math
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from flexinfer.formats.checkpoint import Checkpoint
from flexinfer.formats.config import load_config, refusing
from flexinfer.model.dry_run import _dry_run
from flexinfer.model.pass_memory import PassMeter, meta_model
from flexinfer.model.skeleton import Skeleton, _compute_dtype
from flexinfer.streaming.kv_cache import LayerShape


def resident_bytes(checkpoint: Checkpoint, dtype: str | torch.dtype, context: int | None) -> int:
    """What a checkpoint that cannot be streamed takes when transformers loads it whole: weights, KV cache and activations."""
    config, compute_dtype, layers = _resident_facts(checkpoint, dtype)
    context = context or 2048
    weights_bytes = sum(
        math.prod(spec.shape)
        * (compute_dtype.itemsize if spec.encoding.is_float else spec.torch_dtype.itemsize)
        for spec in checkpoint.tensors.values()
    )
    kv_bytes = sum(layer.nbytes(context, compute_dtype.itemsize) for layer in layers)
    meter = _resident_meter(config, compute_dtype, layers)
    return weights_bytes + kv_bytes + (meter.planned_bytes(context, 1) if layers else 0)


def _resident_facts(
    checkpoint: Checkpoint, dtype: str | torch.dtype
) -> tuple[PretrainedConfig, torch.dtype, list[LayerShape]]:
    config = load_config(checkpoint)
    compute_dtype = _compute_dtype(dtype, config, checkpoint)
    with refusing(checkpoint.config_file, "no causal LM"):
        return config, compute_dtype, _dry_run(meta_model(config, torch.bfloat16), ())[2]


def _resident_meter(config: PretrainedConfig, dtype: torch.dtype, layers: Sequence[LayerShape]) -> PassMeter:
    """In bfloat16, the one dtype in which torch's product for experts runs on the meta device, scaled to `dtype`."""
    return PassMeter(config, torch.bfloat16, layers, [], scale=dtype.itemsize // torch.bfloat16.itemsize)


def load_resident(checkpoint: Checkpoint, dtype: str | torch.dtype) -> Skeleton:
    """A checkpoint that cannot be streamed, loaded whole by transformers: a model with no weights left to place."""
    config, compute_dtype, layers = _resident_facts(checkpoint, dtype)
    with refusing(checkpoint.path, "transformers cannot load it"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=config,
            dtype=compute_dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
        )
    return Skeleton(
        model.eval().requires_grad_(False),
        checkpoint,
        specs={},
        weights=[],
        experts=None,
        kernels={},
        row_orders={},
        together=[],
        cache_layers=layers,
        kv_dtype=compute_dtype,
        meter=_resident_meter(config, compute_dtype, layers),
    )
