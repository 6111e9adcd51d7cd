"""What a model is loaded with: declared once, checked once, for `from_pretrained`, the commands and the harness.

Every field says what it means (`meaning`), and the commands how it is written on their line: `flag`, where it has another name there,
`on_line=False` where it has none.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexinfer.draft.economics import DEFAULT_TYPE, DRAFTS, MOST_CANDIDATES, DraftChoice
from flexinfer.observe.perfetto import check_trace
from flexinfer.plan.budget import DEFAULT_WINDOW_BYTES, parse_window
from flexinfer.plan.preservation import POLICIES
from flexinfer.sizes import parse_size
from flexinfer.streaming.expert_policies import DEFAULT as DEFAULT_EXPERT_POLICY
from flexinfer.streaming.expert_policies import POLICIES as EXPERT_POLICIES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from flexinfer.observe.trace import Progress

DTYPES = ("auto", "bfloat16", "float16", "float32")


def option(default: Any, meaning: str, **on_line: Any) -> Any:
    """A field with a default and what it means; `on_line`: how the commands take it."""
    return field(default=default, metadata={"meaning": meaning, **on_line})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Keyword arguments of `flexinfer.from_pretrained`.

    Raises BudgetError for a size that is none, and ValueError for anything else that is wrong, naming field, value and remedy.
    """

    memory: str | int = option(
        "auto",
        "budget of the whole process, '4GiB' ('4G' is the same, '4GB' decimal) or bytes; 'auto': what the machine or its control group has to spare, less a tenth",
        type=str,
    )
    gguf_file: str | None = option(
        None, "the GGUF file of that directory or Hub id; of a split one, the first part", metavar="NAME"
    )
    policy: str = option(
        "balanced",
        "what is kept in memory: balanced (the same share of every weight), or the paper's unbalanced, attention-first, ffn-first, "
        "algorithm1, or none",
        choices=tuple(POLICIES),
    )
    expert_policy: str = option(
        DEFAULT_EXPERT_POLICY,
        "which experts of a mixture stay in the cache: frequency (uses of the last tokens count most), recency, fixed",
        choices=tuple(EXPERT_POLICIES),
    )
    look_ahead: bool = option(
        True,
        "let the next layer's router foretell its experts, and read them when the disk is idle",
        flag="--no-look-ahead",
        meaning_on_line="do not read experts that the next layer's router foretells",
    )
    window: str | int | None = option(
        None,
        f"memory for prefetched weights: '64MiB', or '3 layers' (the paper's unit) (default: {DEFAULT_WINDOW_BYTES >> 20}MiB)",
        type=str,
    )
    io_threads: int = option(2, "reader threads; 0 reads when a weight is needed (synchronously)")
    read_ahead: bool = option(
        True,
        "read weights before they are needed; otherwise only while one is waited for, by all reader threads (a baseline)",
        flag="--no-read-ahead",
        meaning_on_line="read only while a weight is waited for (a baseline)",
    )
    verify: bool | str | Path = option(
        False,
        "hold every page that is read against its checksum, made once per file and kept in ~/.cache/flexinfer/checksums, or in the "
        "directory given",
        type=bool,
        meaning_on_line="hold what is read against checksums, made once per file",
    )
    read_timeout_s: float | None = option(
        None,
        "give a read up after so many seconds and raise ReadError; as long as it takes if left out",
        flag="--read-timeout",
        metavar="SECONDS",
    )
    direct: bool = option(
        True,
        "read past the page cache (O_DIRECT); otherwise through it, dropping pages behind",
        flag="--buffered",
        meaning_on_line="read through the page cache, not past it",
    )
    context: int | None = option(
        None,
        "tokens that the KV cache and the activations are sized for, over all sequences of a batch; if left out 2048, or the model's own "
        "limit, or fewer where they would take more than a quarter of the budget",
    )
    logits_to_keep: int = option(
        1,
        "positions of one pass, over all its sequences, whose logits there is room for: 1 to generate one text, the batch or the number of "
        "beams, the number of candidates and one, or the length of a text that is scored",
        on_line=False,
    )
    tokenizer: "PreTrainedTokenizerBase | None" = option(
        None,
        "one that the program has loaded already; otherwise the one beside the weights is loaded with the model, as `model.flexinfer.tokenizer`",
        on_line=False,
    )
    dtype: "str | torch.dtype" = option(
        "auto",
        f"what to compute in: {', '.join(DTYPES)} (the checkpoint's; float32 for GGUF)",
        type=str,
        choices=DTYPES,
    )
    kv_dtype: "str | torch.dtype" = option(
        "auto",
        "what the KV cache is kept in; auto: as dtype, and float16 for GGUF, as in llama.cpp (layers with a sliding window: as dtype)",
        type=str,
        choices=DTYPES,
    )
    draft: str | Path | None = option(
        None,
        "several tokens a pass, same output: substitute (the model itself with its streamed weights in a few bits), lookup (what stands in "
        "the text already), a directory or Hub id (a small model of the same tokenizer, kept in memory), or auto (what the measured costs "
        "make the fastest); single texts only, batches and beams go without",
        metavar="WHAT",
        choices=DRAFTS,
        meaning_on_line="several tokens a pass, same output: substitute, lookup, a small model of the same tokenizer, or auto",
    )
    draft_type: str | None = option(
        None,
        f"ggml's type of a substitute's blocks; if left out {DEFAULT_TYPE}, and with auto one of several",
        metavar="TYPE",
    )
    draft_tokens: int | None = option(
        None,
        f"candidates of each pass; if left out as many as pay by what has been accepted so far, up to {MOST_CANDIDATES}",
        metavar="N",
    )
    draft_dir: str | Path | None = option(
        None,
        "keep the substitute in this directory, made once; if left out it is made by the first pass, where that takes no longer than "
        "two passes over the weights, and else kept in ~/.cache/flexinfer/drafts",
        metavar="DIR",
    )
    follow: bool = option(
        False, "give memory back while others need it, and take it again later, up to the budget"
    )
    trace: bool | str | Path = option(
        False,
        "keep a timeline of reads, waits and kernels, `model.flexinfer.events()`; a path has close() write it there, for "
        "https://ui.perfetto.dev",
        type=str,
        metavar="FILE",
        meaning_on_line="write reads, waits and kernels there, for https://ui.perfetto.dev",
    )
    progress: "Progress | bool | None" = option(
        None,
        "called with (stage, bytes done, bytes in all) while parameters that stay are read ('load'), a draft is made ('draft'), and piece by "
        "piece in each pass ('pass'); True: bars by tqdm.auto, for notebooks",
        on_line=False,
    )

    def __post_init__(self) -> None:
        if self.memory != "auto":
            parse_size(self.memory)
        _one_of("policy", self.policy, POLICIES)
        _one_of("expert_policy", self.expert_policy, EXPERT_POLICIES)
        parse_window(self.window)
        if self.io_threads < 0:
            raise ValueError(f"io_threads={self.io_threads} must be 0 (synchronous) or more")
        if self.read_timeout_s is not None and (self.read_timeout_s <= 0 or self.io_threads == 0):
            raise ValueError(
                f"read_timeout_s={self.read_timeout_s} must be more than 0, and needs a reader thread to give up on "
                f"(io_threads={self.io_threads})"
            )
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1 token")
        if self.logits_to_keep < 1:
            raise ValueError(f"logits_to_keep={self.logits_to_keep} must be at least 1 position")
        for name, dtype in (("dtype", self.dtype), ("kv_dtype", self.kv_dtype)):
            if str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(f"{name}={dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
        _ = self.draft_choice
        check_trace(self.trace)

    @property
    def draft_choice(self) -> DraftChoice | None:
        """What drafts, if anything does. Raises ValueError for options of drafts that do not go together."""
        return DraftChoice.of(self.draft, self.draft_type, self.draft_tokens, self.draft_dir)

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "Options":
        """Those of `keywords`. Raises TypeError for one that does not exist, with the name that is like it."""
        known = [one.name for one in fields(cls)]
        for name in keywords:
            if name not in known:
                like = difflib.get_close_matches(name, known, 1)
                raise TypeError(
                    f"from_pretrained() has no option {name!r}; "
                    + (f"did you mean {like[0]!r}?" if like else f"there are {', '.join(known)}")
                )
        return cls(**keywords)

    @classmethod
    def signature_of(cls, function: Callable[..., Any]) -> inspect.Signature:
        """That of `function`, with the fields in place of its `**options`: for help() and editors."""
        signature = inspect.signature(function)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = {p.name for p in named}
        named += [
            inspect.Parameter(
                one.name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type
            )
            for one in fields(cls)
            if one.name not in taken
        ]
        return signature.replace(parameters=named)


Options.__doc__ = f"{Options.__doc__}\n    Fields:\n" + "".join(
    f"        {one.name}: {one.metadata['meaning']} (default: {one.default!r})\n" for one in fields(Options)
)


def _one_of(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} does not exist; there are {', '.join(sorted(known))}")
