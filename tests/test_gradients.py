"""Gradients go through streamed weights as through those of stock transformers, whatever becomes of
memory before the backward pass.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gguf_models import WriteGGUF, made_once
from test_mixtures import MIXTURES, eager
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from tests.conftest import FAMILIES, Load, MakeCheckpoint, prompt, resize_to_share, stock

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module", autouse=True)
def _families() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MIXTURES.items():
            patch.setitem(FAMILIES, name, config)
        yield


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory: pytest.TempPathFactory) -> WriteGGUF:
    return made_once(tmp_path_factory)


@torch.no_grad()
def embedded(
    model: PreTrainedModel, batch: int = 2, tokens: int = 9, seed: int = 0
) -> torch.Tensor:
    embeds: torch.Tensor = model.get_input_embeddings()(prompt(batch, tokens, seed))
    return embeds.clone()


def loss_of(model: PreTrainedModel, embeds: torch.Tensor, **options: Any) -> torch.Tensor:
    logits = model(inputs_embeds=embeds, **options).logits[:, -1].float()
    return (logits.softmax(-1) ** 2).sum()


def saliency(
    model: PreTrainedModel,
    embeds: torch.Tensor,
    before_backward: Callable[[], object] = lambda: None,
    **options: Any,
) -> torch.Tensor:
    embeds = embeds.clone().requires_grad_(True)
    loss = loss_of(model, embeds, **options)
    before_backward()
    return torch.autograd.grad(loss, embeds)[0]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "gpt_oss"])
def test_gradients_for_embeddings_in_every_budget(
    checkpoint: MakeCheckpoint, load: Load, family: str
) -> None:
    path = checkpoint(family)
    reference, model = (eager if family in MIXTURES else stock)(path), load(path)
    reference.requires_grad_(False)
    for batch in (1, 2):
        embeds = embedded(reference, batch, 9 if batch == 2 else 1)
        expected = saliency(reference, embeds)
        for share in (1.2, 0.4, 0.0):
            resize_to_share(model, share)
            for use_cache in (True, False):
                found = saliency(model, embeds, use_cache=use_cache)
                torch.testing.assert_close(found, expected, **CLOSE)


def test_gradients_of_locked_weights_are_stocks_to_the_bit(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("qwen2")
    reference, model = stock(path), load(path)
    embeds = embedded(reference)
    assert torch.equal(saliency(model, embeds), saliency(reference.requires_grad_(False), embeds))


@pytest.mark.parametrize("share", [None, 0.0])
def test_gradients_in_16_bits_err_no_more_than_stocks(
    checkpoint: MakeCheckpoint, load: Load, share: float | None
) -> None:
    path = checkpoint("llama", torch.bfloat16)
    exact, model = stock(path, dtype=torch.float32), load(path)
    embeds = embedded(exact)
    truth = saliency(exact.requires_grad_(False), embeds)
    theirs = saliency(stock(path).requires_grad_(False), embeds.bfloat16()).float()
    if share is not None:
        resize_to_share(model, share)
    ours = saliency(model, embeds.bfloat16()).float()
    assert (ours - truth).norm() <= 1.3 * (theirs - truth).norm()
    assert torch.nn.functional.cosine_similarity(ours.flatten(), truth.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "F32"), ("gpt2", "F32"), ("gpt_oss", "F32"), ("llama", "Q8_0")]
)
def test_gradients_through_gguf_files(
    gguf_model: WriteGGUF, load: Load, family: str, kind: str
) -> None:
    written = gguf_model(family, (kind,))
    reference = (eager if family in MIXTURES else stock)(written.stock).requires_grad_(False)
    model = load(written.file)
    embeds = embedded(reference)
    expected = saliency(reference, embeds)
    for share in (1.2, 0.4, 0.0):
        resize_to_share(model, share)
        for use_cache in (True, False):
            found = saliency(model, embeds, use_cache=use_cache)
            if kind == "F32":
                torch.testing.assert_close(found, expected, **CLOSE)
            # Ggml quantises activations, and the errors of such a model grow from layer to layer.
            else:
                alike = torch.nn.functional.cosine_similarity(
                    found.flatten(), expected.flatten(), dim=0
                )
                assert alike > 0.97, (share, use_cache)


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0", "Q6_K", "MXFP4"])
def test_gradients_of_a_linear_in_blocks(gguf_model: WriteGGUF, load: Load, kind: str) -> None:
    written = gguf_model("llama", (kind,))
    reference, model = stock(written.stock), load(written.file)
    for share in (1.2, 0.4, 0.0):
        resize_to_share(model, share)
        for name, module in reference.model.layers[-1].named_modules():
            if isinstance(module, nn.Linear):
                inputs = torch.randn(2, 3, module.in_features, requires_grad=True)
                gradient = torch.randn(2, 3, module.out_features)
                linear = model.model.layers[-1].get_submodule(name)
                found = torch.autograd.grad(linear(inputs), inputs, gradient)[0]
                torch.testing.assert_close(found, gradient @ module.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gradients_of_experts_in_blocks(gguf_model: WriteGGUF, load: Load, family: str) -> None:
    written = gguf_model(family, ("Q8_0",))
    reference, model = eager(written.stock), load(written.file)
    hidden = torch.randn(5, model.config.hidden_size, requires_grad=True)
    chosen = torch.rand(5, model.config.num_local_experts).topk(2).indices
    weights = torch.rand(5, 2, requires_grad=True)
    gradient = torch.randn(5, model.config.hidden_size)

    def found_by(one: PreTrainedModel, count: int) -> tuple[torch.Tensor, ...]:
        output = one.model.layers[1].mlp.experts(hidden[:count], chosen[:count], weights[:count])
        return torch.autograd.grad(output, (hidden, weights), gradient[:count])

    for share in (1.2, 0.0):
        resize_to_share(model, share)
        for count in (5, 1):
            for ours, theirs in zip(
                found_by(model, count), found_by(reference, count), strict=True
            ):
                assert (ours - theirs).norm() / theirs.norm() < 0.03


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_happens_between_the_passes_changes_no_gradient(
    checkpoint: MakeCheckpoint, load: Load, family: str
) -> None:
    path = checkpoint(family)
    reference, model = (eager if family in MIXTURES else stock)(path), load(path)
    embeds = embedded(reference)
    expected = saliency(reference.requires_grad_(False), embeds)

    def other_texts() -> None:
        model.generate(prompt(seed=1), max_new_tokens=3, do_sample=False)
        loss_of(model, embedded(reference, seed=2).requires_grad_(True))

    for begin, end in ((1.2, 0.0), (0.0, 1.2), (0.4, 0.2)):
        resize_to_share(model, begin)
        for between in (other_texts, lambda end=end: resize_to_share(model, end)):
            torch.testing.assert_close(saliency(model, embeds, between), expected, **CLOSE)


def test_a_graph_that_is_kept_gives_the_same_twice(checkpoint: MakeCheckpoint, load: Load) -> None:
    model = load(checkpoint("llama"))
    resize_to_share(model, 0.2)
    embeds = embedded(model).requires_grad_(True)
    loss = loss_of(model, embeds)
    first = torch.autograd.grad(loss, embeds, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, embeds)[0], first)


def test_gradients_go_through_a_cache_from_one_pass_to_the_next(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    path = checkpoint("llama")
    reference, model = stock(path).requires_grad_(False), load(path)
    resize_to_share(model, 0.2)
    embeds = embedded(reference)

    def two_passes(one: PreTrainedModel, first_grad: bool) -> torch.Tensor:
        given, cache = embeds.clone().requires_grad_(True), DynamicCache(config=one.config)
        with torch.set_grad_enabled(first_grad):
            one(inputs_embeds=given[:, :5], cache=cache, use_cache=True)
        loss = loss_of(one, given[:, 5:], cache=cache, use_cache=True)
        return torch.autograd.grad(loss, given)[0]

    for first_grad in (True, False):
        torch.testing.assert_close(
            two_passes(model, first_grad), two_passes(reference, first_grad), **CLOSE
        )


class Adapter(nn.Module):
    """A low-rank addition to a linear, as LoRA makes them."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        out_features, in_features = base.weight.shape  # type: ignore[misc]
        random = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(0.1 * torch.randn(4, in_features, generator=random))
        self.b = nn.Parameter(0.1 * torch.randn(out_features, 4, generator=random))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x) + x @ self.a.T @ self.b.T
        return y


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("role", ["q_proj", "v_proj"])
def test_adapters_norms_and_biases_are_trained(
    checkpoint: MakeCheckpoint, load: Load, role: str, checkpointed: bool
) -> None:
    path = checkpoint("qwen2")
    gradients = []
    for model in (stock(path), load(path)):
        model.requires_grad_(False)
        if hasattr(model, "flexinfer"):
            resize_to_share(model, 0.2)
        for layer in model.model.layers:
            setattr(layer.self_attn, role, Adapter(getattr(layer.self_attn, role)))
        trained = [
            p
            for n, p in model.named_parameters()
            if n.endswith((".a", ".b", "norm.weight", "bias"))
        ]
        for parameter in trained:
            parameter.requires_grad_(True)
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [
            model(
                input_ids=prompt(2, 9, seed), labels=prompt(2, 9, seed), use_cache=not checkpointed
            ).loss
            for seed in (0, 1)
        ]
        sum(losses).backward()
        gradients.append([parameter.grad for parameter in trained])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_streamed_weights_themselves_have_no_gradients(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint("llama"))
    with pytest.raises(RuntimeError, match=r"embed_tokens.weight is streamed.*cannot be trained"):
        model.requires_grad_(True)
    weight = model.lm_head.weight
    with pytest.raises(RuntimeError, match=r"lm_head.weight is streamed.*cannot be trained"):
        weight.requires_grad = True
    weight.requires_grad = False
    weight.requires_grad_(False)
    assert not weight.requires_grad


def test_no_second_derivatives_and_none_after_the_end(
    checkpoint: MakeCheckpoint, load: Load
) -> None:
    model = load(checkpoint("llama"))
    embeds = embedded(model).requires_grad_(True)
    (first,) = torch.autograd.grad(loss_of(model, embeds), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    loss = loss_of(model, embeds)
    model.flexinfer.close()
    with pytest.raises(RuntimeError, match="closed"):
        loss.backward()


@pytest.mark.parametrize(
    "call", [nn.Module.cpu, nn.Module.float, lambda m: m.to("cpu"), lambda m: m.to(torch.float32)]
)
def test_a_model_that_is_to_go_where_it_is_stays(
    checkpoint: MakeCheckpoint, load: Load, call: Callable[[nn.Module], nn.Module]
) -> None:
    model: PreTrainedModel = load(checkpoint("llama"))
    assert call(model) is model
    with pytest.raises(RuntimeError, match="streamed from disk"):
        model.half()
    with pytest.raises(RuntimeError, match="streamed from disk"):
        model.double()
