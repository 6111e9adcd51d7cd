"""The command line: flexinfer generate | chat | serve | plan | quantize | doctor.

Text goes to stdout, everything about it (progress, speed, notes) to stderr, so that output can be piped; `--json` prints
one object instead. What the user got wrong is one line on stderr and exit code 2. torch and transformers are imported by the
command that needs them, so that `--help` is quick. It adds nothing to the engine: every command is a few calls that
a program could make as well.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TextIO, cast

from flexinfer.bars import Bars
from flexinfer.interrupt import INTERRUPTED, TERMINATED, Interrupt, Terminated, terminable
from flexinfer.plan import DEFAULT_WINDOW_BYTES, format_size

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flexinfer.assistant import Option
    from flexinfer.formats.skeleton import Skeleton
    from flexinfer.model import Engine
    from flexinfer.plan import Plan, Substitutes, Weight

# Turns a thread of libgomp spins before it sleeps. Its default is milliseconds: cores burnt while the disk is awaited (0.9 of a CPU at
# 1 GB/s, now 0.15), and ten times the time for a token on a busy machine, where spinning threads keep the one they wait for off the
# core. With as few turns a quiet machine is no slower (docs/log.md). Read once, when torch loads libgomp.
SPIN_COUNT = "6000"
DRAFT_STATS = ("draft", "drafted", "accepted", "acceptance", "draft_s", "draft_predicted_tokens_per_s")
BUDGET_SHARES = (0.25, 0.5, 0.75)  # of the way from the smallest budget to everything resident, in `plan`


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments, rest = parser().parse_known_args(argv)
    if rest and getattr(arguments, "prompt", "") is None and not rest[0].startswith("-"):
        arguments.prompt = rest.pop(0)  # options before the prompt, which argparse cannot sort out
    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    run: Callable[[argparse.Namespace], int] = arguments.run
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    try:
        with terminable(), warnings.catch_warnings(), _logged(getattr(arguments, "verbose", False)):
            warnings.showwarning = _note_warning
            return run(arguments)
    except (KeyboardInterrupt, Terminated) as stop:
        _note("stopped")
        return _exit_code(stop)
    except BrokenPipeError:  # the reader of a pipe has gone: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        _note(f"error: {' '.join(str(error).split())}")
        return 2


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    top = argparse.ArgumentParser(
        prog="flexinfer",
        description="Runs language models that do not fit in memory, inside a memory budget, with the output unchanged.",
    )
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    engine = argparse.ArgumentParser(add_help=False)
    engine.add_argument(
        "model", metavar="MODEL", help="checkpoint directory, GGUF file, or Hugging Face Hub id"
    )
    engine.add_argument("--gguf-file", metavar="NAME", help="which GGUF file of that directory or Hub id")
    options = engine.add_argument_group("memory and reading")
    options.add_argument(
        "--memory",
        default="auto",
        help="budget of the whole process, such as 4GiB (default: what is to spare)",
    )
    options.add_argument(
        "--policy",
        default="balanced",
        help="what is kept in memory: balanced (default), unbalanced, attention-first, ffn-first, algorithm1, none",
    )
    options.add_argument(
        "--window",
        help=f"memory for prefetched weights: 64MiB, or '3 layers' (default: {DEFAULT_WINDOW_BYTES >> 20}MiB)",
    )
    options.add_argument(
        "--io-threads", type=int, default=2, help="reader threads; 0 reads synchronously (default: 2)"
    )
    options.add_argument("--buffered", action="store_true", help="read through the page cache, not past it")
    options.add_argument(
        "--verify", action="store_true", help="hold what is read against checksums (made once per file)"
    )
    options.add_argument(
        "--read-timeout", type=float, metavar="SECONDS", help="give a read up after so long (default: never)"
    )
    options.add_argument("--context", type=int, help="tokens the KV cache is sized for")
    options.add_argument(
        "--dtype", default="auto", help="what to compute in (default: the checkpoint's; float32 for GGUF)"
    )
    options.add_argument(
        "--kv-dtype",
        default="auto",
        help="what the KV cache is kept in (default: as --dtype; float16 for GGUF)",
    )

    drafting = argparse.ArgumentParser(add_help=False)
    drafting.add_argument(
        "--draft",
        metavar="WHAT",
        help="several tokens a pass, same output: substitute, lookup, a small model of the same tokenizer, or auto",
    )

    sampling = argparse.ArgumentParser(add_help=False)
    options = sampling.add_argument_group("decoding")
    options.add_argument("--max-new-tokens", type=int, default=256, help="at most so many (default: 256)")
    options.add_argument("--temperature", type=float, help="sample with this temperature (default: greedy)")
    options.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens of this total probability"
    )
    options.add_argument("--seed", type=int, help="makes sampling repeatable")
    options.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="guess N tokens from the text so far and verify them in one pass; same output, fewer reads",
    )

    options = sampling.add_argument_group("seeing inside")
    options.add_argument(
        "--trace", metavar="FILE", help="write reads, waits and kernels there, for https://ui.perfetto.dev"
    )
    options.add_argument(
        "-v", "--verbose", action="store_true", help="say where the budget goes, and what made the run slow"
    )

    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--json", action="store_true", help="print one JSON object")

    command = commands.add_parser(
        "generate",
        parents=[engine, drafting, sampling, machine],
        help="go on from a prompt; the text is streamed",
    )
    command.add_argument("prompt", nargs="?", help="the text to go on from (default: standard input)")
    command.set_defaults(run=generate)

    command = commands.add_parser(
        "chat", parents=[engine, drafting, sampling], help="talk to an instruction-tuned model; /exit leaves"
    )
    command.add_argument("--system", help="system message")
    command.set_defaults(run=chat)

    command = commands.add_parser(
        "serve", parents=[engine], help="an OpenAI-compatible server for one model; needs flexinfer[serve]"
    )
    command.add_argument("--host", default="127.0.0.1", help="where to listen (default: this machine alone)")
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    command.add_argument(
        "--api-key", help="that requests have to bring (default: $FLEXINFER_API_KEY, or none)"
    )
    command.add_argument("--queue", type=int, default=16, help="requests that may wait (default: 16)")
    command.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="after SIGTERM, for what runs (default: 10)",
    )
    command.set_defaults(run=serve)

    command = commands.add_parser(
        "plan",
        parents=[engine, drafting, machine],
        help="where a budget would go, and how fast; reads no weights but a sample",
    )
    command.set_defaults(run=show_plan)

    command = commands.add_parser(
        "quantize", parents=[machine], help="make a smaller copy of a checkpoint (GGUF), tensor by tensor"
    )
    command.add_argument("source", metavar="SRC", help="checkpoint directory, or Hub id")
    command.add_argument("destination", metavar="DST", help="directory of the copy; must not exist")
    command.add_argument(
        "--type",
        default="q4_k",
        help="ggml's type of blocks: q4_0, q4_1, q5_0, q5_1, q8_0, q2_k to q6_k, iq4_nl, iq4_xs, iq3_s (default: q4_k)",
    )
    command.set_defaults(run=quantize_copy)

    command = commands.add_parser(
        "doctor", parents=[machine], help="measure disk, kernels and rights: what this machine will do"
    )
    command.add_argument(
        "path", nargs="?", default=".", help="directory on the disk the models lie on (default: here)"
    )
    command.add_argument(
        "--size", default="512MiB", help="how much to write and read there (default: 512MiB)"
    )
    command.set_defaults(run=examine)
    return top


def serve(arguments: argparse.Namespace) -> int:
    """Answer requests until SIGTERM or Ctrl-C."""
    from flexinfer.serve.server import serve

    serve(
        arguments.model,
        arguments.memory,
        host=arguments.host,
        port=arguments.port,
        api_key=arguments.api_key,
        queue=arguments.queue,
        grace_s=arguments.grace,
        context=arguments.context,
        **_engine_options(arguments),
    )
    return 0


# ---- generate and chat


def generate(arguments: argparse.Namespace) -> int:
    """Stream the continuation of a prompt, then say how fast it was."""
    decoding = _decoding(arguments)
    prompt = arguments.prompt if arguments.prompt is not None else sys.stdin.read()
    if not prompt:
        raise ValueError("prompt='' is empty; give some text, as an argument or on standard input")
    with Bars() as bars:
        bars.spin(f"loading {arguments.model}")
        tokenizer = _load_tokenizer(arguments.model, arguments.gguf_file)
        inputs = tokenizer(prompt, return_tensors="pt")
        prompt_tokens = inputs["input_ids"].shape[1]
        needed = prompt_tokens + arguments.max_new_tokens + (arguments.prompt_lookup or 0)
        if arguments.context is not None and arguments.context < needed:
            raise ValueError(
                f"context={arguments.context} is too small for {prompt_tokens} prompt tokens and what is to follow; "
                f"leave it out, or give --context {needed}"
            )
        with (
            _load_model(arguments, tokenizer, arguments.context or needed, bars) as model,
            Interrupt(bars.stopping) as interrupt,
        ):
            writer = _Nowhere() if arguments.json else _text_streamer(tokenizer, skip_prompt=True)
            clock = Clock(writer, engine_of(model), bars)
            output = cast(Any, model).generate(
                **inputs, streamer=clock, stopping_criteria=[interrupt], **decoding
            )
            result = measure(model, clock)
            token_ids = output[0, prompt_tokens:].tolist()
    if arguments.json:
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        print(json.dumps({"text": text, "token_ids": token_ids, "prompt_tokens": prompt_tokens} | result))
    else:
        _note(("stopped; " if interrupt.pressed else "") + speed_line(result))
        if result["draft_that_pays"] is not None:
            _note(f"--draft auto may give {result['draft_that_pays']:.3g} tokens/s, with the same output")
    return interrupt.code


def chat(arguments: argparse.Namespace) -> int:
    """Questions from standard input, answers streamed, until /exit or the end of input."""
    _decoding(arguments)  # what is wrong with the options is said before the model is loaded
    with Bars() as bars:
        bars.spin(f"loading {arguments.model}")
        tokenizer = _load_tokenizer(arguments.model, arguments.gguf_file)
        if not tokenizer.chat_template:
            raise ValueError(f"{arguments.model} has no chat template; use `flexinfer generate`")
        with _load_model(arguments, tokenizer, arguments.context, bars) as model:
            _converse(Conversation(model, tokenizer, arguments, bars))
    return 0


def _converse(talk: "Conversation") -> None:
    """Ask what standard input has to ask."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  (gives input() history and editing)

        _note("/exit or Ctrl-D leaves, Ctrl-C stops an answer")
    try:
        while True:
            try:
                question = input("> " if at_terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                _note("\n/exit or Ctrl-D leaves")
                continue
            if question == "/exit":
                return
            if question:
                talk.ask(question)
    except Terminated:
        if at_terminal:
            print()
        raise
    if at_terminal:
        print()


class Conversation:
    """The turns so far, and a KV cache that holds what the model has read of them."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        arguments: argparse.Namespace,
        bars: Bars,
    ) -> None:
        self._model: Any = model  # transformers' own types promise too little of both
        self._tokenizer: Any = tokenizer
        self._arguments, self._bars = arguments, bars
        self._context = engine_of(model).context
        self._system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        self.turns: list[dict[str, str]] = []
        self._cached: list[int] = []  # the tokens that the cache holds keys and values of
        self._cache: Any = None

    def ask(self, question: str) -> str:
        """Stream the answer to `question`; both join the history. Returns the answer, as far as it went.

        Raises Terminated after the token in hand when SIGTERM comes.
        """
        import torch

        self.turns.append({"role": "user", "content": question})
        prompt = self._fit_prompt()
        if prompt is None:
            _note(
                f"this question does not fit into a context of {self._context} tokens; start with --context"
            )
            return ""
        self._keep_common(prompt)
        streamer = _text_streamer(self._tokenizer, skip_prompt=True)
        clock = Clock(streamer, engine_of(self._model), self._bars)
        room = self._context - len(prompt) - (self._arguments.prompt_lookup or 0)
        options = _decoding(self._arguments)
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
        with Interrupt(self._bars.stopping) as interrupt:
            try:
                ids = torch.tensor([prompt])
                output = self._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    cache=self._cache,
                    streamer=clock,
                    stopping_criteria=[interrupt],
                    **options,
                )[0].tolist()
            except KeyboardInterrupt:  # in the middle of a pass: the layers of the cache no longer agree
                self._cache, self._cached = None, []
                self._bars.stop()
                self.turns.pop()
                _note("\nstopped at once; this question is forgotten")
                return ""
        self._cached = output[: self._cache.get_seq_length()]
        answer: str = self._tokenizer.decode(output[len(prompt) :], skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": answer})
        _note(("stopped; " if interrupt.pressed else "") + speed_line(measure(self._model, clock)))
        if interrupt.code == TERMINATED:
            raise Terminated
        return answer

    def _fit_prompt(self) -> list[int] | None:
        """The token ids of the history, its oldest turns dropped where there is no room; None when one turn is too long."""
        least_answer = min(16, self._arguments.max_new_tokens) + (self._arguments.prompt_lookup or 0)
        dropped = 0
        while self.turns:
            encoded = self._tokenizer.apply_chat_template(
                self._system + self.turns, add_generation_prompt=True, return_dict=True
            )
            prompt: list[int] = list(encoded["input_ids"])
            if len(prompt) + least_answer <= self._context:
                if dropped:
                    _note(f"the oldest {dropped} turns no longer fit into the context and are forgotten")
                return prompt
            del self.turns[:2]
            dropped += 2
        return None

    def _keep_common(self, prompt: list[int]) -> None:
        """Make the cache hold exactly the beginning that it has in common with `prompt`, less at least one token."""
        common = 0
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):
            if ours != theirs:
                break
            common += 1
        try:
            if self._cache is not None and len(self._cached) > common:
                self._cache.crop(common - len(self._cached))
        except ValueError:  # a sliding window has let go of what would be needed
            self._cache = None
        if self._cache is None or common == 0:
            from transformers import DynamicCache

            self._cache = None  # first: the engine lends its memory to one living cache
            self._cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))


class _Nowhere:
    """A streamer that shows nothing."""

    def put(self, value: "torch.Tensor") -> None: ...

    def end(self) -> None: ...


@dataclass(slots=True)
class Clock:
    """Passes tokens on to a streamer, and keeps when they came. The first that come are the prompt.

    The bar of the prompt goes when the first token comes.
    """

    streamer: Any
    engine: "Engine"
    bars: Bars
    start_s: float = field(default_factory=perf_counter)
    times_s: list[float] = field(default_factory=list)  # one for each pass
    counts: list[int] = field(default_factory=list)  # tokens of that pass
    bytes_read: list[int] = field(default_factory=list)  # until then

    def __post_init__(self) -> None:
        self.bars.expect("lock", "pass")  # memory is filled before the first pass

    def put(self, value: "torch.Tensor") -> None:
        """Called by transformers with the prompt, then with the tokens of each pass."""
        if self.times_s:
            self.bars.stop()
        self.times_s.append(perf_counter())
        self.counts.append(value.numel())
        self.bytes_read.append(self.engine.stats()["bytes_read"])
        self.streamer.put(value)

    def end(self) -> None:
        """Called by transformers after the last token."""
        self.streamer.end()


def engine_of(model: "PreTrainedModel") -> "Engine":
    """The streaming side of a loaded model."""
    return cast("Engine", model.flexinfer)


def measure(model: "PreTrainedModel", clock: Clock) -> dict[str, Any]:
    """What making this text took: the first token apart (it waits for the prompt), then the decoding, and its bottleneck.

    `ratio` is passes per second over the bound of the budget; with more than one token a pass, tokens/s may exceed it.
    """
    engine = engine_of(model)
    stats, plan = engine.stats(), engine.plan
    times_s, counts = clock.times_s[1:], clock.counts[1:]  # without the prompt
    tokens, passes = sum(counts), len(counts)
    decoding_s = times_s[-1] - times_s[0] if passes > 1 else 0.0
    speed = (tokens - counts[0]) / decoding_s if decoding_s else None
    pays = engine.draft_that_pays()
    bytes_read = stats["bytes_read"] - clock.bytes_read[0] if clock.bytes_read else 0
    return {
        "tokens": tokens,
        "passes": passes,
        "first_token_s": times_s[0] - clock.start_s if times_s else None,
        "tokens_per_s": speed,
        "bytes_read": bytes_read,
        "read_bytes_per_s": (clock.bytes_read[-1] - clock.bytes_read[1]) / decoding_s if decoding_s else None,
        "bytes_per_token": bytes_read / tokens if tokens else None,
        "streamed_bytes_per_pass": plan.streamed_bytes,
        "total_bytes_per_pass": plan.total_bytes,
        "peak_bytes": stats["peak_bytes"],
        "budget_bytes": plan.budget_bytes,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "ratio": (passes - 1) / decoding_s / plan.bound_tokens_per_s if decoding_s else None,
        "bottleneck": engine.explain(),
        "draft": {name: stats[name] for name in DRAFT_STATS if name in stats} or None,
        "draft_that_pays": pays.predicted_tokens_per_s if pays is not None else None,
    }


def speed_line(result: dict[str, Any]) -> str:
    """`measure`'s result for people."""
    parts = [f"{result['tokens']} tokens"]
    if result["first_token_s"] is not None:
        parts.append(f"first after {result['first_token_s']:.2f} s")
    if result["tokens_per_s"] is not None:
        reading = (
            f" reading {result['read_bytes_per_s'] / 1e9:.3g} GB/s"
            if result["streamed_bytes_per_pass"]
            else ""
        )
        parts.append(f"then {result['tokens_per_s']:.3g} tokens/s{reading}")
        parts.append(f"{result['ratio']:.2f} of the bound ({result['bound_tokens_per_s']:.3g})")
    if result["passes"] != result["tokens"]:
        per_pass = result["tokens"] / result["passes"] if result["passes"] else 0
        parts.append(f"{result['passes']} passes of {per_pass:.3g} tokens")
        if result["tokens_per_s"] is not None:
            times = result["tokens_per_s"] / result["bound_tokens_per_s"]
            parts.append(f"{times:.3g} times the bound of one token a pass")
    if (draft := result.get("draft")) is not None:
        parts.append(
            f"draft {draft['draft'] or 'none'}: {draft['accepted']} of {draft['drafted']} candidates accepted"
        )
    if result["bytes_per_token"] is not None:
        parts.append(f"{format_size(result['bytes_per_token'])} read per token")
    parts.append(f"peak {format_size(result['peak_bytes'])} of {format_size(result['budget_bytes'])}")
    parts.append(f"limited by {result['bottleneck'].partition(':')[0]}")
    return ", ".join(parts)


def _load_tokenizer(model: str, gguf_file: str | None) -> "PreTrainedTokenizerBase":
    """The tokenizer; loaded before the model, so that its memory counts as the process's."""
    from transformers.utils import logging

    from flexinfer.formats.checkpoint import Checkpoint
    from flexinfer.formats.skeleton import resolve
    from flexinfer.tokenizer import load_tokenizer

    logging.set_verbosity_error()
    return load_tokenizer(Checkpoint.open(resolve(model, gguf_file)).config_dir)


@contextlib.contextmanager
def _load_model(
    arguments: argparse.Namespace, tokenizer: "PreTrainedTokenizerBase", context: int | None, bars: Bars
) -> "Iterator[PreTrainedModel]":
    import torch

    import flexinfer

    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    bars.expect("load")
    model = flexinfer.from_pretrained(
        arguments.model,
        arguments.memory,
        context=context,
        logits_to_keep=(arguments.prompt_lookup or 0) + 1,
        tokenizer=tokenizer,
        draft=arguments.draft,
        trace=arguments.trace or False,
        progress=bars.progress,
        **_engine_options(arguments),
    )
    bars.stop()
    with engine_of(model):
        yield model


def _engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of from_pretrained() that every command which loads a model takes as they are given."""
    return {
        "gguf_file": arguments.gguf_file,
        "policy": arguments.policy,
        "window": arguments.window,
        "io_threads": arguments.io_threads,
        "direct": not arguments.buffered,
        "verify": arguments.verify,
        "read_timeout_s": arguments.read_timeout,
        "dtype": arguments.dtype,
        "kv_dtype": arguments.kv_dtype,
    }


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of transformers' generate(): greedy unless a temperature or top-p is given. Raises ValueError."""
    temperature, top_p, lookup = arguments.temperature, arguments.top_p, arguments.prompt_lookup
    if arguments.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={arguments.max_new_tokens} must be at least 1")
    if temperature is not None and temperature < 0:
        raise ValueError(f"temperature={temperature:g} must be 0 (greedy) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p:g} must be more than 0 and at most 1")
    if lookup is not None and lookup < 1:
        raise ValueError(f"prompt_lookup={lookup} must be at least 1 token; leave it out to guess none")
    sample = bool(temperature) or top_p is not None
    options: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": sample}
    if sample:
        options |= {"temperature": temperature or 1.0, "top_p": top_p or 1.0}
    if lookup:
        options["prompt_lookup_num_tokens"] = lookup
    return options


def _text_streamer(tokenizer: "PreTrainedTokenizerBase", skip_prompt: bool) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)


# ---- plan


def show_plan(arguments: argparse.Namespace) -> int:
    """Where the budget would go, what would be locked, and how fast it would be at this and other budgets."""
    with Bars() as bars:
        bars.spin(f"reading {arguments.model}")
        from flexinfer.assistant import Drafts
        from flexinfer.draft import DraftChoice
        from flexinfer.formats.checkpoint import Checkpoint
        from flexinfer.formats.skeleton import build_skeleton, resolve
        from flexinfer.machine import available_bytes, measure_costs, measure_draft_costs
        from flexinfer.model import MemoryOfProcess, default_context, fixed_memory
        from flexinfer.plan import make_plan, parse_size, smallest_budget_bytes
        from flexinfer.streaming.reader import FileReader

        checkpoint = Checkpoint.open(resolve(arguments.model, arguments.gguf_file))
        skeleton = build_skeleton(checkpoint, arguments.dtype, arguments.kv_dtype)
        choice = DraftChoice.of(arguments.draft, None, None, None)
        memory = arguments.memory
        given_bytes = available_bytes() if memory == "auto" else parse_size(memory)
        measured = MemoryOfProcess.measure(skeleton, with_tokenizer=True)
        drafts = Drafts(choice, skeleton, skeleton.dtype) if choice is not None else None
        logits_to_keep = drafts.fit(given_bytes) + 1 if drafts is not None else 1
        context = arguments.context or default_context(
            skeleton, measured, given_bytes, logits_to_keep, drafts
        )
        fixed = fixed_memory(skeleton, measured, context, logits_to_keep, drafts)
        smallest_bytes = smallest_budget_bytes(skeleton.weights, fixed, skeleton.mixture)
        everything_bytes = fixed.nbytes + sum(weight.locked_bytes for weight in skeleton.weights)
        everything_bytes += skeleton.mixture.slots().nbytes if skeleton.mixture is not None else 0
        budget_bytes = min(given_bytes, everything_bytes) if memory == "auto" else given_bytes
        bars.spin("measuring disk and kernels")
        reader = FileReader(skeleton.checkpoint.files, direct=not arguments.buffered)
        try:
            costs = measure_costs(skeleton.used, reader, skeleton.dtype, max(1, arguments.io_threads))
        finally:
            reader.close()

    def plan_for(nbytes: int, substitutes: "Substitutes | None" = None) -> "Plan":
        return make_plan(
            skeleton.weights,
            fixed,
            nbytes,
            costs,
            policy=arguments.policy,
            window=arguments.window,
            mixture=skeleton.mixture,
            substitutes=substitutes,
        )

    options: list[Option] = []
    if drafts is not None:
        options = drafts.options(
            lambda substitutes: plan_for(budget_bytes, substitutes),
            costs,
            lambda: measure_draft_costs(skeleton.used, drafts.kernels, drafts.model_share, skeleton.dtype),
        )
    plan = max((one.plan for one in options), key=_tokens_per_s) if options else plan_for(budget_bytes)
    between = [int(smallest_bytes + share * (everything_bytes - smallest_bytes)) for share in BUDGET_SHARES]
    budgets = sorted({smallest_bytes, *between, everything_bytes, budget_bytes})
    plans = [plan_for(nbytes) for nbytes in budgets if nbytes >= smallest_bytes]
    if arguments.json:
        print(
            json.dumps(
                plan_facts(skeleton, plan, plans) | {"drafts": [_option_facts(one) for one in options]}
            )
        )
    else:
        from rich.console import Console

        console = Console()
        for title, table in plan_tables(skeleton, plan, plans).items():
            console.print(title, highlight=False)
            console.print(table)
        for one in options:
            what = f"{one.kind} {one.type}" if one.kind == "substitute" else one.kind or "none"
            each = f", {one.plan.draft.tokens_per_pass:.3g} tokens a pass" if one.plan.draft else ""
            console.print(f"draft {what}: {one.tokens_per_s:.3g} tokens/s expected{each}", highlight=False)
    return 0


def _tokens_per_s(plan: "Plan") -> float:
    return plan.draft.predicted_tokens_per_s if plan.draft is not None else plan.predicted_tokens_per_s


def _option_facts(option: "Option") -> dict[str, Any]:
    draft = option.plan.draft
    told = {"kind": option.kind, "type": option.type, "tokens_per_s": option.tokens_per_s}
    return told | (
        {"candidates": draft.candidates, "tokens_per_pass": draft.tokens_per_pass} if draft else {}
    )


def budget_parts(plan: "Plan") -> dict[str, int]:
    """Where the budget goes, in bytes; the parts add up to it."""
    fixed = plan.fixed
    parts = {
        "process": fixed.process_bytes,
        "tokenizer": fixed.tokenizer_bytes,
        "parameters that stay": fixed.resident_bytes,
        "KV cache": fixed.kv_bytes + fixed.attention_bytes,
        "activations": fixed.activation_bytes,
        "margin": fixed.margin_bytes,
        "window": plan.window_bytes,
        "unused": plan.unused_bytes,
    }
    if plan.substitute_bytes or fixed.draft_bytes:
        parts["draft"] = plan.substitute_bytes + fixed.draft_bytes
    if plan.experts is not None:
        parts["cache of experts"] = plan.experts.cache_bytes
    return parts | {"locked weights": plan.budget_bytes - sum(parts.values())}


def locked_by_role(weights: "list[Weight]", plan: "Plan") -> list[dict[str, Any]]:
    """Bytes of each role of weight over all layers, and how many of them are locked."""
    rows: dict[str, dict[str, Any]] = {}
    for weight in weights:
        row = rows.setdefault(
            weight.role, {"role": weight.role, "kind": weight.kind, "nbytes": 0, "locked_bytes": 0}
        )
        row["nbytes"] += weight.nbytes
        locked = weight.pieces[: plan.locked_pieces.get(weight.name, 0)]
        row["locked_bytes"] += sum(piece.nbytes for piece in locked)
    return list(rows.values())


def expert_facts(plan: "Plan") -> dict[str, Any] | None:
    """Of a mixture: bytes of all experts, of those that a token uses and of the cache, and the hits where routing is uniform."""
    experts = plan.experts
    if experts is None:
        return None
    return {
        "total_bytes": experts.total_bytes,
        "token_bytes": experts.token_bytes,
        "cache_bytes": experts.cache_bytes,
        "hit_rate": experts.hit_rate,
    }


def plan_facts(skeleton: "Skeleton", plan: "Plan", plans: "list[Plan]") -> dict[str, Any]:
    """`flexinfer plan --json`."""
    return {
        "model": str(skeleton.checkpoint.path),
        "policy": plan.policy,
        "context_tokens": plan.fixed.context_tokens,
        "costs": asdict(plan.costs),
        "budget_bytes": plan.budget_bytes,
        "parts_bytes": budget_parts(plan),
        "total_bytes": plan.total_bytes,
        "streamed_bytes": plan.streamed_bytes,
        "predicted_tokens_per_s": plan.predicted_tokens_per_s,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "roles": locked_by_role(skeleton.weights, plan),
        "experts": expert_facts(plan),
        "budgets": [
            {
                "budget_bytes": other.budget_bytes,
                "streamed_bytes": other.streamed_bytes,
                "predicted_tokens_per_s": other.predicted_tokens_per_s,
                "bound_tokens_per_s": other.bound_tokens_per_s,
                "expert_hit_rate": other.experts.hit_rate if other.experts is not None else None,
            }
            for other in plans
        ],
    }


def plan_tables(skeleton: "Skeleton", plan: "Plan", plans: "list[Plan]") -> "dict[str, Table]":
    """`flexinfer plan` for people: tables by their titles."""
    from rich.table import Table

    budget = Table()
    budget.add_column("part")
    budget.add_column("memory", justify="right")
    for part, nbytes in budget_parts(plan).items():
        budget.add_row(part, format_size(nbytes))

    kept = Table()
    for column in ("weight", "kind"):
        kept.add_column(column)
    for column in ("all layers", "locked", "share"):
        kept.add_column(column, justify="right")
    for row in locked_by_role(skeleton.weights, plan):
        share = row["locked_bytes"] / row["nbytes"]
        sizes = format_size(row["nbytes"]), format_size(row["locked_bytes"])
        kept.add_row(row["role"], row["kind"], *sizes, f"{share:.0%}")
    if plan.experts is not None:
        experts = plan.experts
        sizes = format_size(experts.total_bytes), f"cache {format_size(experts.cache_bytes)}"
        kept.add_row(
            f"experts ({format_size(experts.token_bytes)} a token)",
            "ffn",
            *sizes,
            f"{experts.hit_rate:.0%} hits",
        )

    speeds = Table()
    for column in ("budget", "read per token", "tokens/s predicted", "bound"):
        speeds.add_column(column, justify="right")
    for other in plans:
        speeds.add_row(
            format_size(other.budget_bytes) + (" *" if other.budget_bytes == plan.budget_bytes else ""),
            format_size(other.streamed_bytes),
            f"{other.predicted_tokens_per_s:.3g}",
            f"{other.bound_tokens_per_s:.3g}",
            style="bold" if other.budget_bytes == plan.budget_bytes else "",
        )
    bandwidth = f"{plan.costs.bandwidth_bytes_per_s / 1e6:.0f} MB/s"
    compute = f"{plan.costs.compute_s * 1e3:.0f} ms"
    return {
        f"{skeleton.checkpoint.path.name}: where {format_size(plan.budget_bytes)} go, for a context of {plan.fixed.context_tokens} tokens": budget,
        f"What is locked (policy {plan.policy})": kept,
        f"Speed, reads at {bandwidth}, {compute} of compute a token (* this budget)": speeds,
    }


# ---- quantize and doctor


def quantize_copy(arguments: argparse.Namespace) -> int:
    """Make the copy, then say what it saves and what it costs."""
    try:
        with Bars() as bars:
            bars.spin(f"reading {arguments.source}")
            from flexinfer.formats.quantize import MODEL_FILE, quantize
            from flexinfer.formats.skeleton import resolve

            source = resolve(arguments.source)
        report = quantize(
            source,
            Path(arguments.destination),
            arguments.type,
            progress=sys.stderr.isatty() and not arguments.json,
        )
    except (KeyboardInterrupt, Terminated) as stop:
        _note("stopped; the same command goes on after the last finished tensor")
        return _exit_code(stop)
    if arguments.json:
        print(json.dumps(asdict(report), default=str))
        return 0
    print(
        f"{report.path}: {format_size(report.source_bytes)} -> {format_size(report.nbytes)} in {report.seconds:.0f} s; "
        f"{', '.join(f'{count} tensors {kind}' for kind, count in Counter(t.kind for t in report.packed).most_common())}"
    )
    worst = report.worst
    print(f"largest relative error of a weight: {worst.relative_error:.4f} ({worst.name})")
    for name, reason in report.kept.items():
        print(f"left as it is: {name}: {reason}")
    reader = f"llama.cpp too ({report.architecture})" if report.architecture else "flexinfer"
    print(f"{report.path / MODEL_FILE}: for {reader}")
    for note in report.notes:
        print(f"note: {note}")
    return 0


def examine(arguments: argparse.Namespace) -> int:
    """Measure this machine and say what to expect of it."""
    with Bars() as bars:
        bars.spin("measuring disk and kernels")
        from flexinfer.doctor import advice, facts_table, measure_machine
        from flexinfer.plan import parse_size

        facts = measure_machine(Path(arguments.path), parse_size(arguments.size, "size"))
    if arguments.json:
        print(json.dumps(asdict(facts) | {"advice": advice(facts)}))
        return 0
    from rich.console import Console

    console = Console()
    console.print(facts_table(facts))
    for line in advice(facts):
        console.print(f"- {line}", highlight=False, markup=False)
    return 0


class _Notes(logging.Handler):
    """Writes messages as notes: to the stderr of the moment, which puts them above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        _note(record.getMessage())


@contextlib.contextmanager
def _logged(verbose: bool) -> Iterator[None]:
    """With `verbose`, what the engine logs goes to stderr as it is."""
    if not verbose:
        yield
        return
    logger, handler = logging.getLogger("flexinfer"), _Notes()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _exit_code(stop: BaseException) -> int:
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _note_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, RuntimeWarning | UserWarning):
        _note(f"note: {message}")
