"""Making text: how it is decoded, a model loaded for it, and what it took.

For generate and chat.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from flexinfer.cli.bars import Bars
from flexinfer.cli.interrupt import held_back
from flexinfer.cli.parameters import DECODING
from flexinfer.cli.terminal import note
from flexinfer.options import Options, option
from flexinfer.sizes import format_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flexinfer.engine.engine import Engine
    from flexinfer.engine.prepare import ContextOf

# Length of a text if none is given.
NEW_TOKENS = 256
DRAFT_STATS = (
    "draft",
    "drafted",
    "accepted",
    "acceptance",
    "draft_s",
    "draft_predicted_tokens_per_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How tokens are chosen: greedily, unless a temperature or top-p is given.

    Raises ValueError for what cannot be.
    """

    max_new_tokens: int | None = option(
        None,
        f"at most this many (default: {NEW_TOKENS}, or what the context has room for)",
        panel=DECODING,
    )
    temperature: float | None = option(
        None, "sample with this temperature (greedy if left out)", panel=DECODING
    )
    top_p: float | None = option(
        None, "sample from the likeliest tokens of this total probability", panel=DECODING
    )
    seed: int | None = option(None, "makes sampling repeatable", panel=DECODING)

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if temperature is not None and temperature < 0:
            raise ValueError(f"temperature={temperature:g} must be 0 (greedy) or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p={top_p:g} must be more than 0 and at most 1")

    @property
    def new_tokens(self) -> int:
        """Tokens of a text, at most."""
        return self.max_new_tokens or NEW_TOKENS

    def keywords(self, room: int) -> dict[str, Any]:
        """Keyword arguments of transformers' generate(), where the context has room for so many
        tokens.
        """
        sample = bool(self.temperature) or self.top_p is not None
        options: dict[str, Any] = {
            "max_new_tokens": min(self.new_tokens, room),
            "do_sample": sample,
        }
        if sample:
            options |= {"temperature": self.temperature or 1.0, "top_p": self.top_p or 1.0}
        return options


def find(model: str, options: Options, bars: Bars) -> Path:
    """The checkpoint on this disk, fetched from the Hub if it is not there yet; with the Hub's own
    bars meanwhile.
    """
    bars.spin(f"loading {model}")
    with held_back():
        # All libraries that a run needs.
        import flexinfer.engine.load  # noqa: F401
        from flexinfer.formats.hub import resolve

    def fetching() -> None:
        bars.stop()
        note(f"{model} is not on this disk yet: fetching it from the Hugging Face Hub")

    path = resolve(model, options.gguf_file, fetching)
    bars.spin(f"loading {model}")
    return path


@contextlib.contextmanager
def loaded(
    path: Path,
    options: Options,
    decoding: Decoding,
    bars: Bars,
    context_of: "ContextOf | None" = None,
) -> "Iterator[PreTrainedModel]":
    """The model of a checkpoint with its tokenizer, closed at the end of the block."""
    import torch
    from transformers.utils import logging

    from flexinfer.engine.load import load

    logging.set_verbosity_error()

    if decoding.seed is not None:
        torch.manual_seed(decoding.seed)
    bars.expect("verify", "load", "draft")
    model = load(
        path,
        replace(
            options,
            # `path` already names the file.
            gguf_file=None,
            progress=bars.progress,
        ),
        context_of,
    )
    bars.stop()
    with engine_of(model):
        yield model


def text_streamer(tokenizer: "PreTrainedTokenizerBase") -> Any:
    """Prints the answer, without the prompt, as it comes."""
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class Nowhere:
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
    # When each pass ended.
    times_s: list[float] = field(default_factory=list)
    # Tokens that each pass gave.
    counts: list[int] = field(default_factory=list)
    # Bytes read by then.
    bytes_read: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bars.expect("draft", "pass")

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
    """What making this text took: the first token apart (it waits for the prompt), then the
    decoding, and its bottleneck.

    `ratio` is passes per second over the bound of the budget; with more than one token a pass,
    tokens/s may exceed it.
    """
    engine = engine_of(model)
    stats, plan = engine.stats(), engine.plan
    # Without the prompt.
    times_s, counts = clock.times_s[1:], clock.counts[1:]
    tokens, passes = sum(counts), len(counts)
    decoding_s = times_s[-1] - times_s[0] if passes > 1 else 0.0
    speed = (tokens - counts[0]) / decoding_s if decoding_s else None
    pays = engine.draft_that_pays()
    bytes_read = stats["bytes_read"] - clock.bytes_read[0] if clock.bytes_read else 0
    decoding_bytes = clock.bytes_read[-1] - clock.bytes_read[1] if decoding_s else None
    return {
        "tokens": tokens,
        "passes": passes,
        "first_token_s": times_s[0] - clock.start_s if times_s else None,
        "tokens_per_s": speed,
        "bytes_read": bytes_read,
        "read_bytes_per_s": decoding_bytes / decoding_s if decoding_bytes is not None else None,
        "bytes_per_token": decoding_bytes / (tokens - counts[0])
        if decoding_bytes is not None
        else None,
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


def at_context(context: int) -> str:
    """What to say of a text that had no more room."""
    return (
        f"the text ends at the context of {context} tokens; start with a larger --context for a "
        "longer one"
    )


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
            f"draft {draft['draft'] or 'none'}: {draft['accepted']} of {draft['drafted']} "
            "candidates accepted"
        )
    if result["bytes_per_token"] is not None:
        parts.append(f"{format_size(result['bytes_per_token'])} read per token")
    parts.append(
        f"peak {format_size(result['peak_bytes'])} of {format_size(result['budget_bytes'])}"
    )
    parts.append(f"limited by {result['bottleneck'].partition(':')[0]}")
    return ", ".join(parts)
