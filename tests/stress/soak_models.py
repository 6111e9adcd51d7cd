"""The checkpoint of a case: every parameter is random, and so are the merges of its tokenizer."""

import random
import shutil
from pathlib import Path

from experiments.real import real_tokenizer
from tests.stress.soak_cases import FAMILIES, Case


def make_tokenizer(case: Case, path: Path) -> None:
    """A byte-level tokenizer of the case's vocabulary, its merges drawn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    chance = random.Random(case.number)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(letters)}
    merges, listed = [], list(letters)
    while len(tokens) < case.vocab:
        left, right = chance.choice(listed), chance.choice(listed)
        if len(left) + len(right) <= 12 and left + right not in tokens:
            tokens[left + right] = len(tokens)
            listed.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=tokens, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def make_checkpoint(case: Case, path: Path) -> None:
    """Write the model of `case` to directory `path`; every parameter is random."""
    if case.blocks is None:
        make_floats(case, path)
        return
    from flexinfer.convert.quantize import quantize

    floats = path.with_name(path.name + "-floats")
    try:
        make_floats(case, floats)
        quantize(floats, path, case.blocks, progress=False)
    finally:
        shutil.rmtree(floats, ignore_errors=True)


def make_floats(case: Case, path: Path) -> None:
    """Write the model of `case` as safetensors."""
    import torch
    import transformers

    facts = dict(FAMILIES[case.family])
    config_class = getattr(transformers, facts.pop("config"))
    sizes = {"vocab_size": case.vocab, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = case.hidden // 64
    if case.family == "opt":
        sizes |= {
            "hidden_size": case.hidden,
            "word_embed_proj_dim": case.hidden,
            "ffn_dim": case.hidden * 3,
        }
        sizes |= {
            "num_hidden_layers": case.layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 1024,
        }
    elif case.family == "gpt2":
        sizes |= {
            "n_embd": case.hidden,
            "n_layer": case.layers,
            "n_head": heads,
            "n_positions": 1024,
        }
    else:
        sizes |= {
            "hidden_size": case.hidden,
            "intermediate_size": case.hidden * 3,
            "num_hidden_layers": case.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "max_position_embeddings": 1024,
            "tie_word_embeddings": case.tie,
        }
    torch.manual_seed(case.number)
    model = transformers.AutoModelForCausalLM.from_config(
        config_class(**sizes, **facts), dtype=getattr(torch, case.file_dtype)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path)
    if isinstance(case.tokenizer, str):
        shutil.copytree(real_tokenizer(case.tokenizer), path, dirs_exist_ok=True)
    elif case.tokenizer:
        make_tokenizer(case, path)
