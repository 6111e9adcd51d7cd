"""What stock transformers reads of a checkpoint is what is read here: tied weights, which of
several files, other files beside them.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flexinfer.convert.quantize import quantize
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.safetensors import INDEX_FILE, SINGLE_FILE
from flexinfer.formats.tensors import CheckpointError
from tests.conftest import Load, MakeCheckpoint, logits, prompt, resize_to_share, stock

Tensors = dict[str, torch.Tensor]
Copy = Callable[..., Path]
HEAD = "lm_head.weight"


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Copy:
    """copy(family, change, **config) -> a checkpoint of its own, its tensors changed."""

    def make(
        family: str = "llama", change: Callable[[Tensors], None] | None = None, **config: Any
    ) -> Path:
        path = tmp_path / "copy"
        shutil.copytree(checkpoint(family, **config), path)
        if change is not None:
            tensors = load_file(path / SINGLE_FILE)
            change(tensors)
            write(path / SINGLE_FILE, tensors)
        return path

    return make


def write(file: Path, tensors: Tensors) -> None:
    save_file(
        {name: one.contiguous() for name, one in tensors.items()}, file, metadata={"format": "pt"}
    )


def write_shards(
    path: Path, shards: dict[str, Tensors], listed: Callable[[str], bool] = lambda _: True
) -> None:
    weight_map = {}
    for file, tensors in shards.items():
        write(path / file, tensors)
        weight_map |= {name: file for name in tensors if listed(name)}
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def assert_same(load: Load, path: Path, to_the_bit: bool = True) -> None:
    model, reference = load(path), stock(path)
    expected = logits(reference, prompt())
    for share in (None, 0.3):
        if share is not None:
            resize_to_share(model, share)
        if to_the_bit:
            assert torch.equal(logits(model, prompt()), expected)
        else:
            torch.testing.assert_close(logits(model, prompt()), expected, rtol=1e-5, atol=1e-5)


# ---- tied weights


def embedding_of(tensors: Tensors) -> str:
    return next(
        name
        for name in tensors
        if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight"))
    )


def only_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(embedding_of(tensors)).flip(0)


def equal(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[embedding_of(tensors)].clone()


def no_head(tensors: Tensors) -> None:
    del tensors[HEAD]


def different(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[embedding_of(tensors)].flip(0)


@pytest.mark.parametrize("change", [None, only_head, equal, different])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_tied_weights_in_every_state(
    copy: Copy, load: Load, family: str, change: Callable[[Tensors], None] | None
) -> None:
    # Of two equal tensors transformers multiplies with the other one, which may lie at another
    # multiple of 16 bytes.
    assert_same(
        load, copy(family, change, tie_word_embeddings=True), to_the_bit=change is not equal
    )


@pytest.mark.parametrize("change", [only_head, equal, different])
def test_tied_weights_in_shards_without_the_base_models_prefix(
    copy: Copy, load: Load, change: Callable[[Tensors], None]
) -> None:
    path = copy("llama", change, tie_word_embeddings=True)
    tensors = {
        name.removeprefix("model."): one for name, one in load_file(path / SINGLE_FILE).items()
    }
    (path / SINGLE_FILE).unlink()
    head = {HEAD: tensors.pop(HEAD)}
    write_shards(
        path,
        {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": head},
    )
    assert_same(load, path, to_the_bit=change is not equal)


def test_weights_that_are_not_tied_are_needed_each(copy: Copy, load: Load) -> None:
    path = copy("llama", no_head, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight'"):
        load(path)


@pytest.mark.parametrize("change", [None, only_head, equal, different])
@pytest.mark.parametrize(
    "family", ["llama", "opt"], ids=["names-of-llama.cpp", "names-of-transformers"]
)
def test_the_quantised_copy_has_the_head_of_its_source(
    copy: Copy, tmp_path: Path, load: Load, family: str, change: Callable[[Tensors], None] | None
) -> None:
    path = copy(family, change, tie_word_embeddings=True)
    report = quantize(path, tmp_path / "small", "q8_0")
    assert (report.architecture is not None) == (family == "llama")
    heads = sum(t.name == HEAD or "embed_tokens" in t.name for t in report.packed)
    assert heads == (2 if change is different else 1)
    assert open_checkpoint(tmp_path / "small").in_gguf
    expected = logits(stock(path), prompt(), steps=0)
    ours = logits(load(tmp_path / "small"), prompt(), steps=0)
    assert (ours - expected).norm() / expected.norm() < 0.05


# ---- which file


def other(tensors: Tensors) -> Tensors:
    return {name: one.flip(0) for name, one in tensors.items()}


def split(tensors: Tensors) -> dict[str, Tensors]:
    names = sorted(tensors)
    half = len(names) // 2
    return {
        "model-00001-of-00002.safetensors": {name: tensors[name] for name in names[:half]},
        "model-00002-of-00002.safetensors": {name: tensors[name] for name in names[half:]},
    }


def test_one_file_goes_before_an_index(copy: Copy, load: Load) -> None:
    path = copy()
    write_shards(path, split(other(load_file(path / SINGLE_FILE))))
    assert_same(load, path)


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_other_kinds_beside_it_are_not_read(copy: Copy, load: Load, sharded: bool) -> None:
    path = copy()
    tensors = load_file(path / SINGLE_FILE)
    if sharded:
        (path / SINGLE_FILE).unlink()
        write_shards(path, split(tensors))
    for name in (
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "model-00003-of-00003.safetensors",
    ):
        write(path / name, other(tensors))
    torch.save(other(tensors), path / "pytorch_model.bin")
    assert_same(load, path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_a_variant_alone_is_refused_and_named(copy: Copy, load: Load, name: str) -> None:
    path = copy()
    (path / SINGLE_FILE).rename(path / name)
    with pytest.raises(CheckpointError, match=f"found {name}"):
        load(path)


def test_all_tensors_of_the_shards_count_and_the_last_of_two(copy: Copy, load: Load) -> None:
    path = copy()
    tensors = load_file(path / SINGLE_FILE)
    (path / SINGLE_FILE).unlink()
    shards = split(tensors)
    first, last = shards.values()
    first[HEAD] = last.get(HEAD, first.get(HEAD, tensors[HEAD]))
    last[HEAD] = tensors[HEAD].flip(0)
    write_shards(path, shards, listed=lambda name: "norm" not in name)
    assert_same(load, path)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_file_that_config_json_names_goes_before_all(
    copy: Copy, load: Load, sharded: bool
) -> None:
    path = copy()
    tensors = other(load_file(path / SINGLE_FILE))
    name = "mine.safetensors.index.json" if sharded else "mine.safetensors"
    if sharded:
        write_shards(path, split(tensors))
        (path / INDEX_FILE).rename(path / name)
    else:
        write(path / name, tensors)
    change_config(path, transformers_weights=name)
    assert_same(load, path)


@pytest.mark.parametrize("name", ["../mine.safetensors", "missing.safetensors", "model.bin", 3, ""])
def test_a_file_that_config_json_cannot_name_is_refused(
    copy: Copy, load: Load, name: object
) -> None:
    path = copy()
    (path / "model.bin").touch()
    write(path.parent / "mine.safetensors", {})
    change_config(path, transformers_weights=name)
    with pytest.raises(CheckpointError, match=r"config.json: transformers_weights"):
        load(path)


# ---- settings of generate()


def test_settings_of_generate_in_config_json_count_where_there_is_no_other_file(
    copy: Copy, load: Load
) -> None:
    path = copy()
    (path / "generation_config.json").unlink()
    change_config(path, eos_token_id=7, repetition_penalty=1.7, do_sample=True, temperature=0.3)
    ours, theirs = load(path).generation_config, stock(path).generation_config
    assert ours.to_diff_dict() == theirs.to_diff_dict()
    assert (ours.eos_token_id, ours.repetition_penalty, ours.temperature) == (7, 1.7, 0.3)


# ---- adapters


@pytest.mark.parametrize("what", ["beside a model", "alone", "beside a GGUF file", "damaged"])
def test_an_adapter_is_refused(copy: Copy, load: Load, what: str, tmp_path: Path) -> None:
    path = copy()
    adapter = path / "adapter_config.json"
    adapter.write_text("{" if what == "damaged" else '{"base_model_name_or_path": "owner/base"}')
    write(path / "adapter_model.safetensors", {"a": torch.zeros(1)})
    if what == "alone":
        (path / SINGLE_FILE).unlink()
        (path / "config.json").unlink()
    elif what == "beside a GGUF file":
        (path / SINGLE_FILE).rename(path / "model.gguf")
    base = "not name" if what == "damaged" else "owner/base"
    for call in (lambda: load(path), lambda: quantize(path, tmp_path / "small")):
        with pytest.raises(
            CheckpointError, match=rf"adapter_config.json: .*{base}.*merge_and_unload.*move"
        ):
            call()
    if what == "beside a model":
        adapter.unlink()
        assert_same(load, path)


# ---- GGUF files that are no model


def write_gguf(file: Path, architecture: str, kind: str | None = None) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    if kind is not None:
        writer.add_type(kind)
    writer.add_tensor("a", np.zeros((2, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_that_are_no_model_are_passed_over(
    copy: Copy, tmp_path: Path, load: Load
) -> None:
    small = tmp_path / "small"
    quantize(copy(), small, "q8_0")
    expected = logits(load(small), prompt())
    write_gguf(small / "model-mmproj-f16.gguf", "clip")
    write_gguf(small / "eyes.gguf", "clip", "mmproj")
    write_gguf(small / "imatrix.gguf", "", "imatrix")
    write_gguf(small / "lora.gguf", "llama", "adapter")
    write_gguf(small / "vocab.gguf", "llama", "vocab")
    assert torch.equal(logits(load(small), prompt()), expected)
    write_gguf(small / "second.gguf", "llama", "model")
    with pytest.raises(
        CheckpointError, match=r"several models: model.gguf, second.gguf; .*gguf_file="
    ):
        load(small)
