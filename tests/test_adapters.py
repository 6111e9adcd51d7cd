"""LoRA adapters beside streamed weights: what transformers and PEFT make of them."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from tests.conftest import Load, MakeCheckpoint, logits, prompt, resize_to_share, stock

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("family", TARGETS)
def test_an_adapter_is_applied(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path, family: str
) -> None:
    path = checkpoint(family, torch.bfloat16)
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=TARGETS[family], task_type="CAUSAL_LM")
    adapted = get_peft_model(stock(path), settings).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path)
    model, with_adapter = load(path), stock(path)
    plain = logits(model, prompt(2))
    for one in (model, with_adapter):
        one.load_adapter(tmp_path)
    by_peft = PeftModel.from_pretrained(load(path), tmp_path)
    for share in (1.2, 0.3):
        for ours, theirs in ((model, with_adapter), (by_peft, adapted)):
            resize_to_share(ours, share)
            found = logits(ours, prompt(2))
            assert torch.equal(found, logits(theirs, prompt(2)))
            assert not torch.equal(found, plain)
            call = {"input_ids": prompt(), "max_new_tokens": 5, "do_sample": False}
            assert torch.equal(ours.generate(**call), theirs.generate(**call))
    kept = get_peft_model_state_dict(by_peft)
    assert len(kept) == len(get_peft_model_state_dict(adapted))
    with pytest.raises(RuntimeError, match="is streamed from disk"):
        by_peft.merge_and_unload()
    with by_peft.disable_adapter():
        assert torch.equal(logits(by_peft, prompt(2)), plain)
