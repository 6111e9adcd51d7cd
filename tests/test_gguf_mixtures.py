"""Mixtures of experts in GGUF files: streamed as they lie, bit for bit what whole weights give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_models import MIXTURES, WriteGGUF, made_once, relative_error, whole_model, write_model

from flexinfer import CheckpointError
from flexinfer.model import pieces
from flexinfer.modules.experts import StreamedExperts
from flexinfer.streaming.expert_policies import POLICIES
from tests.conftest import Load, logits, prompt, resize_to_share, stock


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    """mixture(family, kinds=MIX, **config); made once, do not change it."""
    return made_once(tmp_path_factory)


@pytest.fixture
def load(load: Load) -> Load:
    """With the KV cache of a stock model, float32: what is compared to one here is the weights."""
    return lambda *given, **options: load(
        *given, **{"kv_dtype": options.get("dtype", "float32")} | options
    )


@pytest.mark.parametrize("family", MIXTURES)
def test_floats_give_what_the_stock_model_gives(
    mixture: WriteGGUF, load: Load, family: str
) -> None:
    """Config, names, routing and order of rows are right: nothing is rounded here."""
    written = mixture(family, ("F32",))
    model, reference = load(written.file), stock(written.stock)
    ids = prompt(2, tokens=19)
    expected, resident = logits(reference, ids), logits(model, ids)
    assert relative_error(resident, expected) < 1e-5
    resize_to_share(model, 0.4)
    assert relative_error(logits(model, ids), expected) < 1e-5


@pytest.mark.parametrize("family", MIXTURES)
def test_every_budget_gives_the_bits_of_whole_weights(
    mixture: WriteGGUF, load: Load, family: str
) -> None:
    written = mixture(family)
    model, reference = load(written.file), whole_model(written)
    assert model.flexinfer.plan.streamed_bytes == 0
    expected = {batch: logits(reference, prompt(batch), steps=3) for batch in (1, 3)}
    for share in (None, 0.0, 0.4, 1.2):
        if share is not None:
            resize_to_share(model, share)
        for batch, theirs in expected.items():
            assert torch.equal(logits(model, prompt(batch), steps=3), theirs), (share, batch)
    assert model.flexinfer.stats()["expert_misses"] > 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("io_threads", [0, 2])
def test_every_policy(mixture: WriteGGUF, load: Load, policy: str, io_threads: int) -> None:
    written = mixture("qwen3_moe")
    model = load(written.file, expert_policy=policy, io_threads=io_threads)
    logits(model, prompt(), steps=0)
    resize_to_share(model, 1.2)
    assert torch.equal(
        logits(model, prompt(), steps=8), logits(whole_model(written), prompt(), steps=8)
    )


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_experts_in_mxfp4(mixture: WriteGGUF, load: Load, family: str) -> None:
    """gpt-oss is published so."""
    written = mixture(family, ("MXFP4",))
    model, reference = load(written.file), whole_model(written)
    expected = logits(reference, prompt(2), steps=3)
    assert torch.equal(logits(model, prompt(2), steps=3), expected)
    resize_to_share(model, 0.5)
    assert torch.equal(logits(model, prompt(2), steps=3), expected)


def test_an_expert_is_read_where_it_lies(mixture: WriteGGUF, load: Load) -> None:
    """Bytes of a pass: the experts that it is routed to, and no more of any tensor."""
    written = mixture("qwen3_moe", ("Q8_0",))
    model = load(written.file, look_ahead=False)
    experts = model.flexinfer.plan.experts
    of_one = 3 * 256 * 256 // 32 * 34
    assert experts.total_bytes == 3 * 12 * of_one
    assert experts.token_bytes == 3 * 3 * of_one


@pytest.mark.parametrize("share", [0.8, 1.2])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
def test_an_expert_is_computed_once(
    mixture: WriteGGUF, load: Load, monkeypatch: pytest.MonkeyPatch, share: float, whole: bool
) -> None:
    """In whole matrices too, which are multiplied together where several are in memory."""
    if whole:
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4 << 20)
    computed: list[int] = []
    together_of: list[int] = []
    forward, together, alone = (
        getattr(StreamedExperts, name) for name in ("forward", "_outputs_together", "_output")
    )

    def count(self: Any, *asked: Any) -> Any:
        computed.clear()
        y = forward(self, *asked)
        index = asked[2]  # [tokens, k]
        assert sorted(computed) == sorted(
            {self._first + expert for expert in index.flatten().tolist()}
        )
        return y

    def count_together(self: Any, module: Any, hidden: Any, numbers: list[int]) -> Any:
        computed.extend(numbers)
        together_of.append(len(numbers))
        return together(self, module, hidden, numbers)

    def count_alone(self: Any, module: Any, states: Any, expert: int) -> Any:
        computed.append(self._first + expert)
        return alone(self, module, states, expert)

    for name, counting in (
        ("forward", count),
        ("_outputs_together", count_together),
        ("_output", count_alone),
    ):
        monkeypatch.setattr(StreamedExperts, name, counting)
    written = mixture("qwen3_moe", ("Q8_0",))
    model = load(written.file)
    resize_to_share(model, share)
    expected = logits(whole_model(written), prompt(), steps=8)
    assert torch.equal(logits(model, prompt(), steps=8), expected)
    assert computed
    assert bool(together_of) == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.add_uint32("qwen3moe.expert_used_count", 13), "13 of 12 experts"),
        (lambda w: w.add_uint32("qwen3moe.expert_count", 11), r"\[11, "),
        (
            lambda w: w.add_uint32("qwen3moe.expert_count", 10**9),
            "num_experts' is 1000000000, but the largest",
        ),
        (lambda w: w.add_uint32("qwen3moe.expert_used_count", 0), "expert_used_count is 0"),
    ],
)
def test_headers_that_do_not_belong_to_the_tensors(
    tmp_path: Path, load: Load, change: Callable[[gguf.GGUFWriter], None], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says):
        load(write_model(tmp_path, "qwen3_moe", change=change).file)
