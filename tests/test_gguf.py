"""GGUF files: what is computed from them, in every family and budget."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Load, logits, prompt, resize_to_share, stock
from gguf_models import FAMILIES, MIX, Written, whole_model, write_model

WriteGGUF = Callable[..., Written]


@pytest.fixture(scope="session")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    """gguf_model(family, kinds=MIX, **config); made once a session, do not change it."""
    made: dict[str, Written] = {}

    def make(family: str = "llama", kinds: tuple[str, ...] = MIX, **config: Any) -> Written:
        key = repr((family, kinds, sorted(config.items())))
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp(f"gguf-{family}"), family, kinds, **config)
        return made[key]

    return make


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_floats_give_what_the_stock_model_gives(gguf_model: WriteGGUF, load: Load, family: str) -> None:
    """Config, names, order of rows and norms are right: nothing is rounded here."""
    written = gguf_model(family, ("F32",))
    model, reference = load(written.file), stock(written.stock)
    resize_to_share(model, 0.4)
    ids = prompt(2, tokens=19)
    assert relative_error(logits(model, ids), logits(reference, ids)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_give_about_what_their_numbers_give(gguf_model: WriteGGUF, load: Load, family: str) -> None:
    """ggml rounds activations to 8 bit as well."""
    written = gguf_model(family)
    model, reference = load(written.file), stock(written.stock)
    ids = prompt(2)
    assert relative_error(logits(model, ids, 0), logits(reference, ids, 0)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_every_budget_gives_the_bits_of_whole_weights(gguf_model: WriteGGUF, load: Load, family: str) -> None:
    written = gguf_model(family)
    model, reference = load(written.file), whole_model(written)
    assert model.flexinfer.plan.streamed_bytes == 0
    expected = {batch: logits(reference, prompt(batch)) for batch in (1, 3)}
    assert torch.equal(logits(model, prompt(3)), expected[3])
    for share in (0.0, 0.35, 0.8):
        resize_to_share(model, share)
        assert model.flexinfer.plan.streamed_bytes > 0
        for batch, theirs in expected.items():
            assert torch.equal(logits(model, prompt(batch)), theirs), share
