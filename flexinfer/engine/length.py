"""How long a text of `generate()` may become, seen to before its first pass.

The KV cache has room for a number of tokens. A length that a call asks for, by an argument or a
`GenerationConfig` of its own, is refused where it cannot fit, before anything is computed. A length
that nobody asked for (transformers' default, the checkpoint's generation_config.json, a pipeline's
default, a stopping criterion) is cut to what fits: the text ends there, with a warning.

transformers says what it has made of all settings in three methods, which are extended for the one
model: `_prepare_generation_config` (who named a length), `_prepare_generated_length` (what it comes
to) and `_get_stopping_criteria`. Its loops are its own.
"""

import sys
import threading
import warnings
from collections.abc import Callable
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteriaList

from flexinfer.streaming.kv_cache import ContextError

if TYPE_CHECKING:
    from flexinfer.engine.runner import PassRunner

LENGTHS = ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
# Cache implementations whose memory is reserved.
IN_RESERVE = (None, "dynamic")


class _Call(threading.local):
    """The call of `generate()` that a thread is preparing."""

    # Names in LENGTHS that the call set.
    asked: frozenset[str] = frozenset()
    cache: Any = None
    mask_tokens: int = 0
    # Tokens wanted of a sequence -> tokens that fit.
    longest: Callable[[int], int] | None = None
    # Length that the settings amount to.
    wanted: int = 0
    # Tokens of a sequence beyond its input ids.
    beside: int = 0


class Lengths:
    """Sees to the length of the texts of one model."""

    def __init__(self, model: PreTrainedModel, runner: "PassRunner") -> None:
        self._runner, self._call = runner, _Call()
        for name, method in (
            ("_prepare_generation_config", self._config),
            ("_prepare_generated_length", self._length),
            ("_get_stopping_criteria", self._criteria),
        ):
            stock = getattr(model, name)
            setattr(model, name, wraps(stock)(partial(method, stock)))

    def _config(
        self,
        stock: Callable[..., Any],
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Any:
        """Keep who names a length.

        The model's own generation config is a default, also where it is passed again.
        """
        call, asked = self._call, set()
        defaults = stock.__self__.generation_config  # type: ignore[attr-defined]
        for name in LENGTHS:
            value = kwargs.get(name)
            if value is None:
                value = getattr(generation_config, name, None)
                value = None if value == getattr(defaults, name, None) else value
            if value and not (name == "max_new_tokens" and _is_default_of_pipeline(value)):
                asked.add(name)
        found = stock(generation_config, **kwargs)
        mask = kwargs.get("attention_mask")
        call.asked, call.cache = frozenset(asked), kwargs.get("cache")
        call.mask_tokens = (
            mask.shape[1] if isinstance(mask, torch.Tensor) and mask.dim() == 2 else 0
        )
        return found

    def _length(self, stock: Callable[..., Any], **kwargs: Any) -> GenerationConfig:
        """Refuse or cut the length of this text where there is no room for it.

        Raises ContextError.
        """
        config: GenerationConfig = stock(**kwargs)
        call, cache = self._call, self._call.cache
        # The cache belongs to the caller: keep no reference.
        call.cache = None
        inputs, prompt_tokens = kwargs["inputs_tensor"], kwargs["input_ids_length"]
        rows = inputs.shape[0] * max(config.num_beams or 1, config.num_return_sequences or 1)
        if kwargs["model_input_name"] == "inputs_embeds" and prompt_tokens != inputs.shape[1]:
            call.beside = inputs.shape[1]
        else:
            # A mask longer than the ids covers tokens in the cache.
            call.beside = max(0, call.mask_tokens - prompt_tokens) if cache is not None else 0
        own_memory = cache is None and config.cache_implementation not in IN_RESERVE
        call.longest = partial(
            self._runner.longest_text, rows, cache, own_memory, config.use_cache is not False
        )
        which = "max_new_tokens" if config.max_new_tokens is not None else "max_length"
        wanted = config.max_length if which in call.asked else 0
        if call.asked & {"min_new_tokens", "min_length"}:
            wanted = max(wanted, min(config.min_length or 0, config.max_length))
        wanted = max(wanted, prompt_tokens + 1)
        # The last token goes through no pass.
        fed_tokens = call.beside + wanted - 1
        room_tokens = call.longest(fed_tokens)
        if room_tokens < fed_tokens:
            self._refuse(rows, fed_tokens, room_tokens, call.beside + prompt_tokens)
        call.wanted = config.max_length
        longest = call.longest(max(fed_tokens, call.beside + config.max_length - 1))
        config.max_length = min(config.max_length, longest + 1 - call.beside)
        return config

    def _refuse(self, rows: int, fed_tokens: int, room_tokens: int, prompt_tokens: int) -> None:
        context = self._runner.context
        less = room_tokens + 1 - prompt_tokens
        raise ContextError(
            f"the KV cache is sized for context={context} tokens in all ({rows} x {room_tokens}) "
            f"and this text needs {rows} x {fed_tokens}, {prompt_tokens} of each for its prompt; "
            "nothing was run. Load the model with a larger context, "
            f"flexinfer.from_pretrained(..., context={rows * fed_tokens})"
            + (f", or ask for at most max_new_tokens={less}" if less > 0 else "")
        )

    def _criteria(
        self, stock: Callable[..., Any], generation_config: GenerationConfig, **kwargs: Any
    ) -> Any:
        """End the text where the room ends: of a length that was cut, or a criterion of the
        program's that names a larger one.
        """
        criteria: StoppingCriteriaList = stock(generation_config=generation_config, **kwargs)
        call, longest = self._call, self._call.longest
        call.longest = None
        if longest is not None:
            wanted = max(call.wanted, criteria.max_length or 0)
            limit = longest(call.beside + wanted - 1) + 1 - call.beside
            # Drafts go by it, and would never end past it.
            if (generation_config.num_beams or 1) == 1:
                generation_config.max_length = min(wanted, limit)
            if limit < wanted:
                ends = (generation_config._eos_token_tensor, generation_config._pad_token_tensor)
                criteria.append(
                    _AtContext(limit, self._runner.context, [t for t in ends if t is not None])
                )
        return criteria


class _AtContext:
    """A stopping criterion: the sequences are as long as there is room for.

    Says so, unless they have ended by themselves.
    """

    def __init__(self, limit: int, context: int, ends: list[torch.Tensor]) -> None:
        self._limit, self._context, self._ends = limit, context, ends

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = input_ids.shape[1] >= self._limit
        if done and not any(torch.isin(input_ids[:, -1], end).all() for end in self._ends):
            warnings.warn(
                f"the text has reached the context of {self._context} tokens (over all sequences) "
                "and ends there; for a longer one load the model with a larger context, such as "
                f"flexinfer.from_pretrained(..., context={2 * self._context})",
                RuntimeWarning,
                stacklevel=2,
            )
        return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)


def _is_default_of_pipeline(max_new_tokens: int) -> bool:
    """Whether the number is a pipeline's own, which it hands to `generate()` as if it had been
    asked for.
    """
    base = sys.modules.get("transformers.pipelines.base")
    frame = sys._getframe(1) if base is not None else None
    while frame is not None:
        pipeline = frame.f_locals.get("self") if frame.f_code.co_name == "_forward" else None
        if base is not None and isinstance(pipeline, base.Pipeline) and frame.f_back is not None:
            asked = getattr(pipeline, "_generate_kwargs", {}) | frame.f_back.f_locals.get(
                "forward_params", {}
            )
            asked_in = asked.get("generation_config")
            named = asked.get("max_new_tokens") or getattr(asked_in, "max_new_tokens", None)
            return named is None and max_new_tokens == pipeline._generation_defaults.get(
                "max_new_tokens"
            )
        frame = frame.f_back
    return False
