"""A server in this process, and small models for it: one that talks, one that calls a tool."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from openai import OpenAI
from small_model import CONFIG, TEMPLATE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flexinfer.serve.server import Server, serve

SPECIAL = ["<pad>", "<s>", "</s>"]
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson "
    "}}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] "
    "}}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@dataclass(slots=True)
class Brake:
    """A progress callback of the engine that counts passes, and holds one where it is until it is
    let go.
    """

    passes: int = 0
    go: threading.Event = field(default_factory=threading.Event)
    held: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.go.set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == "pass" and done == total:
            self.passes += 1
            if not self.go.is_set():
                self.held.set()
            assert self.go.wait(60)

    def hold(self) -> None:
        """From the end of the next pass on."""
        self.held.clear()
        self.go.clear()


@dataclass(frozen=True, slots=True)
class Served:
    """A server that listens."""

    url: str  # with /v1
    model: str

    @property
    def root(self) -> str:
        return self.url.removesuffix("/v1")

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=self.url, **{"api_key": "none", "max_retries": 0} | options)

    def metric(self, name: str) -> float:
        """A value of /metrics that has no labels."""
        text = httpx.get(f"{self.root}/metrics").text
        return next(
            float(line.split()[1]) for line in text.splitlines() if line.startswith(name + " ")
        )


@contextlib.contextmanager
def serving(path: Path, **options: Any) -> Iterator[Served]:
    """`path` served in a thread of this process until the block ends."""
    started, servers, errors = threading.Event(), list[Server](), list[BaseException]()

    def listening(server: Server) -> None:
        servers.append(server)
        started.set()

    def run() -> None:
        try:
            serve(
                path,
                **{"memory": "6GiB", "context": 128, "port": 0, "grace_s": 0.5} | options,
                started=listening,
            )
        except BaseException as error:
            errors.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="serve")
    thread.start()
    started.wait()
    if errors:
        raise errors[0]
    try:
        yield Served(servers[0].url, path.name)
    finally:
        servers[0].should_exit = True
        thread.join()
        assert not errors


def make_talker(path: Path) -> Path:
    """A random Llama that says any of 256 characters and never ends by itself."""
    characters = [chr(code) for code in (10, *range(32, 127), *range(0x100, 0x1A0))]
    tokens = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token="<pad>", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=TEMPLATE, **names
    ).save_pretrained(path)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(**shape, **CONFIG)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.lm_head.weight[:3] = 0
    model.save_pretrained(path)
    return path


def make_caller(path: Path) -> Path:
    """A Qwen2 whose every answer is CALL: its layers add nothing, and its head knows what follows
    each token.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(
        [AddedToken(one, normalized=False) for one in ("<tool_call>", CALL, "</tool_call>")]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    ).save_pretrained(path)
    size, said = (
        320,
        [letters.index("\u010a"), *(tokenizer.token_to_id(t) for t in ("<tool_call>", CALL))],
    )
    said += [tokenizer.token_to_id(token) for token in ("</tool_call>", "<|im_end|>")]
    shape = {
        "hidden_size": size,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    config = transformers.Qwen2Config(
        **shape,
        num_key_value_heads=4,
        vocab_size=size,
        eos_token_id=said[-1],
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, after in pairwise(said):
            model.lm_head.weight[after, token] = 1
    model.save_pretrained(path)
    return path
