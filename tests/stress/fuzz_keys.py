"""Keys of each format and the values worth trying for them."""

from tests.stress.gguf_changes import ARCHITECTURE
from tests.stress.json_changes import Keys


def gguf_keys() -> Keys:
    from flexinfer.formats.gguf_families import FAMILIES

    numbers = ["context_length", "embedding_length", "feed_forward_length", "rope.dimension_count"]
    numbers += ["attention.head_count", "attention.head_count_kv", "attention.key_length"]
    numbers += ["attention.sliding_window", "rope.scaling.original_context_length"]
    numbers += ["expert_count", "expert_used_count", "expert_feed_forward_length"]
    ratios = [
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
    ]
    ratios += ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"]
    ratios += ["attn_logit_softcapping", "final_logit_softcapping"]
    kinds: Keys = {
        "block_count": [1, 2, 3, 10**9, *{family.layers_of_27b for family in FAMILIES.values()}],
        "rope.scaling.type": ["none", "linear", "yarn", "longrope", "bananas"],
        **{name: [0, 1, 8, 16, 32, 64, 10**9, [16, 16], [8, 16]] for name in numbers},
        **{name: [0.0, 1e-5, 0.5, 1.0, 2.0, 10_000.0, [1.0, 1.0]] for name in ratios},
    }
    return {
        "general.architecture": [
            *{family.architecture for family in FAMILIES.values()},
            "bananas",
            "llama4",
        ],
        "general.alignment": [1, 8, 64, 2**40, 2**63],
        "general.name": ["owner/name"],
        "split.no": [0, 1, 2],
        "split.count": [0, 1, 2, 3],
        "split.tensors.count": [0, 1, 10**6],
        "tokenizer.ggml.tokens": [["a", "b"], [], [1, 2]],
        "tokenizer.ggml.eos_token_id": [0, 47, 48, 10**9],
        "tokenizer.ggml.padding_token_id": [0, 47, 48, 10**9],
        **{f"{ARCHITECTURE}.{name}": values for name, values in kinds.items()},
    }


def config_keys() -> Keys:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    layers = ["full_attention", "sliding_attention", "linear_attention"]
    ropes = ["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
    return {
        "model_type": list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        "auto_map": [
            {"AutoConfig": "code.Config", "AutoModelForCausalLM": "owner/name--code.Model"}
        ],
        "trust_remote_code": [True],
        "_name_or_path": ["owner/name", "/etc", "../.."],
        "configuration_files": [["config.4.0.0.json"], ["config.4.0/../../../x.json"]],
        "attn_implementation": [
            "owner/name",
            "kernels-community/flash-attn2",
            "flash_attention_2",
            "eager",
        ],
        "_attn_implementation": ["owner/name:code", "paged|eager"],
        "experts_implementation": ["owner/name", "eager"],
        "quantization_config": [
            {"quant_method": method} for method in ("flexinfer", "gptq", "bitsandbytes", "fp8")
        ],
        "layer_types": [layers, layers[:2]],
        "rope_scaling": [{"rope_type": kind, "factor": 2.0} for kind in ropes],
        "rope_parameters": [{"rope_type": kind, "rope_theta": 1e4, "factor": 0} for kind in ropes],
        "num_labels": [10**9],
        "num_hidden_layers": [10**9],
        "num_experts": [10**9],
        "dtype": ["bfloat16", "int8", "float64", "nn"],
        "text_config": [{}],
        "hidden_act": ["silu", "relu", "nothing"],
        "cache_implementation": ["static", "offloaded"],
    }
