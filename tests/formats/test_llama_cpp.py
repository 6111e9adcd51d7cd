"""llama.cpp reads what `quantize` writes, and says the same.

Needs `make baselines`; llama.cpp runs in a process of its own, for it brings a ggml too.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexinfer.convert.quantize import quantize
from tests.conftest import Load
from tests.stress.soak_cases import Case
from tests.stress.soak_models import make_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama.cpp is not installed: make baselines",
)
VOCAB = 2048
# llama.cpp rounds the dimensions between which YaRN scales to whole ones, gpt-oss does not: that is
# much in a model of this size.
CHANGES = {"gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}}
TEXT = "It's 1234 o'clock,\n  and the (second) time"
PROGRAM = """
import json, sys
from llama_cpp import Llama
file, ids, text = json.loads(sys.argv[1])
model = Llama(file, n_ctx=64, n_threads=1, verbose=False, logits_all=True)
model.eval(ids)
scores = [row.tolist() for row in model.scores[: len(ids)]]
print(json.dumps({"logits": scores, "ids": model.tokenize(text.encode(), add_bos=False)}))
"""


@pytest.mark.parametrize("family", [*gguf_models.FAMILIES, *gguf_models.MIXTURES])
def test_llama_cpp_says_the_same(family: str, tmp_path: Path, load: Load) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        (gguf_models.FAMILIES | gguf_models.MIXTURES)[family].config(
            vocab_size=VOCAB, **CHANGES.get(family, {})
        ),
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.tie_weights()
    model.save_pretrained(tmp_path / "source")
    make_tokenizer(cast(Case, SimpleNamespace(number=1, vocab=VOCAB)), tmp_path / "source")
    report = quantize(tmp_path / "source", tmp_path / "copy", "q8_0", progress=False)
    assert not report.notes

    ids = [5, 77, 300, 1024, 9, 2000, 41, 8]
    request = json.dumps([str(tmp_path / "copy" / "model.gguf"), ids, TEXT])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, request], capture_output=True, text=True, check=True
    )
    theirs: dict[str, Any] = json.loads(done.stdout)
    ours = load(tmp_path / "copy", logits_to_keep=len(ids))(torch.tensor([ids])).logits[0]
    difference = ours - torch.tensor(theirs["logits"])
    # Near a tie between two experts, rounding sends a position to the other one.
    if family in gguf_models.MIXTURES:
        assert (difference.norm(dim=-1) / ours.norm(dim=-1)).median() < 0.05
    else:
        assert difference.norm() < 0.05 * ours.norm()
    assert theirs["ids"] == AutoTokenizer.from_pretrained(tmp_path / "copy")(TEXT)["input_ids"]
