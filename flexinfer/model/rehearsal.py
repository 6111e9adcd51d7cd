"""What every run does once, done on a model of a few kilobytes: so that it is measured instead of
guessed.

A first pass imports modules, starts kernel threads and has the kernels set memory aside; it touches
the code that all later passes need. After a rehearsal all of that is in the process, and what is
measured then is what a run takes beside its model.
"""

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexinfer.kernels.dense import fill_kernel_caches
from flexinfer.memory.libraries import LibraryPages, library_pages, page_out_libraries

# Rows of the prompt: kernels for many rows need memory that those for one row do not.
ROWS = 64

SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 256,
}


@cache
def rehearse_once(
    dtype: torch.dtype, attention: str, *, dense: bool, in_blocks: bool
) -> LibraryPages:
    """Rehearse, and let go of the library pages that importing has touched. Returns those that a
    pass needs.

    Once a process for each dtype and kind of attention, and for weights that are floats (`dense`)
    or in ggml's blocks or both.
    """
    rehearse(dtype, attention, in_blocks)
    if dense:
        fill_kernel_caches(dtype)
    page_out_libraries()
    rehearse(dtype, attention, in_blocks)
    return library_pages()


def rehearse(dtype: torch.dtype, attention: str, in_blocks: bool = False) -> None:
    """Generate two tokens with a model of random weights, by the kernels for `dtype` and the given
    kind of attention; and multiply with weights `in_blocks`.
    """
    if in_blocks:
        # This import loads a shared library.
        from flexinfer.kernels import ggml

        ggml.rehearse()
    config = LlamaConfig(**SHAPE | {"attn_implementation": attention})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        ids = torch.ones(1, ROWS, dtype=torch.long)
        model.generate(ids, attention_mask=ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
