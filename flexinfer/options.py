"""What a model is loaded with: declared and checked once, for Python, the commands and the harness.

Each field carries its meaning, and how the command line spells it: `flag` where the name differs,
`on_line=False` where it has no flag.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexinfer.draft.economics import DEFAULT_TYPE, DRAFTS, MOST_CANDIDATES, DraftChoice
from flexinfer.observe.perfetto import check_trace
from flexinfer.plan.planner import DEFAULT_WINDOW_BYTES, parse_window
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
    """A field with its default and meaning; `on_line`: how the commands take it."""
    return field(default=default, metadata={"meaning": meaning, **on_line})


def _one_of(name: str, value: str, known: Mapping[str, Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} does not exist; there are {', '.join(sorted(known))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """Settings for comparing ways to run a model. The defaults are the fastest that we measured.

    Raises ValueError naming field, value and remedy.
    """

    read_ahead: bool = option(
        True,
        "read weights before they are needed; False: only while one is waited for, by all reader "
        "threads (a baseline)",
    )
    read_timeout_s: float | None = option(
        None, "seconds after which a read raises ReadError; None: as long as it takes"
    )
    expert_policy: str = option(
        DEFAULT_EXPERT_POLICY,
        "which experts of a mixture stay in the cache: frequency (recent uses count most), "
        "recency, or fixed",
    )
    look_ahead: bool = option(
        True,
        "predict the next layer's experts with its router, and read them when the disk is idle",
    )
    draft_type: str | None = option(
        None,
        f"ggml type of a substitute; None: {DEFAULT_TYPE}, or with draft='auto' one of several. "
        "Fewer bits free memory for locking; more bits raise acceptance",
    )
    draft_tokens: int | None = option(
        None,
        "candidates per pass; None: as many as pay at the acceptance seen so far, up to "
        f"{MOST_CANDIDATES}",
    )
    draft_dir: str | Path | None = option(
        None,
        "keep the substitute in this directory, made once; None: made by the first pass where that "
        "takes at most two passes over the weights, otherwise kept in ~/.cache/flexinfer/drafts",
    )

    def __post_init__(self) -> None:
        _one_of("expert_policy", self.expert_policy, EXPERT_POLICIES)
        if self.read_timeout_s is not None and self.read_timeout_s <= 0:
            raise ValueError(f"read_timeout_s={self.read_timeout_s} must be more than 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Keyword arguments of `flexinfer.from_pretrained`.

    Raises BudgetError for a bad size, and ValueError for anything else, naming field, value and
    remedy.
    """

    memory: str | int = option(
        "auto",
        "budget of the whole process, '4GiB' ('4G' is the same, '4GB' decimal) or bytes; 'auto': "
        "what the machine or its control group can spare, less a tenth",
        type=str,
    )
    gguf_file: str | None = option(
        None,
        "the GGUF file of that directory or Hub id; of a split one, the first part",
        metavar="NAME",
    )
    policy: str = option(
        "balanced",
        "what is kept in memory: balanced (the same share of every weight), the paper's "
        "unbalanced, attention-first, ffn-first or algorithm1, or none",
        choices=tuple(POLICIES),
    )
    window: str | int | None = option(
        None,
        "memory for prefetched weights: '64MiB', or '3 layers' (the paper's unit) (default: "
        f"{DEFAULT_WINDOW_BYTES >> 20}MiB)",
        type=str,
    )
    io_threads: int = option(2, "reader threads; 0 reads when a weight is needed (synchronously)")
    direct: bool = option(
        True,
        "read past the page cache (O_DIRECT); False: through it, dropping pages behind",
        flag="--buffered",
        meaning_on_line="read through the page cache, not past it",
    )
    verify: bool | str | Path = option(
        False,
        "check every page that is read against its checksum, made once per file and kept in "
        "~/.cache/flexinfer/checksums, or in the directory given",
        type=bool,
        meaning_on_line="check what is read against checksums, made once per file",
    )
    context: int | None = option(
        None,
        "tokens that the KV cache and the activations are sized for, over all sequences of a "
        "batch; None: 2048, the model's own limit, or fewer where they would take more than a "
        "quarter of the budget",
    )
    logits_to_keep: int = option(
        1,
        "positions of one pass, over all its sequences, whose logits there is room for: 1 to "
        "generate one text, the size of the batch, the number of beams, or the length of a text "
        "to be scored",
        on_line=False,
    )
    tokenizer: "PreTrainedTokenizerBase | None" = option(
        None,
        "one that the program has loaded already; None: the one beside the weights is loaded with "
        "the model, as `model.flexinfer.tokenizer`",
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
        "dtype of the KV cache; auto: as dtype, and float16 for GGUF, as in llama.cpp (layers "
        "with a sliding window: as dtype)",
        type=str,
        choices=DTYPES,
    )
    draft: str | Path | None = option(
        None,
        "several tokens per pass, same output: substitute (the model itself with its streamed "
        "weights in a few bits), lookup (repeats of the text so far), a directory or Hub id (a "
        "small model of the same tokenizer, kept in memory), or auto (the fastest by measured "
        "costs); single texts only, batches and beams run without",
        metavar="WHAT",
        choices=DRAFTS,
        meaning_on_line="several tokens per pass, same output: substitute, lookup, auto, or a "
        "small model of the same tokenizer",
    )
    follow: bool = option(
        False, "give memory back while others need it, and take it again later, up to the budget"
    )
    trace: bool | str | Path = option(
        False,
        "keep a timeline of reads, waits and kernels, `model.flexinfer.events()`; close() writes "
        "it to a path, for https://ui.perfetto.dev",
        type=str,
        metavar="FILE",
        meaning_on_line="write reads, waits and kernels to FILE, for https://ui.perfetto.dev",
    )
    progress: "Progress | bool | None" = option(
        None,
        "called with (stage, bytes done, bytes in all) while unstreamed parameters are read "
        "('load'), a draft is made ('draft'), and for each piece of a pass ('pass'); True: bars "
        "by tqdm.auto, for notebooks",
        on_line=False,
    )
    experiment: Experiment = option(
        Experiment(),
        "settings for comparing ways to run a model: a flexinfer.Experiment, or its fields as a "
        "dict",
        on_line=False,
    )

    def __post_init__(self) -> None:
        if self.memory != "auto":
            parse_size(self.memory)
        _one_of("policy", self.policy, POLICIES)
        parse_window(self.window)
        if self.io_threads < 0:
            raise ValueError(f"io_threads={self.io_threads} must be 0 (synchronous) or more")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context={self.context} must be at least 1 token")
        if self.logits_to_keep < 1:
            raise ValueError(f"logits_to_keep={self.logits_to_keep} must be at least 1 position")
        for name, dtype in (("dtype", self.dtype), ("kv_dtype", self.kv_dtype)):
            if str(dtype).removeprefix("torch.") not in DTYPES:
                raise ValueError(
                    f"{name}={dtype!r} is not supported; choose one of {', '.join(DTYPES)}"
                )
        if not isinstance(self.experiment, Experiment):
            raise ValueError(
                f"experiment={self.experiment!r} must be a flexinfer.Experiment(...) "
                f"({', '.join(one.name for one in fields(Experiment))})"
            )
        if self.experiment.read_timeout_s is not None and self.io_threads == 0:
            raise ValueError(
                f"read_timeout_s={self.experiment.read_timeout_s} needs a reader thread to give up "
                "on (io_threads=0)"
            )
        _ = self.draft_choice
        check_trace(self.trace)

    @property
    def draft_choice(self) -> DraftChoice | None:
        """The draft requested. Raises ValueError for draft options that do not go together."""
        given = self.experiment
        return DraftChoice.of(self.draft, given.draft_type, given.draft_tokens, given.draft_dir)

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "Options":
        """From `keywords`. Raises TypeError for an unknown one, with the nearest name."""
        known = [one.name for one in fields(cls)]
        for name in keywords:
            if name in {one.name for one in fields(Experiment)}:
                raise TypeError(
                    f"{name} is a setting for experiments: pass "
                    f"experiment=flexinfer.Experiment({name}={keywords[name]!r})"
                )
            if name not in known:
                like = difflib.get_close_matches(name, known, 1)
                raise TypeError(
                    f"from_pretrained() has no option {name!r}; "
                    + (f"did you mean {like[0]!r}?" if like else f"there are {', '.join(known)}")
                )
        given = dict(keywords)
        if isinstance(given.get("experiment"), Mapping):
            given["experiment"] = Experiment(**given["experiment"])
        return cls(**given)

    @classmethod
    def signature_of(cls, function: Callable[..., Any]) -> inspect.Signature:
        """That of `function`, with the fields in place of `**options`: for help() and editors."""
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


def _document(kind: type) -> None:
    kind.__doc__ = f"{kind.__doc__}\n    Fields:\n" + "".join(
        f"        {one.name}: {one.metadata['meaning']} (default: {one.default!r})\n"
        for one in fields(kind)
    )


_document(Experiment)
_document(Options)
