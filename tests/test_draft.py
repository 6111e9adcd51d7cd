"""Drafts: the text is the one without, nothing is read for a candidate, sampling has the model's
own distribution, the budget is kept.
"""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import write_model
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

import flexinfer
import flexinfer.engine.load
from flexinfer.draft.economics import DraftCosts, Pace, best_candidates, expected_tokens, looked_up
from flexinfer.draft.substitute import DraftError
from flexinfer.engine.prepare import ContextOf, ProcessMemory, prepare
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.tokenizer import TokenizerMemory
from flexinfer.memory.libraries import LibraryPages
from flexinfer.plan.plan import Costs, DraftPlan, Overheads
from flexinfer.plan.planner import Planner
from flexinfer.plan.weights import Piece, Weight
from flexinfer.streaming.kv_cache import ContextError
from tests.conftest import Load, MakeCheckpoint, prompt, resize_to_share, smallest_budget, stock

pytestmark = pytest.mark.usefixtures("own_folder")
GREEDY: dict[str, Any] = {
    "max_new_tokens": 24,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WHOLE = {"intermediate_size": 192}  # of blocks of 32
FAMILIES_IN_BLOCKS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "opt",
    "gpt2",
    "gpt_neox",
)
# A margin between two logits that kernels for one row and for several may see otherwise.
NEAR = 1e-3


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Substitutes that are slow to make are kept for this test alone."""
    folder = tmp_path_factory.mktemp("drafts")
    monkeypatch.setattr(flexinfer.cache_dir, "cache_dir", lambda: folder)


def make(checkpoint: MakeCheckpoint, family: str = "llama", **config: Any) -> Path:
    return checkpoint(
        family, **(WHOLE if family not in ("opt", "gpt2", "gpt_neox") else {}) | config
    )


def draft_passes_read(model: PreTrainedModel) -> int:
    """Pieces read by a text whose draft passes read some: `reads` is more than passes times the
    pieces of one, and once what is locked of each weight.
    """
    engine = model.flexinfer
    locked = sum(count > 0 for count in engine.plan.locked_pieces.values())
    pieces = sum(
        len(w.pieces) - engine.plan.locked_pieces.get(w.name, 0)
        for w in engine.runner.planner.weights
    )
    return engine.stats()["reads"] - locked - engine.stats()["passes"] * pieces


@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("family", FAMILIES_IN_BLOCKS)
def test_text_is_that_of_the_model_and_a_draft_reads_no_weight(
    checkpoint: MakeCheckpoint, load: Load, family: str, share: float
) -> None:
    path = make(checkpoint, family)
    model = load(path, draft="substitute", draft_type="q8_0", draft_tokens=4, io_threads=0)
    resize_to_share(model, share)
    ours = model.generate(prompt(), **GREEDY)[0].tolist()
    theirs = stock(path).generate(
        prompt(), **GREEDY, output_logits=True, return_dict_in_generate=True
    )
    for i, (one, other) in enumerate(zip(ours[7:], theirs.sequences[0, 7:].tolist(), strict=True)):
        # Kernels for several rows add up in another order than the one for one row.
        if one != other:
            first, second = theirs.logits[i][0].topk(2).values.tolist()
            assert first - second < NEAR
            break
    stats = model.flexinfer.stats()
    assert draft_passes_read(model) == 0
    assert stats["draft_passes"] > 0
    assert stats["passes"] < 24
    assert stats["accepted"] == 24 - stats["passes"]
    assert stats["tokens_per_pass"] == pytest.approx(24 / stats["passes"])
    assert 0 < stats["accepted"] <= stats["drafted"]


def row_by_row(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention, a position at a time: torch's adds up in another order for several
    positions than for one.
    """
    groups, past = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = [
        F.scaled_dot_product_attention(
            query[:, :, i : i + 1],
            key[:, :, : past + i + 1],
            value[:, :, : past + i + 1],
            scale=scaling,
        )
        for i in range(query.shape[2])
    ]
    return torch.cat(rows, 2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *(("llama", "Q8_0"), ("qwen2", "Q8_0"), ("gpt2", "Q8_0")),
        *(("mistral", "Q4_0"), ("qwen3", "Q4_0"), ("phi3", "Q4_0")),
    ],
)
def test_exact_to_the_last_token_where_rows_do_not_depend_on_one_another(
    tmp_path: Path, load: Load, family: str, kind: str
) -> None:
    AttentionInterface.register("row_by_row", row_by_row)
    file, options = write_model(tmp_path, family, [kind]).file, GREEDY | {"max_new_tokens": 48}
    plain = load(file, policy="none")
    plain.set_attn_implementation("row_by_row")
    expected = plain.generate(prompt(), **options)
    for type, candidates in (("q2_k", 1), ("q2_k", 8), ("q4_0" if kind == "Q8_0" else "q3_k", 3)):
        model = load(file, draft="substitute", draft_type=type, draft_tokens=candidates)
        model.set_attn_implementation("row_by_row")
        resize_to_share(model, 0.3)
        assert torch.equal(model.generate(prompt(), **options), expected)
        assert model.flexinfer.stats()["draft_passes"] > 0


def test_other_drafts_and_calls_that_have_none(checkpoint: MakeCheckpoint, load: Load) -> None:
    path, small = make(checkpoint), make(checkpoint, num_hidden_layers=1)
    reference = stock(path)
    for draft in ("lookup", "auto", small):
        model = load(path, draft=draft, policy="none")
        assert torch.equal(
            model.generate(prompt(), **GREEDY), reference.generate(prompt(), **GREEDY)
        )
        for call in ({"num_beams": 2}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}):
            expected = reference.generate(prompt(), **GREEDY | call)
            assert torch.equal(model.generate(prompt(), **GREEDY | call), expected)
        expected = reference.generate(prompt(2), attention_mask=torch.ones(2, 7), **GREEDY)
        assert torch.equal(
            model.generate(prompt(2), attention_mask=torch.ones(2, 7), **GREEDY), expected
        )
    assert load(path, draft=small).flexinfer.plan.draft.kind == "model"


FEW_ROWS_COST_LITTLE = DraftCosts(((1, 1e-4), (17, 1e-3)), 1e-4, 1e-4)


def machine(monkeypatch: pytest.MonkeyPatch, costs: Costs, draft_costs: DraftCosts) -> None:
    """Have models that are loaded from now on find that reading, computing and drafting cost so
    much.
    """
    monkeypatch.setattr(flexinfer.engine.load, "measure_costs", lambda *_: costs)
    monkeypatch.setattr(flexinfer.engine.load, "measure_draft_costs", lambda *_: draft_costs)


@pytest.fixture
def steady_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process holds is what it held at the first load: it grows by more than the weights
    of these models.
    """
    measured = ProcessMemory(400 << 20, LibraryPages(), 0, TokenizerMemory())
    monkeypatch.setattr(ProcessMemory, "measure", lambda *_, **__: measured)


@pytest.mark.usefixtures("steady_process")
def test_auto_takes_a_substitute_where_reading_is_slow_and_lets_go_of_one_that_does_not_pay(
    checkpoint: MakeCheckpoint, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(checkpoint)
    machine(monkeypatch, Costs(1e6, 1e-4), FEW_ROWS_COST_LITTLE)
    substitute = smallest_budget(load(path, draft="substitute"))
    model = load(path, substitute + (1 << 20), draft="auto", policy="none")
    expected = stock(path).generate(prompt(), **GREEDY)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    engine, plan = model.flexinfer, model.flexinfer.plan
    assert (engine.stats()["draft"], plan.draft.kind) == ("substitute", "substitute")
    assert plan.substitute_bytes > 0
    for _ in range(50):
        engine.drafter.pace.saw(8, 0)
        engine.drafter.pace.took(pass_s=1e9, rows=9)
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    assert engine.stats()["draft"] == "lookup"
    assert engine.plan.substitute_bytes == 0
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    machine(monkeypatch, Costs(1e12, 1.0), DraftCosts(((1, 1.0), (17, 17.0)), 1.0, 1.0))
    fast_disk = load(path, substitute + (1 << 20), draft="auto").flexinfer
    assert fast_disk.stats()["draft"] is None, (
        "candidates cost as much as passes, and reading nothing"
    )
    assert fast_disk.plan.draft is None


@pytest.mark.usefixtures("steady_process")
def test_auto_locks_all_in_a_budget_that_holds_all_and_no_scores_of_candidates(
    checkpoint: MakeCheckpoint, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A draft needs memory of its own; what plain use has is not judged with that taken away."""
    path = make(checkpoint)
    machine(monkeypatch, Costs(1e4, 1e-4), FEW_ROWS_COST_LITTLE)
    whole = load(path).flexinfer.plan
    while whole.unused_bytes:  # a smaller budget has smaller page tables too
        whole = load(path, whole.budget_bytes - whole.unused_bytes).flexinfer.plan
    memory = whole.budget_bytes
    assert load(path, memory, draft="lookup").flexinfer.plan.streamed_bytes > 0
    auto = load(path, memory, draft="auto").flexinfer
    assert auto.plan.draft is None
    assert auto.stats()["draft"] is None
    assert auto.plan.locked_bytes == whole.locked_bytes
    assert auto.plan.streamed_bytes == 0
    assert smallest_budget(load(path, draft="auto")) <= smallest_budget(load(path, draft="lookup"))


def test_a_padded_prompt(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = make(checkpoint)
    mask = torch.ones_like(prompt())
    mask[0, :3] = 0
    model = load(path, draft="substitute", draft_type="q8_0", policy="none")
    expected = stock(path).generate(prompt(), attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(prompt(), attention_mask=mask, **GREEDY), expected)
    stats = model.flexinfer.stats()
    assert stats["accepted"] > stats["drafted"] / 2, "the draft sees another text than the model"


def test_sampling_has_the_distribution_of_the_model(checkpoint: MakeCheckpoint, load: Load) -> None:
    """The second and third token of many texts, against their probabilities.

    A draft whose tokens were taken as they are fails.
    """
    path, texts, first = make(checkpoint, num_hidden_layers=2), 800, prompt(tokens=5)
    options: dict[str, Any] = {
        "do_sample": True,
        "top_k": 4,
        "temperature": 1.5,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    reference = stock(path)

    def next_ones(ids: list[int]) -> dict[int, float]:
        with torch.no_grad():
            values, tokens = (reference(torch.tensor([ids])).logits[0, -1] / 1.5).topk(4)
        return dict(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))

    expected: dict[tuple[int, ...], float] = {}
    given_ids = first[0].tolist()
    for one, p in next_ones(given_ids).items():
        for two, q in next_ones([*given_ids, one]).items():
            for three, r in next_ones([*given_ids, one, two]).items():
                expected[one, two, three] = p * q * r
    model = load(
        path, draft="substitute", draft_type="q2_k", draft_tokens=3, policy="none", window="1MiB"
    )
    torch.manual_seed(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(texts):
        counts[tuple(model.generate(first, max_new_tokens=4, **options)[0, 5:8].tolist())] += 1
    assert set(counts) <= set(expected)
    squares = sum((counts[text] - texts * p) ** 2 / (texts * p) for text, p in expected.items())
    freedom = len(expected) - 1
    assert squares < freedom + 5 * (2 * freedom) ** 0.5
    stats = model.flexinfer.stats()
    assert 0 < stats["accepted"] < stats["drafted"], "all or none accepted: the test shows nothing"


def test_substitutes_are_made_once_and_a_killed_run_goes_on(
    checkpoint: MakeCheckpoint, load: Load, tmp_path: Path
) -> None:
    path = make(checkpoint)
    told: list[tuple[str, int, int]] = []
    options: dict[str, Any] = {
        "draft": "substitute",
        "draft_tokens": 4,
        "draft_dir": tmp_path,
        "policy": "none",
    }
    expected = load(path, **options | {"draft_dir": None}).generate(prompt(), **GREEDY)
    model = load(path, **options, progress=lambda *stage: told.append(stage))
    assert torch.equal(model.generate(prompt(), **GREEDY), expected)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    assert [stage for stage in told if stage[0] == "draft"][-1][1:] in {
        (len(whole),) * 2,
        (sum(w.nbytes for w in model.flexinfer.runner.planner.weights),) * 2,
    }
    (made,) = {one[2] for one in told if one[0] == "draft" and one[2] == len(whole)}
    assert made == len(whole)
    before = file.stat().st_mtime_ns
    load(path, **options)
    assert file.stat().st_mtime_ns == before
    file.rename(file.with_suffix(file.suffix + ".partial"))
    os.truncate(file.with_suffix(file.suffix + ".partial"), len(whole) // 2)
    load(path, **options)
    assert file.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [file]


def test_resize_and_close_with_a_draft(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = make(checkpoint)
    model, expected = (
        load(path, draft="substitute", draft_tokens=4),
        stock(path).generate(prompt(), **GREEDY),
    )
    held = []
    for share in (0.0, 0.6, 0.2, 2.0, 0.0):
        resize_to_share(model, share)
        assert torch.equal(model.generate(prompt(), **GREEDY), expected)
        plan = model.flexinfer.plan
        held.append((plan.substitute_bytes, plan.streamed_bytes))
        assert (plan.substitute_bytes > 0) == (plan.streamed_bytes > 0)
    assert held[0] > held[2] > held[1] > held[3] == (0, 0)
    assert smallest_budget(model) > model.flexinfer.plan.overheads.nbytes + held[0][0]
    model.flexinfer.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.generate(prompt(), **GREEDY)


def test_refusals(checkpoint: MakeCheckpoint, load: Load) -> None:
    path = make(checkpoint)
    with pytest.raises(DraftError, match=r"mlp.down_proj.weight have 176 numbers.*draft='lookup'"):
        load(checkpoint("llama"), draft="substitute")
    with pytest.raises(DraftError, match=r"draft_type='q9'.*q4_0"):
        load(path, draft="substitute", draft_type="q9")
    with pytest.raises(DraftError, match="vocabulary of 192 tokens and the model one of 160"):
        load(path, draft=make(checkpoint, vocab_size=192))
    with pytest.raises(flexinfer.CheckpointError, match="no such directory"):
        load(path, draft="./substitue")
    with pytest.raises(ValueError, match="draft_tokens=0"):
        load(path, draft="lookup", draft_tokens=0)
    with pytest.raises(ValueError, match="needs a draft"):
        load(path, draft_type="q4_0")
    with pytest.raises(flexinfer.BudgetError, match=r"at least \d+ bytes.*draft"):
        load(path, memory=1 << 20, draft="substitute")
    model = load(path, draft="substitute", context=16)
    with pytest.raises(ContextError, match="context=16"):
        model.generate(prompt(), **GREEDY)


@given(st.floats(0, 1), st.integers(1, 16))
def test_expected_tokens(acceptance: float, candidates: int) -> None:
    expected = sum(acceptance**i for i in range(candidates + 1))
    assert expected_tokens(acceptance, candidates) == pytest.approx(expected)


def test_more_candidates_where_reading_takes_the_time_and_fewer_are_rejected() -> None:
    def chosen(acceptance: float, draft_s: float) -> int:
        return best_candidates(
            acceptance, range(1, 17), draft_s, lambda rows: max(1.0, 0.1 * rows)
        )[0]

    assert chosen(0.9, 0.01) > chosen(0.9, 0.3) > chosen(0.3, 0.3) == 1
    assert chosen(1.0, 0.001) == 9, "of ten rows the tenth still costs nothing"


def test_the_pace_follows_what_is_accepted() -> None:
    costs = DraftCosts(((1, 0.01), (17, 0.1)), 0.01, 0.01)
    pace = Pace(DraftPlan("substitute", "q4_0", 8, 0.85, 5.0, 1.0), 16, costs.pass_s)
    pace.took(draft_s=0.02)
    pace.took(pass_s=0.5, rows=9)
    before = pace.candidates(), pace.predicted_tokens_per_s()
    for _ in range(50):
        pace.saw(8, 0)
    assert pace.acceptance < 0.3
    assert (pace.candidates(), pace.predicted_tokens_per_s()) < before
    for _ in range(100):
        pace.saw(8, 8)
    assert pace.candidates() == 16


def test_lookup_takes_the_longest_and_latest_run() -> None:
    assert looked_up([1, 2, 3, 9, 9, 2, 3, 8, 1, 2, 3], 2) == [9, 9]
    assert looked_up([5, 7, 5, 8, 5], 3) == [8, 5]
    assert looked_up([1, 2, 3], 4) == []


def test_a_plan_with_substitutes_adds_up() -> None:
    pieces = tuple(
        Piece("w", 0, i, i + 1, Path("f"), i * 100, 100, 100, lock_cost_bytes=100)
        for i in range(10)
    )
    weight = Weight("w", "w", 0, "ffn", pieces)
    overheads = Overheads(0, 0, 0, 0, 0)
    planner = Planner(
        [weight], overheads, Costs(1.0, 1.0), window=200, substitutes={"w": [30] * 10}
    )
    for budget in range(200 + 300, 1400, 7):
        plan = planner.plan(budget)
        locked = plan.locked_pieces["w"]
        assert plan.substitute_bytes == 30 * (10 - locked)
        assert (
            plan.unused_bytes
            == budget - plan.window_bytes - 100 * locked - plan.substitute_bytes
            >= 0
        )
        assert locked == 10 or plan.unused_bytes < 70
    with pytest.raises(flexinfer.BudgetError, match="at least"):
        planner.plan(499)


def test_a_substitute_is_made_of_what_the_first_pass_reads(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    """Each weight is read once until the first token, and the draft reads none; where the first
    pass was cut short it reads what is missing.
    """
    path = make(checkpoint)
    for cut in (False, True):
        model = load(path, draft="substitute", draft_type="q8_0", draft_tokens=4, io_threads=0)
        resize_to_share(model, 0.4)
        engine, reads = model.flexinfer, list[int]()
        read_now = engine.store.reader.read_now

        def read(
            file: Path, offset: int, *rest: Any, read_now: Any = read_now, reads: Any = reads
        ) -> int:
            reads.append(offset)
            return read_now(file, offset, *rest)

        engine.store.reader.read_now = read
        if cut:
            layer = model.model.layers[2]
            hook = layer.register_forward_pre_hook(
                lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
            )
            with pytest.raises(KeyboardInterrupt):
                model(prompt())
            hook.remove()
        else:
            model(prompt())
        streamed = [
            p.offset_bytes
            for w in engine.runner.planner.weights
            for p in w.pieces[engine.plan.locked_pieces.get(w.name, 0) :]
        ]
        seen = [offset for offset in reads if offset in streamed]
        assert len(seen) == len(set(seen)) < len(streamed) + 1
        assert (set(seen) < set(streamed)) == cut
        reads.clear()
        with engine.store.running_drafts():
            assert {offset for offset in reads if offset in streamed} == set(streamed) - set(seen)
        reads.clear()
        assert torch.equal(
            model.generate(prompt(), **GREEDY), stock(path).generate(prompt(), **GREEDY)
        )
        assert engine.stats()["draft_passes"] > 0


@pytest.mark.parametrize("draft", ["lookup", "substitute"])
@pytest.mark.parametrize("prompt_tokens", [None, 100])
def test_the_budget_that_a_refusal_names_is_enough(
    checkpoint: MakeCheckpoint, draft: str, prompt_tokens: int | None
) -> None:
    """Larger budgets have room for more candidates, and must not need it."""
    path = checkpoint("llama", vocab_size=32_000, **WHOLE)
    of_prompt = None
    if prompt_tokens is not None:
        of_prompt = ContextOf(least=9, most=prompt_tokens, exact=lambda tokenizer: prompt_tokens)
    process = ProcessMemory(100 << 20, LibraryPages(), 0)
    candidates = set()

    def prepared(memory: int) -> Any:
        options = flexinfer.Options(memory=memory, draft=draft)
        found = prepare(open_checkpoint(path), options, context_of=of_prompt, process=process)
        context = found.context if prompt_tokens is None else prompt_tokens
        candidates.add(found.logits_to_keep)
        return replace(found, context=context).planner()

    named = prepared(1 << 20).smallest_bytes
    for more_mib in (0, 1, 6, 20, 60, 400):
        memory = named + (more_mib << 20)
        assert prepared(memory).smallest_bytes <= memory
    assert len(candidates) > 2
