"""Which architectures of the installed transformers run here: each is built tiny and random, saved,
streamed and compared with stock transformers.

    python -m experiments.architectures [NAME ...] [--record results/quality/architectures.jsonl]
    python -m experiments.architectures --page docs/models.md

"yes" is said where everything is the same to the bit while nothing is locked: logits of a prompt,
the texts and logits of generate() for one sequence and for a batch with padding, and beams.
Otherwise the reason is given: what the error said, or that transformers itself cannot build or run
so small a one, of which nothing follows. GGUF is "yes" for families in
flexinfer.formats.gguf_families, which have tests of their own.

What it does not do: real sizes, speed, memory.
"""

import argparse
import json
import re
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

import flexinfer
from experiments.provenance import engine_commit
from experiments.record_files import QUALITY, load_lines
from flexinfer.formats.gguf_families import FAMILIES
from flexinfer.messages import cause
from flexinfer.model import pieces

RECORD = Path("results") / QUALITY / "architectures.jsonl"
COMMAND = "make models"
LIMIT_S = 180
BEGIN, END = "<!-- architectures -->\n", "<!-- end of architectures -->\n"
# Sizes, by whatever name a configuration has for them.
TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim"), 96),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_num_heads", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "kv_lora_rank", "v_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "sliding_window", "index_topk"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "n_group", "topk_group"), 1),
    **{"vocab_size": 160, "num_key_value_heads": 2, "num_experts_per_tok": 2, "q_lora_rank": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "word_embed_proj_dim": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "first_k_dense_replace": 1},
    **{"index_n_heads": 2, "index_head_dim": 16, "attention_window_size": 8},
}
# Keys that follow from others where they are None.
DERIVED = {"head_dim", "num_key_value_heads"}
MISSING = object()
# Where sizes depend on one another.
MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
OF_MODEL: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        **MAMBA_2,
        "shared_intermediate_size": 48,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA_2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        **{"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16, "mamba_expand": 2},
        **{"num_mem_blocks": 1, "attention_hidden_size": 128, "attention_head_dim": 32},
        **{"num_key_value_heads": 4, "use_shared_attention_adapter": False, "adapter_rank": 8},
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "deepseek_v2": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_key_value_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {**MAMBA_2, "mamba_d_ssm": 128},
}


class Unbuilt(Exception):
    """transformers itself cannot build, save or run it so small."""


def tiny_config(name: str) -> PretrainedConfig:
    """A configuration of model type `name` with few and small layers."""
    kind: Any = CONFIG_MAPPING[name]
    base = kind()
    text = base.get_text_config(decoder=True)
    values = {key: value for key, value in TINY.items() if _has(text, key)}
    if "qk_rope_head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    values |= OF_MODEL.get(name, {})
    part = next((key for key, value in vars(base).items() if value is text), None)
    return kind(**values) if part is None else kind(**{part: type(text)(**values)})


def _has(config: PretrainedConfig, key: str) -> bool:
    """Whether `key` of a configuration can be set, and is."""
    if isinstance(getattr(type(config), key, None), property):
        return False
    try:
        value = getattr(config, key, MISSING)
    except Exception:
        # Each layer has its own.
        return False
    return value is not MISSING and (value is not None or key in DERIVED)


@contextmanager
def of_transformers() -> Iterator[None]:
    """What goes wrong in the block is no fault of ours."""
    try:
        yield
    except TimeoutError:
        raise
    except Exception as error:
        raise Unbuilt(cause(error)) from error


def compare(name: str, folder: Path) -> str:
    """ "yes", or what differs. Raises Unbuilt, or whatever the engine raises."""
    torch.manual_seed(0)
    with of_transformers(), torch.no_grad():
        made = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16).eval()
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        made.save_pretrained(folder)
        stock = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        stock.eval().requires_grad_(False)
        expected = list(outputs(stock))
    model: Any = flexinfer.from_pretrained(
        folder, "8GiB", context=128, policy="none", logits_to_keep=32
    )
    with model.flexinfer:
        plan = model.flexinfer.plan
        if not plan.total_bytes:
            return "kept in memory whole, as stock transformers has it"
        for (what, theirs), (_, ours) in zip(expected, outputs(model), strict=True):
            if not torch.equal(theirs, ours):
                return f"other {what}"
        streams = plan.streamed_bytes > plan.overheads.unstreamed_bytes
        return "yes" if streams else "yes, but most of it stays in memory"


@torch.no_grad()
def outputs(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Logits and texts of fixed prompts, with what they are."""
    ids = torch.arange(3, 23)[None]
    yield "logits", model(ids).logits
    batch = torch.arange(30, 50).view(2, 10)
    mask = torch.ones_like(batch)
    mask[0, :4] = batch[0, :4] = 0
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    kept = {"output_logits": True, "return_dict_in_generate": True}
    for what, inputs, attended in (("text", ids, torch.ones_like(ids)), ("batch", batch, mask)):
        found = model.generate(inputs, attention_mask=attended, **asked, **kept)
        yield what, found.sequences
        yield f"{what}'s logits", torch.stack(found.logits).nan_to_num(7)
    yield "beams", model.generate(batch, attention_mask=mask, num_beams=2, **asked)


def answer(name: str) -> dict[str, str]:
    """What is recorded of model type `name`."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {LIMIT_S} s")

    said = {"name": name, "transformers": transformers.__version__, "commit": engine_commit()}
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {**said, "safetensors": "images are not supported yet"}
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = compare(name, Path(folder))
        except Unbuilt as error:
            found = f"not tried: {error}"
        except Exception as error:
            found = re.sub(r"\s+", " ", cause(error).replace(folder, "").lstrip(": "))
        finally:
            signal.alarm(0)
    return {**said, "safetensors": found[:200]}


def names() -> list[str]:
    """Model types that are decoders alone, or with a part for images."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def survey(wanted: list[str], record: Path, note: Callable[[str], None] = print) -> None:
    """Append an answer for each model type to `record`; those of this commit are kept."""
    known = {
        one["name"]
        for one in load_lines(record, COMMAND)
        if (one["commit"], one["transformers"]) == (engine_commit(), transformers.__version__)
    }
    pieces.PIECE_BYTES, pieces.ROW_MULTIPLE = 8192, 16
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    todo = [name for name in wanted if name not in known]
    for i, name in enumerate(todo, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = answer(name)
        with record.open("a") as stream:
            stream.write(json.dumps(found) + "\n")
        note(f"[{i}/{len(todo)}] {name}: {found['safetensors']}")


def page(record: Path) -> str:
    """The table of docs/models.md: the last answer for each model type."""
    last = {one["name"]: one["safetensors"] for one in load_lines(record, COMMAND)}
    in_gguf = set(FAMILIES)
    yes = [name for name, found in last.items() if found == "yes"]
    tried = [name for name, found in last.items() if not found.startswith("not tried")]
    lines = [
        f"Of transformers {transformers.__version__}: {len(yes)} of {len(tried)} architectures.",
        "",
        f"Yes, from safetensors: {', '.join(yes)}.",
        "",
        f"Yes, from GGUF too: {', '.join(sorted(in_gguf))}.",
        "",
        "| not, or not in full | why |",
        "|---|---|",
        *(
            f"| {name} | {found.replace('|', '/')} |"
            for name, found in last.items()
            if found != "yes"
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="model types; all without")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--page", type=Path, help="write the table into this file instead")
    options = parser.parse_args()
    if options.page is None:
        survey(options.names or names(), options.record)
        return
    before, rest = options.page.read_text().split(BEGIN)
    options.page.write_text(before + BEGIN + page(options.record) + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
