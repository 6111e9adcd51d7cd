"""What `flexinfer plan --batch` says: as the engine plans it, and where the best is."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_model import CONFIG, add_tokenizer

import flexinfer.engine.prepare
from flexinfer.cli.main import main
from flexinfer.engine.prepare import ProcessMemory
from flexinfer.formats.tokenizer import TokenizerMemory, prepare_tokenizer
from flexinfer.plan.batches import best_batch, counts_up_to, plan_batches
from flexinfer.plan.plan import Costs, Overheads
from flexinfer.plan.planner import Planner
from flexinfer.plan.weights import Piece, Weight
from tests.conftest import Load, MakeCheckpoint

MIB = 1 << 20
BUDGET = 400 * MIB
PIECES = tuple(
    Piece("w", 0, i, i + 1, Path("f"), i * MIB, MIB, MIB, lock_cost_bytes=MIB) for i in range(100)
)


def overheads_of(count: int) -> Overheads:
    return Overheads(
        process_bytes=MIB,
        unstreamed_bytes=0,
        kv_bytes=8 * MIB * count,
        activation_bytes=0,
        margin_bytes=0,
    )


WEIGHT = Weight("w", "w", 0, "ffn", PIECES)
PLANNER = Planner([WEIGHT], overheads_of(1), Costs(100 * MIB, 0.1), window=4 * MIB)


def test_more_sequences_pay_until_their_cache_or_their_computing_costs_more() -> None:
    found = plan_batches((1, 2, 4, 8, 16), PLANNER, 80 * MIB, overheads_of, ((1, 0.1), (16, 0.1)))
    assert [one.sequences for one in found] == [1, 2, 4, 8, 16]
    locked = [one.plan.locked_bytes // MIB for one in found[:4] if one.plan is not None]
    assert locked == [66, 58, 42, 10], (
        "8 MiB less for each sequence, and less than one for page tables"
    )
    for one, kept in zip(found, locked, strict=False):
        assert one.tokens_per_s == pytest.approx(one.sequences / ((100 - kept) / 100))
    assert found[4].plan is None
    assert found[4].tokens_per_s == 0, "128 MiB of cache in a budget of 80"
    assert best_batch(found) is found[3]
    slow = plan_batches(
        (1, 2, 4, 8), PLANNER, 80 * MIB, overheads_of, ((1, 0.1), (2, 0.2), (4, 0.5), (8, 2.0))
    )
    assert best_batch(slow) is slow[2]
    assert slow[3].tokens_per_s == pytest.approx(8 / 2.0)
    assert best_batch(plan_batches((16,), PLANNER, 80 * MIB, overheads_of, ((1, 0.1),))) is None


def test_counts_are_powers_of_two_and_what_is_asked_for() -> None:
    assert counts_up_to(1) == [1]
    assert counts_up_to(32) == [1, 2, 4, 8, 16, 32]
    assert counts_up_to(6) == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="batch=0"):
        counts_up_to(0)


@pytest.fixture
def told(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> tuple[Path, dict[str, Any]]:
    """A model, and the keywords of its loading, in a process that is always of the same size."""
    path = add_tokenizer(checkpoint("llama", **CONFIG), tmp_path / "model")
    measure = ProcessMemory.measure

    def measured(*args: Any, **options: Any) -> ProcessMemory:
        found = measure(*args, **options)
        return ProcessMemory(300 * MIB, found.libraries, 20 * MIB, TokenizerMemory())

    monkeypatch.setattr(flexinfer.engine.prepare.ProcessMemory, "measure", measured)
    return path, {"window": 3 * 16_384}


def test_it_agrees_with_what_the_engine_plans(
    told: tuple[Path, dict[str, Any]], load: Load, capsys: pytest.CaptureFixture[str]
) -> None:
    path, options = told
    argv = [
        "plan",
        str(path),
        "--window",
        str(options["window"]),
        "--context",
        "32",
        "--batch",
        "8",
        "--json",
    ]
    assert main([*argv, "--memory", str(BUDGET)]) == 0
    whole = json.loads(capsys.readouterr().out)["batches"][-1]
    tokenizer = prepare_tokenizer(path).memory
    tokenizer_bytes = tokenizer.stays_bytes + tokenizer.use_bytes
    budget = 320 * MIB + tokenizer_bytes + 16 * MIB + whole["kv_bytes"] + whole["activation_bytes"]
    assert main([*argv, "--memory", str(budget + (1 << 18))]) == 0
    batches = json.loads(capsys.readouterr().out)["batches"]
    assert [one["sequences"] for one in batches] == [1, 2, 4, 8]
    for one in batches:
        count = one["sequences"]
        model = load(path, budget + (1 << 18), context=32 * count, logits_to_keep=count, **options)
        plan = model.flexinfer.plan
        assert one["locked_bytes"] == plan.locked_bytes
        assert one["streamed_bytes"] == plan.streamed_bytes
        assert (one["kv_bytes"], one["activation_bytes"]) == (
            plan.kv_bytes,
            plan.overheads.activation_bytes,
        )
    assert (
        batches[-1]["locked_bytes"] < batches[0]["locked_bytes"]
        or batches[0]["streamed_bytes"] == 0
    )
    assert sum(one["best"] for one in batches) == 1


def test_the_table_marks_the_best_and_what_does_not_fit(
    told: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["plan", str(told[0]), "--memory", "360MiB", "--context", "64", "--batch", "4096"])
        == 0
    )
    shown = capsys.readouterr().out
    lines = shown[shown.index("Several sequences at a time, of 64 tokens each") :].splitlines()
    assert sum("* " in line for line in lines) == 1
    assert "does not fit" in next(line for line in lines if "4096" in line)


def test_batches_have_no_draft(
    told: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(told[0]), "--batch", "2", "--draft", "lookup"]) == 2
    assert "batches go without a draft" in capsys.readouterr().err
    assert main(["plan", str(told[0]), "--batch", "0"]) == 2
    assert "batch=0" in capsys.readouterr().err
