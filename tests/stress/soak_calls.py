"""What can be asked of a loaded model in a soak: (model, call, case) -> what is compared."""

import hashlib
import os
import random
from collections.abc import Callable
from typing import Any

from tests.stress.soak_cases import DRAFTED, Call, Case


def _generate(**options: Any) -> Callable[..., Any]:
    def run(model: Any, call: Call, case: Case) -> Any:
        import torch

        ids = _ids(call, case)
        mask = torch.ones_like(ids)
        if call.batch > 1 and call.kind == "batch":
            mask[0, : call.prompt_tokens // 2] = 0
        torch.manual_seed(call.seed)
        with_margins = call.kind == "greedy" and case.draft is not None
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=call.new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            **{"do_sample": False}
            | options
            | ({"num_beams": call.batch} if call.kind == "beams" else {}),
            **({"output_logits": True, "return_dict_in_generate": True} if with_margins else {}),
        )
        if not with_margins:
            return output.tolist()
        leads = [logits[0].float().topk(2).values.tolist() for logits in output.logits]
        return {
            "text": output.sequences[0].tolist(),
            "margins": [first - second for first, second in leads],
        }

    return run


def _draft(model: Any, call: Call, case: Case) -> Any:
    return _generate(assistant_model=DRAFTS[case.seed, case.number])(model, call, case)


def _tokenize(model: Any, call: Call, case: Case) -> Any:
    """The text there and back; the reference by transformers' own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = (
        model.flexinfer.tokenizer
        if hasattr(model, "flexinfer")
        else AutoTokenizer.from_pretrained(model.name_or_path)
    )
    ids = tokenizer("the quick brown fox jumps over the lazy dog " * call.prompt_tokens)[
        "input_ids"
    ]
    return [ids, tokenizer.decode(ids)]


def _score(use_cache: bool) -> Callable[..., Any]:
    def run(model: Any, call: Call, case: Case) -> Any:
        import torch

        with torch.no_grad():
            logits = model(_ids(call, case), use_cache=use_cache).logits
        return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy()).hexdigest()

    return run


def _resize(model: Any, call: Call, case: Case) -> Any:
    """Another budget within the group; the reference has none."""
    budget = int(os.environ["FLEXINFER_SOAK_MEMORY"])
    if budget:
        plan = model.flexinfer.plan
        spare = plan.locked_bytes + plan.unused_bytes
        less = random.Random(call.seed).random() * spare
        model.flexinfer.resize(budget if call.seed % 2 else int(plan.budget_bytes - less))
    return None


CALLS: dict[str, Callable[..., Any]] = {
    "greedy": _generate(),
    "sample": _generate(do_sample=True, temperature=0.9, top_k=40, top_p=0.9),
    "beams": _generate(),
    "batch": _generate(),
    "lookup": _generate(prompt_lookup_num_tokens=6),
    "score": _score(use_cache=True),
    "score without cache": _score(use_cache=False),
    "draft": _draft,
    "tokenize": _tokenize,
    "resize": _resize,
}


def _ids(call: Call, case: Case) -> Any:
    import torch

    rows = 1 if call.kind == "beams" else call.batch
    generator = torch.Generator().manual_seed(call.seed)
    return torch.randint(3, case.vocab, (rows, call.prompt_tokens), generator=generator)


DRAFTS: dict[tuple[int, int], Any] = {}  # by case: the draft model of this process


def prepare(case: Case) -> None:
    """Make what a program would hold beside the model: a draft model, if a call wants one."""
    if any(call.kind == "draft" for call in case.calls):
        import torch
        import transformers

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
        }
        torch.manual_seed(1)
        config = transformers.LlamaConfig(
            vocab_size=case.vocab, **sizes, max_position_embeddings=1024
        )
        draft = transformers.AutoModelForCausalLM.from_config(config).eval()
        draft.generation_config.num_assistant_tokens = DRAFTED
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        DRAFTS[case.seed, case.number] = draft
