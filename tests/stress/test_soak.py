"""The soak draws every family and every kind of call, tells good from bad, and a short one is run
for real.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from experiments.cgroups import find_place
from tests.stress.soak import BAD, judge, run_case
from tests.stress.soak_calls import CALLS
from tests.stress.soak_cases import FAMILIES, KINDS, Call, Case, draw, large

SMALL = Case(
    seed=0,
    number=0,
    family="llama",
    hidden=512,
    layers=2,
    vocab=32_000,
    tie=False,
    file_dtype="float32",
    dtype="auto",
    policy="balanced",
    window=None,
    io_threads=2,
    direct=True,
    context=96,
    logits_to_keep=1,
    tokenizer=False,
    share=0.3,
    calls=(Call("greedy", 1, 20, 4), Call("score", 1, 40)),
)


def test_a_case_is_drawn_from_its_seed_and_number_alone() -> None:
    assert [draw(3, i) for i in range(20)] == [draw(3, i) for i in range(20)]
    assert draw(3, 1) != draw(4, 1) != draw(4, 2)


def test_every_family_call_and_kind_of_budget_is_drawn() -> None:
    cases = [draw(0, i) for i in range(200)]
    assert {case.family for case in cases} == set(FAMILIES)
    assert {call.kind for case in cases for call in case.calls} == set(KINDS) == set(CALLS)
    assert {0.0, 0.15, 0.5, 0.8, 1.0} <= {case.share for case in cases}
    assert {case.vocab for case in cases} >= {262_144, 151_936}
    assert any(case.dtype not in ("auto", case.file_dtype) for case in cases)
    for case in cases:
        for call in case.calls:
            assert call.batch * (call.prompt_tokens + call.new_tokens) <= case.context
            assert call.prompt_tokens >= 1


def test_wrong_tokens_refusals_and_leaks_are_told_apart() -> None:
    expected = {"outputs": [[1, 2], "abc"]}
    report = {"outputs": [[1, 2], "abc"], "refusals": [None, None], "left": [0, 0, 0]}
    assert judge(SMALL, expected, report) == ("ok", ["ok", "ok"])
    assert judge(SMALL, expected, report | {"outputs": [[1, 3], "abc"]}) == (
        "wrong",
        ["wrong", "ok"],
    )
    refused = report | {"outputs": [[1, 2], None], "refusals": [None, "no room"]}
    assert judge(SMALL, expected, refused) == ("ok", ["ok", "refused"])
    for left in ([1, 0, 0], [0, 1, 0], [0, 0, 4096]):
        assert judge(SMALL, expected, report | {"left": left})[0] == "leak"
    assert {"killed", "wrong", "leak"} <= set(BAD)


def test_a_drafted_text_may_differ_where_two_tokens_are_as_good_as_equal() -> None:
    case = replace(SMALL, draft="substitute", calls=(Call("greedy", 1, 1, 3),))
    told = {"refusals": [None], "left": [0, 0, 0]}
    ours = told | {"outputs": [{"text": [5, 1, 2, 3], "margins": [1.0] * 3}]}
    for theirs, margin, outcome in (
        ([1, 2, 3], 1.0, "ok"),
        ([1, 9, 9], 1e-4, "ok"),
        ([1, 9, 9], 0.5, "wrong"),
    ):
        expected = {"outputs": [{"text": [5, *theirs], "margins": [1.0, margin, 1.0]}]}
        assert judge(case, expected, ours)[0] == outcome
    assert {case.draft for case in map(partial(draw, 0), range(100))} == {
        None,
        "substitute",
        "lookup",
        "auto",
    }


@pytest.mark.parametrize("family", ["phi3", "opt"])
def test_a_short_soak(tmp_path: Path, family: str) -> None:
    """The first case of a family whose vocabulary is not the largest, in a control group of exactly
    the budget.
    """
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    cases = (draw(0, number) for number in range(1000))
    record = run_case(
        next(case for case in cases if case.family == family and case.vocab < 100_000), tmp_path
    )
    assert record["outcome"] == "ok", record
    assert record["group_peak_bytes"] <= record["memory_bytes"]
    assert record["outcomes"].count("ok") >= 5
    assert not list(tmp_path.iterdir()), "the checkpoint is deleted"


def test_a_large_vocabulary_and_its_tokenizer_in_a_budget_in_between(tmp_path: Path) -> None:
    """A tokenizer loaded after the model, a prompt of 300 and one of 1,000 tokens, and logits of
    900 positions that do not fit.
    """
    place = find_place()
    if place.memory is None:
        pytest.skip(f"no right to limit memory here: {place.why_not}")
    case = next(case for case in large() if case.vocab == 151_936 and case.share == 0.5)
    record = run_case(replace(case, hidden=512, layers=2), tmp_path)
    assert record["outcome"] == "ok", record
    assert dict(zip((call.kind for call in case.calls), record["outcomes"], strict=True)) == {
        "tokenize": "ok",
        "score": "refused",
        "greedy": "ok",
        "score without cache": "refused",
        "sample": "ok",
    }
