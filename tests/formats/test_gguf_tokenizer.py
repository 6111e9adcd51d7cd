"""The tokenizer that is made of a GGUF file: as transformers reads it, but for digits, which
llama.cpp cuts apart for some vocabularies.
"""

import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf_models import byte_level, write_model
from transformers import AutoTokenizer

import flexinfer.cache_dir
import flexinfer.formats.child
import flexinfer.formats.gguf_model
from flexinfer import CheckpointError
from flexinfer.formats.checkpoint import open_checkpoint
from flexinfer.formats.tokenizer import load_tokenizer, prepare_tokenizer

TEXTS = ("hello world", "  two  spaces", "abab 12345\n<end>ab", "caf\u00e9")


def sentencepiece(writer: gguf.GGUFWriter) -> None:
    letters = sorted(set("".join(TEXTS).replace(" ", "\u2581")) - {"\n", "\u00e9"})
    tokens = [
        "<pad>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *letters,
        "ab",
        "\u2581w",
        "he",
        "abab",
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([3, 3, 3, *(6 for _ in range(256)), *(1 for _ in tokens[259:])])
    writer.add_add_space_prefix(True)


def made(path: Path, change: Any) -> Path:
    return write_model(
        path, "llama", ("F32",), change=change, vocab_size=400, num_hidden_layers=1
    ).file


@pytest.mark.parametrize("change", [byte_level, sentencepiece])
def test_it_is_what_transformers_makes_of_the_file(tmp_path: Path, change: Any) -> None:
    file = made(tmp_path, change)
    directory = open_checkpoint(file).config_dir
    ours = load_tokenizer(directory)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == ("<s>", "</s>", "<pad>")
    assert prepare_tokenizer(directory).memory.peak_bytes > 0
    if change is byte_level:
        assert ours.decode(ours(TEXTS[0])["input_ids"]) == TEXTS[0]
        assert ours.apply_chat_template([{"content": "ab"}], tokenize=False) == "<s>ab</s>"
    else:
        # A sentencepiece vocabulary begins a text, unless it says otherwise.
        assert ours("ab")["input_ids"][0] == 1


def test_digits_are_cut_apart_where_the_vocabulary_was_made_so(tmp_path: Path) -> None:
    joined, apart = tmp_path / "joined", tmp_path / "apart"
    joined.mkdir(), apart.mkdir()
    tokens = {
        directory: load_tokenizer(open_checkpoint(made(directory, change)).config_dir).tokenize(
            "12"
        )
        for directory, change in (
            (joined, byte_level),
            (apart, lambda writer: byte_level(writer, "smollm")),
        )
    }
    assert tokens == {joined: ["12"], apart: ["1", "2"]}


def test_words_of_the_vocabulary_stay_whole_where_the_vocabulary_was_made_so(
    tmp_path: Path,
) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        byte_level(writer, "llama-bpe")
        writer.kv_data[0].pop("tokenizer.ggml.merges")
        writer.add_token_merges(["a b"])

    tokenizer = load_tokenizer(open_checkpoint(made(tmp_path, change)).config_dir)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abab")["input_ids"]) == ["<s>", "abab"]


def test_an_answer_ends_at_whatever_ends_a_turn(tmp_path: Path, load: Any) -> None:
    model = load(made(tmp_path, byte_level))
    ends = model.flexinfer.tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"])
    assert model.generation_config.eos_token_id == ends


def test_a_cut_that_is_not_known_is_said(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match=r"tokenizer.ggml.pre is 'bananas', which is not known"):
        open_checkpoint(made(tmp_path, lambda writer: byte_level(writer, "bananas")))


def test_a_model_without_a_tokenizer_runs_and_says_so_when_asked(tmp_path: Path, load: Any) -> None:
    model = load(write_model(tmp_path, "llama").file)
    with pytest.raises(CheckpointError, match="the file has none"):
        _ = model.flexinfer.tokenizer


def test_a_kind_of_tokenizer_that_is_not_known_leaves_the_model(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bananas")
        writer.add_token_list(["a", "b"])

    with pytest.warns(RuntimeWarning, match="no tokenizer could be made .*bananas"):
        directory = open_checkpoint(made(tmp_path, change)).config_dir
    with pytest.raises(CheckpointError, match="bananas"):
        load_tokenizer(directory)


def test_a_warning_is_fit_for_a_terminal(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("\x1b[2J" + "x" * 9999)
        writer.add_token_list(["a", "b"])

    with pytest.warns(RuntimeWarning, match="no tokenizer could be made") as warned:
        open_checkpoint(made(tmp_path, change))
    message = str(warned[0].message)
    assert message.isprintable()
    assert len(message) < 4000


def test_it_is_made_once_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tmp_path, byte_level)
    directory = open_checkpoint(file).config_dir
    monkeypatch.setattr(flexinfer.formats.gguf_model, "_make_tokenizer", None)
    assert open_checkpoint(file).config_dir == directory


def test_where_memory_is_too_little_for_it_this_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flexinfer.formats.child, "available_bytes", lambda: 0)
    with pytest.raises(
        CheckpointError, match=r"to make its tokenizer takes \d+ MiB of memory, once"
    ):
        open_checkpoint(made(tmp_path, byte_level))


def test_without_a_cache_that_can_be_written_to_it_is_made_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = made(tmp_path, byte_level)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(flexinfer.cache_dir, "cache_dir", lambda: tmp_path / "file")
    with pytest.warns(RuntimeWarning, match="Set FLEXINFER_CACHE"):
        directory = open_checkpoint(file).config_dir
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(file).config_dir == directory
        assert (
            load_tokenizer(directory)("ab")["input_ids"]
            == load_tokenizer(directory)("ab")["input_ids"]
        )
