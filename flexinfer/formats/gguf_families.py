"""One entry per model family: how llama.cpp's GGUF file of it differs from transformers' config and
parameters.

Both directions use the table: reading a file (flexinfer.formats.gguf_config) and writing one
(gguf_header). To add a family, add an entry; names of tensors come from the `gguf` package. What is
the same in all families is not here: token ids, sizes that follow from others, scaled rotation.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model type of transformers and its GGUF file. Keys of the header are those below
    "<architecture>.".
    """

    # Name in transformers.
    model_type: str
    # Name in llama.cpp.
    architecture: str
    # Key of the header -> key of the config.
    keys: dict[str, str]
    # Values of the config that are the same in every file.
    fixed: dict[str, Any] = field(default_factory=dict)
    # Keys of the config that are true if this tensor is there.
    present: dict[str, str] = field(default_factory=dict)
    # Keys of the config that are true if this tensor is missing.
    absent: dict[str, str] = field(default_factory=dict)
    # Keys of the config that are the row length of this tensor.
    widths: dict[str, str] = field(default_factory=dict)
    # Of the header: the one value that can be run.
    only: dict[str, int] = field(default_factory=dict)
    experts: bool = False
    # The numbers of a head that rotary positions rotate: all, the first ones, or none
    rotated: Literal["all", "part", "none"] = "all"
    # Layers with a sliding window have a base of their own, and no scaling.
    two_rotations: bool = False
    # Parameters of YaRN in the config.
    yarn: dict[str, Any] = field(default_factory=dict)
    # Layers of the Gemma whose attention is scaled by the width of all heads.
    layers_of_27b: int = 0
    # Whether rows of Q and K that are rotated together lie side by side.
    rows_by_pairs: bool = False
    # Whether the file stores 1 + weight.
    norms_plus_one: bool = False
    # Tensors that lack a dimension of the parameter, which is 1.
    flat: tuple[str, ...] = ()
    # Whether layers without heads of keys are convolutions.
    convolutions: bool = False


KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS = KEYS | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
HEAD = {"attention.key_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
LOCAL_EXPERTS = EXPERTS | {"expert_count": "num_local_experts"}
EXPERT_WIDTH = {"expert_feed_forward_length": "moe_intermediate_size"}
SHARED_WIDTH = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
ROWS_OF_EXPERT = {"moe_intermediate_size": "blk.0.ffn_down_exps.weight"}
CAPS = {key: key for key in ("attn_logit_softcapping", "final_logit_softcapping")}
SCALES = {
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
    "logit_scale": "logits_scaling",
}


def _layer_norm(key: str) -> dict[str, str]:
    return KEYS | {"attention.layer_norm_epsilon": key}


LLAMA = Family(
    model_type="llama",
    architecture="llama",
    keys=RMS | HEAD,
    present={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
    rows_by_pairs=True,
)
# Of several entries for one architecture a file is read as the first that agrees on whether there
# are experts.
FAMILIES = {
    family.model_type: family
    for family in (
        LLAMA,
        replace(LLAMA, model_type="mistral", present={}),
        replace(
            LLAMA, model_type="mixtral", keys=RMS | HEAD | LOCAL_EXPERTS, present={}, experts=True
        ),
        replace(LLAMA, model_type="arcee", architecture="arcee"),
        replace(LLAMA, model_type="granite", architecture="granite", keys=RMS | SCALES),
        replace(LLAMA, model_type="smollm3", architecture="smollm3", keys=RMS),
        Family(
            model_type="seed_oss",
            architecture="seed_oss",
            keys=RMS | HEAD,
            present={"attention_bias": "blk.0.attn_q.bias"},
        ),
        Family(model_type="olmo2", architecture="olmo2", keys=RMS),
        Family(
            model_type="glm4",
            architecture="glm4",
            keys=RMS | HEAD,
            present={"attention_bias": "blk.0.attn_q.bias"},
            rotated="part",
        ),
        Family(
            model_type="cohere",
            architecture="command-r",
            keys=_layer_norm("layer_norm_eps") | {"logit_scale": "logit_scale"},
            present={"use_qk_norm": "blk.0.attn_q_norm.weight"},
        ),
        Family(
            model_type="phi",
            architecture="phi2",
            keys=_layer_norm("layer_norm_eps"),
            rotated="part",
        ),
        Family(model_type="gemma", architecture="gemma", keys=RMS | HEAD, norms_plus_one=True),
        Family(model_type="qwen2", architecture="qwen2", keys=RMS),
        Family(model_type="qwen3", architecture="qwen3", keys=RMS | HEAD),
        Family(
            model_type="qwen2_moe",
            architecture="qwen2moe",
            keys=RMS | EXPERTS | EXPERT_WIDTH | SHARED_WIDTH,
            fixed={"norm_topk_prob": False},
            widths=ROWS_OF_EXPERT
            | {"shared_expert_intermediate_size": "blk.0.ffn_down_shexp.weight"},
            experts=True,
            flat=("ffn_gate_inp_shexp.weight",),
        ),
        Family(
            model_type="qwen3_moe",
            architecture="qwen3moe",
            keys=RMS | HEAD | EXPERTS | EXPERT_WIDTH,
            fixed={"norm_topk_prob": True},
            widths=ROWS_OF_EXPERT,
            experts=True,
        ),
        Family(model_type="olmoe", architecture="olmoe", keys=RMS | EXPERTS, experts=True),
        Family(
            model_type="granitemoe",
            architecture="granitemoe",
            keys=RMS | LOCAL_EXPERTS | SCALES,
            experts=True,
            rows_by_pairs=True,
        ),
        Family(
            model_type="gpt_oss",
            architecture="gpt-oss",
            keys=RMS
            | HEAD
            | WINDOW
            | LOCAL_EXPERTS
            | {"expert_feed_forward_length": "intermediate_size"},
            experts=True,
            yarn={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
        ),
        Family(
            model_type="gemma2",
            architecture="gemma2",
            keys=RMS | HEAD | WINDOW | CAPS,
            layers_of_27b=46,
            norms_plus_one=True,
        ),
        Family(
            model_type="gemma3_text",
            architecture="gemma3",
            keys=RMS | HEAD | WINDOW | CAPS,
            two_rotations=True,
            layers_of_27b=62,
            norms_plus_one=True,
        ),
        Family(
            model_type="lfm2",
            architecture="lfm2",
            keys={key: theirs for key, theirs in RMS.items() if not key.endswith("_kv")}
            | {"attention.layer_norm_rms_epsilon": "norm_eps", "shortconv.l_cache": "conv_L_cache"},
            fixed={"block_auto_adjust_ff_dim": False},
            flat=("shortconv.conv.weight",),
            convolutions=True,
        ),
        Family(
            model_type="phi3",
            architecture="phi3",
            keys=RMS | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
            fixed={"sliding_window": None},
            rotated="part",
        ),
        Family(
            model_type="starcoder2", architecture="starcoder2", keys=_layer_norm("norm_epsilon")
        ),
        Family(
            model_type="stablelm",
            architecture="stablelm",
            keys=_layer_norm("layer_norm_eps"),
            present={"use_qkv_bias": "blk.0.attn_q.bias"},
            absent={"use_parallel_residual": "blk.0.ffn_norm.weight"},
            rotated="part",
        ),
        Family(
            model_type="nemotron",
            architecture="nemotron",
            keys=_layer_norm("norm_eps") | HEAD,
            rotated="part",
            norms_plus_one=True,
        ),
        # With several heads of keys (Falcon 40B) llama.cpp puts rows in an order that is not known
        # here.
        Family(
            model_type="falcon",
            architecture="falcon",
            keys=_layer_norm("layer_norm_epsilon") | {"feed_forward_length": "ffn_hidden_size"},
            only={"attention.head_count_kv": 1},
        ),
        Family(
            model_type="gpt2",
            architecture="gpt2",
            keys={
                "context_length": "n_positions",
                "embedding_length": "n_embd",
                "block_count": "n_layer",
                "feed_forward_length": "n_inner",
                "attention.head_count": "n_head",
                "attention.layer_norm_epsilon": "layer_norm_epsilon",
            },
            rotated="none",
        ),
    )
}
