"""Checkpoints made to harm: one error that names the file, before anything is allocated, run or
fetched by what they say.
"""

import builtins
import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_models import write_model
from test_checkpoint import change_config, change_index, entry, write_safetensors
from test_gguf import ARCHITECTURE, ONE, file_of, string, tensor, value
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, MixtralConfig

from flexinfer.convert.quantize import quantize
from flexinfer.engine.prepare import context_limit
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.config import refusing
from flexinfer.formats.gguf import read_gguf
from flexinfer.formats.safetensors import INDEX_FILE, read_header
from flexinfer.formats.tensors import CheckpointError
from flexinfer.model.skeleton import build_skeleton
from flexinfer.model.whole import load_whole, whole_skeleton
from tests.conftest import Load, MakeCheckpoint

LONG_NUMBER = "9" * 5000  # Python turns at most 4300 digits into an int
CopyOf = Callable[..., Path]


@pytest.fixture
def copy_of(checkpoint: MakeCheckpoint, tmp_path: Path) -> CopyOf:
    """copy_of(family="llama", ...) -> a private copy of a small checkpoint, to be changed."""

    def make(*family: str, **options: Any) -> Path:
        target = tmp_path / "copy"
        target.mkdir()
        for file in checkpoint(*family, **options).iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    return make


def refusal(path: Path, read: Callable[[], object]) -> str:
    """The message of the refusal: it names the file, fits a terminal and has an end."""
    with pytest.raises(CheckpointError) as refused:
        read()
    message = str(refused.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) < 4000
    return message


def build(path: Path) -> object:
    return build_skeleton(open_checkpoint(path))


HEADERS: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "escapes in a dtype": ({"a": {**entry(0, 4, [1]), "dtype": "\x1b[2J"}}, "dtype '.x1b"),
    "escapes in a name": ({"\x1b[2J\ud800": entry(0, 8, [1])}, "'.x1b"),
    "a name without end": ({"a" * 10_000: entry(0, 8, [1])}, "'aaa"),
    "a dtype without end": ({"a": entry(0, 4, [1], "F" * 10_000)}, "dtype 'FFF"),
    "a number without end": (b'{"a": ' + LONG_NUMBER.encode() + b"}", "not a JSON object"),
    "a size of many digits": ({"a": entry(0, 4, [10**4000, 10**4000])}, "data_offsets"),
    "a size of 64 bits": ({"a": entry(0, 4, [2**63])}, "data_offsets"),
    "true as a size": ({"a": entry(0, 4, [True])}, "data_offsets"),
    "a product without end": ({"a": entry(0, 4, [2**62] * 50_000)}, "data_offsets"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not a JSON object"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    file = tmp_path / "model.safetensors"
    write_safetensors(file, header, b"1234")
    assert message.replace(".x1b", "\\x1b") in refusal(file, lambda: read_header(file))


@pytest.mark.parametrize("shard", ["a\0b", "\ud800", "\x1b[2J", "é" * 300, "x" * 10_000])
def test_index_that_names_what_no_file_is_called(copy_of: CopyOf, shard: str) -> None:
    path = copy_of(sharded=True)
    change_index(path, lambda weight_map: weight_map.update({"lm_head.weight": shard}))
    assert "missing" in refusal(path / INDEX_FILE, lambda: open_checkpoint(path))


def test_index_with_a_name_without_end(copy_of: CopyOf) -> None:
    path = copy_of(sharded=True)
    change_index(
        path, lambda weight_map: weight_map.update({"é" * 10_000: min(weight_map.values())})
    )
    assert "is not in it" in refusal(path, lambda: open_checkpoint(path))


@pytest.mark.parametrize("text", ['{"weight_map": ' + LONG_NUMBER + "}", '{"a":' * 100_000])
def test_index_without_end(copy_of: CopyOf, text: str) -> None:
    path = copy_of(sharded=True)
    (path / INDEX_FILE).write_text(text)
    assert "not valid JSON" in refusal(path / INDEX_FILE, lambda: open_checkpoint(path))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX_FILE])
def test_json_too_large_to_be_one(copy_of: CopyOf, name: str) -> None:
    path = copy_of(sharded=True)
    os.truncate(path / name, 101_000_000)
    assert "101000000 bytes" in refusal(path / name, lambda: build(path))


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
        {"num_labels": 10**9},
        {"num_local_experts": 10**9},
        {"num_attention_heads": 10**9, "head_dim": 1},
        {"vision_config": {"depth": 10**9}},
    ],
)
def test_config_with_more_parts_than_the_checkpoint_has(
    copy_of: CopyOf, change: dict[str, Any]
) -> None:
    """transformers would make lists and layers of this length: it must not see them."""
    path = copy_of()
    change_config(path, **change)
    assert "do not belong together" in refusal(path / "config.json", lambda: build(path))


def test_config_with_defaults_that_are_larger_than_the_checkpoint(copy_of: CopyOf) -> None:
    path = copy_of(num_hidden_layers=1)
    config = json.loads((path / "config.json").read_text())
    del config["num_hidden_layers"]  # Llama's own number is 32
    (path / "config.json").write_text(json.dumps(config))
    assert "12 tensors" in refusal(path / "config.json", lambda: build(path))


def test_config_with_tables_that_no_tensor_vouches_for(tmp_path: Path) -> None:
    config = GPTJConfig(
        n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64, vocab_size=160
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    build(tmp_path)
    change_config(tmp_path, n_positions=10**9)
    message = refusal(tmp_path / "config.json", lambda: build(tmp_path))
    assert "32000000000 bytes" in message


STRANGE: list[dict[str, Any]] = [
    {"model_type": "\x1b[2J"},
    {"model_type": ["llama"]},
    {"hidden_act": "nothing"},
    {"hidden_size": "many"},
    {"hidden_size": -64},
    {"vocab_size": 10**30},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"head_dim": 0},
    {"pad_token_id": 10**6},
    {"rope_scaling": 3},
    {"rope_parameters": {"rope_type": "bananas"}},
    {"layer_types": ["bananas"] * 4},
    {"dtype": "nn"},
    {"text_config": 3},
    {"auto_map": 3},
    {"get_text_config": 1},
    {"cache_implementation": [[]]},
    {"quantization_config": [1]},
    {"quantization_config": {"quant_method": "\x1b[2J"}},
    {"quantization_config": {"quant_method": "flexinfer", "format_version": 1, "bits": 5}},
]


@pytest.mark.parametrize("change", STRANGE, ids=[str(change)[:50] for change in STRANGE])
def test_config_that_transformers_chokes_on(copy_of: CopyOf, change: dict[str, Any]) -> None:
    path = copy_of()
    change_config(path, **change)
    refusal(path, lambda: build(path))


@pytest.mark.parametrize(
    "text", [b"\xff", b"[" * 100_000, b'{"a": ' + LONG_NUMBER.encode() + b"}", b""]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_config_that_is_no_json(copy_of: CopyOf, name: str, text: bytes) -> None:
    path = copy_of()
    (path / name).write_bytes(text)
    assert "not valid JSON" in refusal(path / name, lambda: build(path))


@pytest.mark.parametrize(
    "change", [{"cache_implementation": [[]]}, {"watermarking_config": 3}, {"max_new_tokens": -5}]
)
def test_generation_config_that_transformers_chokes_on(
    copy_of: CopyOf, change: dict[str, Any]
) -> None:
    path = copy_of()
    (path / "generation_config.json").write_text(json.dumps(change))
    refusal(path / "generation_config.json", lambda: build(path))


@pytest.mark.parametrize("size", [3, 10**15, 96])
def test_a_quantised_copy_of_another_shape(
    checkpoint: MakeCheckpoint, tmp_path: Path, size: int
) -> None:
    path = tmp_path / "copy"
    quantize(checkpoint(intermediate_size=128), path, "q8_0", progress=False)
    build(path)
    change_config(path, intermediate_size=size)
    assert "do not belong together" in refusal(path / "model.gguf", lambda: build(path))


@pytest.mark.parametrize("limit", [None, -1, 0, "many", 3.5])
def test_a_context_limit_that_is_no_number_of_tokens_is_not_used(limit: Any) -> None:
    assert context_limit(LlamaConfig(max_position_embeddings=128)) == 128
    config = LlamaConfig()
    del config.max_position_embeddings
    object.__setattr__(config, "max_position_embeddings", limit)
    assert context_limit(config) == 2048


# ---- GGUF


def number(key: str, of: int) -> bytes:
    return value(key, 4, struct.pack("<I", of))


MANY = struct.pack("<IQ", 8, 1 << 30)
TEN_MILLION = 10_000_000
# The file, how large it is made with zeros, the message.
STRANGE_GGUFS: dict[str, tuple[bytes, int, str]] = {
    "escapes in a key": (
        file_of([ARCHITECTURE, value("\x1b[2J", 77, b"")], ONE),
        0,
        "'.x1b[2J' is of type 77",
    ),
    "a key without end": (
        file_of([ARCHITECTURE, value("k" * 9999, 77, b"")], ONE),
        0,
        "is of type 77",
    ),
    "a cut string with escapes in its key": (
        file_of([ARCHITECTURE, value("\x1b[2J", 8, struct.pack("<Q", 1 << 50))], ONE),
        0,
        "'.x1b[2J' would take",
    ),
    "escapes in a tensor's name": (
        file_of([ARCHITECTURE], [tensor("\x1b[2J", (32,), 99, 0)]),
        0,
        "'.x1b[2J'",
    ),
    "a tensor's name without end": (
        file_of([ARCHITECTURE], [tensor("t" * 9999, (32,), 99, 0)]),
        0,
        "type 99",
    ),
    "escapes in the architecture": (
        file_of([value("general.architecture", 8, string("\x1b[2J"))], ONE),
        0,
        "architecture '.x1b[2J' cannot be run",
    ),
    "an architecture without end": (
        file_of([value("general.architecture", 8, string("a" * 9999))], ONE),
        0,
        "cannot be run",
    ),
    "an architecture that is a number": (
        file_of([number("general.architecture", 1)], ONE),
        0,
        "no general.arch",
    ),
    "a part that is a word": (
        file_of([ARCHITECTURE, value("split.no", 8, string("x"))], ONE),
        0,
        "split.no is 'x', no whole number",
    ),
    "parts that are a list": (
        file_of([ARCHITECTURE, value("split.count", 9, struct.pack("<IQI", 4, 1, 1))], ONE),
        0,
        "split.count is [1], no whole number",
    ),
    "an alignment that is true": (
        file_of([ARCHITECTURE, value("general.alignment", 7, b"\1")], ONE),
        0,
        "general.alignment is True",
    ),
    "an alignment without end": (
        file_of([ARCHITECTURE, value("general.alignment", 10, struct.pack("<Q", 1 << 63))], ONE),
        0,
        "truncated: tensor 'a'",
    ),
    "more values than there are": (
        file_of([ARCHITECTURE], ONE, counts=(1, 70_000)),
        1 << 30,
        "at most 65536",
    ),
    "more tensors than there are": (
        file_of([ARCHITECTURE], ONE, counts=(70_000, 1)),
        1 << 30,
        "at most 65536",
    ),
    "empty strings without end": (
        file_of([value("x", 9, MANY)], ONE),
        1 << 40,
        "1073741824 strings",
    ),
    "a string without end": (
        file_of([value("x", 8, struct.pack("<Q", 1 << 30))], ONE),
        1 << 31,
        "more than 33554432",
    ),
    "numbers without end, wanted": (
        file_of([value("wanted", 9, struct.pack("<IQ", 0, TEN_MILLION))], ONE),
        1 << 24,
        "more than 33554432",
    ),
}


@pytest.mark.parametrize("case", STRANGE_GGUFS)
def test_gguf_header(tmp_path: Path, case: str) -> None:
    content, size_bytes, message = STRANGE_GGUFS[case]
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    if size_bytes:
        os.truncate(file, size_bytes)  # zeros that take no room on the disk

    def read() -> None:
        read_gguf(file, ["wanted"])
        build(file)

    assert message.replace(".x1b", "\\x1b") in refusal(file, read)


Change = Callable[[gguf.GGUFWriter], None]


def says(**values: Any) -> Change:
    """The header says this of the architecture (`a__b` is a.b), in place of what it said."""

    def change(writer: gguf.GGUFWriter) -> None:
        for name, said in values.items():
            key = name.replace("__", ".")
            key = key if key.startswith("tokenizer") else f"{writer.arch}.{key}"
            writer.kv_data[0].pop(key, None)
            add: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool,
                int: writer.add_int64,
                float: writer.add_float64,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(said)](key, said)

    return change


def has(**rows: list[float]) -> Change:
    """The file has these tensors as well."""

    def change(writer: gguf.GGUFWriter) -> None:
        for name, numbers in rows.items():
            writer.add_tensor(f"{name}.weight", np.array(numbers, np.float32))

    return change


def both(*changes: Change) -> Change:
    def change(writer: gguf.GGUFWriter) -> None:
        for one in changes:
            one(writer)

    return change


NAN = float("nan")
STRANGE_MODELS: dict[str, tuple[str, Change, str]] = {
    "more heads than numbers": (
        "qwen2",
        says(attention__head_count=10**6),
        "0 of 0 numbers of a head",
    ),
    "heads of nothing": ("phi3", says(attention__head_count=10**6), "64 of 0 numbers of a head"),
    "a width in words": ("qwen3", says(attention__key_length="many"), "key_length is 'many'"),
    "a width below 0": ("qwen3", says(attention__key_length=-128), "key_length is -128"),
    "a size that is true": ("llama", says(embedding_length=True), "embedding_length is True"),
    "a list without numbers": (
        "llama",
        says(attention__head_count=["a", "b"]),
        "differs from layer to layer",
    ),
    "more is rotated than there is": (
        "stablelm",
        says(rope__dimension_count=10**9),
        "1000000000 of 64 numbers",
    ),
    "rotated without end": (
        "gpt2",
        both(says(rope__dimension_count=10**9), has(rope_freqs=[2.0] * 32)),
        "1000000000 of 64 numbers",
    ),
    "heads and rotations without end": (
        "llama",
        both(
            says(attention__key_length=10**9, rope__dimension_count=10**9),
            has(rope_freqs=[2.0] * 32),
        ),
        "32 numbers for 1000000000 that are rotated",
    ),
    "a base in words": ("qwen2", says(rope__freq_base="many"), "freq_base is 'many'"),
    "a base that is no number": ("qwen2", says(rope__freq_base=NAN), "freq_base is nan"),
    "a base below 0": ("llama", says(rope__freq_base=-1.0), "freq_base is -1.0"),
    "a factor that is no number": ("gemma3", says(rope__scaling__factor=NAN), "factor is nan"),
    "a soft cap in words": ("gemma2", says(attn_logit_softcapping="many"), "softcapping is 'many'"),
    "escapes in a scaling": (
        "qwen2",
        says(rope__scaling__type="\x1b[2J", rope__scaling__factor=2.0),
        "rope.scaling.type '\\x1b[2J'",
    ),
    "divisors that are no numbers": ("llama", has(rope_freqs=[NAN] * 32), "not above 0"),
    "divisors of 0": ("llama", has(rope_freqs=[0.0] * 32), "not above 0"),
    "one of two rows of factors": (
        "phi3",
        has(rope_factors_long=[2.0] * 32),
        "no tensor rope_factors_short.weight",
    ),
    "a token in words": (
        "llama",
        says(tokenizer__ggml__eos_token_id="many"),
        "eos_token_id is 'many'",
    ),
    "tokens in a list": (
        "llama",
        says(tokenizer__ggml__eos_token_id=[2] * 5000),
        "eos_token_id is LongArray",
    ),
    "padding that is no token": (
        "llama",
        says(tokenizer__ggml__padding_token_id=10**9),
        "Padding_idx must be within",
    ),
    "layers without end": ("llama", says(block_count=10**9), "do not belong together"),
    "an epsilon in words": (
        "llama",
        says(attention__layer_norm_rms_epsilon="many"),
        "rms_epsilon is 'many'",
    ),
    "a name without end": ("llama", has(**{"t" * 9999: [1.0]}), "no place in LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", STRANGE_MODELS)
def test_gguf_whose_values_make_no_model(tmp_path: Path, case: str) -> None:
    family, change, message = STRANGE_MODELS[case]
    file = write_model(tmp_path, family, change=change).file
    assert message in refusal(file, lambda: build(file))


def test_gguf_with_rows_without_end(tmp_path: Path) -> None:
    """Their order is numbers of their own for each."""
    sizes = [number(f"llama.{key}", 32) for key in ("embedding_length", "feed_forward_length")]
    counts = [
        number(f"llama.{key}", 1)
        for key in ("block_count", "attention.head_count", "context_length")
    ]
    file = tmp_path / "model.gguf"
    file.write_bytes(
        file_of(
            [ARCHITECTURE, *sizes, *counts],
            [
                tensor("token_embd.weight", (2, 32), 2, 0),
                tensor("blk.0.attn_q.weight", (1 << 21, 32), 2, 64),
            ],
        )
    )
    os.truncate(file, 1 << 26)
    assert "2097152 rows" in refusal(file, lambda: build(file))


# ---- code and files of others


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be asked of the user or of the network."""

    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the user, or the network")

    monkeypatch.setattr(builtins, "input", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)


CODE = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize("prefix", ["", "owner/name--"])
def test_code_of_the_checkpoint_is_not_run(copy_of: CopyOf, alone: None, prefix: str) -> None:
    path = copy_of()
    (path / "code.py").write_text(f"open({str(path / 'ran')!r}, 'w')")
    auto_map = {key: prefix + value for key, value in CODE.items()}
    change_config(path, auto_map=auto_map, trust_remote_code=True)
    build(path)  # transformers has Llama itself
    change_config(path, model_type="bananas")
    refusal(path / "config.json", lambda: build(path))
    assert not (path / "ran").exists()


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "experts_implementation"]
)
@pytest.mark.parametrize("value", ["owner/name", "flash_attention_2", {"": "owner/name:code"}, 3])
def test_kernels_from_elsewhere_are_refused(
    copy_of: CopyOf, alone: None, key: str, value: Any
) -> None:
    path = copy_of()
    change_config(path, **{key: value})
    assert "outside of transformers" in refusal(path / "config.json", lambda: build(path))


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_transformers_own_attention_may_be_named(copy_of: CopyOf, value: str) -> None:
    path = copy_of()
    change_config(path, attn_implementation=value)
    assert build_skeleton(open_checkpoint(path)).attention == value


def test_another_file_in_place_of_the_config_is_refused(copy_of: CopyOf) -> None:
    path = copy_of()
    change_config(path, configuration_files=["config.4.0.0.json"])
    assert "configuration_files" in refusal(path / "config.json", lambda: build(path))


def test_a_name_in_the_config_is_not_followed(copy_of: CopyOf, alone: None, load: Load) -> None:
    path = copy_of()
    change_config(path, _name_or_path="owner/name", base_model_name_or_path="owner/name")
    load(path)


def test_the_base_model_of_an_adapter_is_not_loaded(tmp_path: Path, alone: None) -> None:
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    mixture = AutoModelForCausalLM.from_config(
        MixtralConfig(**shape, vocab_size=160, num_key_value_heads=1)
    )
    mixture.save_pretrained(tmp_path)
    load_whole(whole_skeleton(open_checkpoint(tmp_path), torch.float32))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    file = tmp_path / "adapter_config.json"
    refusal(file, lambda: whole_skeleton(open_checkpoint(tmp_path), torch.float32))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_what_is_not_the_files_fault_is_not_put_on_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    with pytest.raises(error), refusing(tmp_path, "no model"):
        raise error
