"""Generation for the server: transformers' own manager, with a watch on each request.

One request at a time generates (flexinfer.serve.gate gives the turns), on one thread that keeps all that torch holds for a thread; the model is
loaded on it too, so that what is measured then is what is there later. A `Turn` is what the gate sees of it: a clock, counts, and a way to
end the text after the pass in hand once nobody wants it any more. `Text` watches the tokens, of which a pass gives several with a draft.

Stop strings are looked for here: transformers' StopStringCriteria makes a table of the vocabulary times the length of the strings, 100 MB for
256,000 tokens and 100 characters, and keeps eight of them; it looks once a pass, so that a draft's tokens would go past the string. What is
stopped by is the same, at the same token.
"""

import asyncio
import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers.cli.serving.utils import GenerateManager, GenerationState, _GenerationCancelled

from flexinfer.messages import cause
from flexinfer.serve.requests import Limits, Refusal

NEW_TOKENS = 1024  # of a request that does not say how many, as in transformers' server
logger = logging.getLogger("flexinfer.serve")


@dataclass(slots=True)
class Turn:
    """What one request makes of its turn."""

    loop: asyncio.AbstractEventLoop
    prompt_tokens: int = 0
    new_tokens: int = 0
    passes: int = 0  # that gave them
    begun: bool = False  # whether its generation was handed to the thread
    failure: str | None = None
    start_s: float = field(default_factory=perf_counter)
    first_s: float = 0.0  # when its first pass was done
    first_tokens: int = 0  # that it gave
    last_s: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # the thread is done with it
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End the text after the pass in hand. From any thread."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    @property
    def tokens_per_s(self) -> float | None:
        """After the first pass, which waits for the prompt."""
        seconds, tokens = self.last_s - self.first_s, self.new_tokens - self.first_tokens
        return tokens / seconds if tokens and seconds else None

    def saw(self, tokens: int) -> None:
        """A pass has given so many."""
        self.last_s = perf_counter()
        self.passes += 1
        self.new_tokens += tokens
        if self.passes == 1:
            self.first_s, self.first_tokens = self.last_s, tokens

    def end(self) -> None:
        """Called by the thread when it is done."""
        self.loop.call_soon_threadsafe(self.ended.set)


class StopText:
    """Looks for `stops` in the text of new tokens, of one sequence."""

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._longest = max(map(len, stops), default=0)
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._tail = ""

    def ends_with(self, token: int) -> bool:
        """Whether `token`, the next one, completes one of them."""
        if not self._stops:
            return False
        self._tail += self._stream.step(self._tokenizer, token) or ""
        found = any(stop in self._tail for stop in self._stops)
        self._tail = self._tail[-self._longest :]
        return found


class Text:
    """The new tokens of one text, as a stopping criterion of transformers sees them: after each pass, which gives several with a draft. They
    go to `streamer` one by one, up to the end of a stop string; the text ends then, or once nobody wants it."""

    def __init__(self, turn: Turn, stop: StopText, streamer: Any = None) -> None:
        self._turn, self._stop, self._streamer = turn, stop, streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new, complete = input_ids[0, self._turn.prompt_tokens + self._turn.new_tokens :], False
        for count, token in enumerate(new.tolist(), 1):
            if self._stop.ends_with(token):
                new, complete = new[:count], True
                break
        self._turn.saw(len(new))
        if self._streamer is not None:
            self._streamer.put(new)
        return torch.full((input_ids.shape[0],), complete or self._turn.stopped, dtype=torch.bool)


class Failed(RuntimeError):
    """A generation ended with an error; what a client may read of it."""


@dataclass(frozen=True, slots=True)
class _Watched:
    """Stands where the managers expect a model, and generates."""

    generate_with: Callable[..., torch.Tensor]
    turn: Turn
    stop: StopText

    def generate(self, streamer: Any = None, **inputs: Any) -> torch.Tensor:
        """On the thread. Raises Failed, which holds no frame and so no KV cache: there is memory for one."""
        try:
            sequences = self._generated(streamer, inputs)
        finally:
            self.turn.end()
        if sequences is None:
            kind = str(self.turn.failure).partition(":")[0]
            raise Failed(f"the generation failed ({kind}); the log of the server says more")
        return sequences[:, : self.turn.prompt_tokens + self.turn.new_tokens]

    def _generated(self, streamer: Any, inputs: dict[str, Any]) -> torch.Tensor | None:
        try:
            if streamer is not None:
                streamer.put(inputs["input_ids"])  # it leaves the prompt out
            sequences = self.generate_with(**inputs, stopping_criteria=[Text(self.turn, self.stop, streamer)])
            if streamer is not None:
                streamer.end()
            return sequences
        except _GenerationCancelled:
            raise
        except Exception as failure:
            self.turn.failure = cause(failure)
            if not self.turn.stopped:
                logger.exception("a generation failed")
        gc.collect()
        return None


class Generation(GenerateManager):
    """transformers' generation on one thread, for the turn in hand. Refuses what does not fit into the context."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flexinfer-generate")
        self.turn: Turn | None = None
        self.limits: Limits | None = None

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Have the thread do something. GenerateManager's own thread has no end."""
        return self._executor.submit(fn, *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> "asyncio.Future[Any]":
        """The same, to be awaited."""
        return asyncio.wrap_future(self.submit(fn, *args, **kwargs))

    def _watched(self, model: Any, processor: Any, inputs: Any, config: Any) -> Any:
        """The model as it is handed on, with `config` made to fit. Raises Refusal."""
        turn, limits = self.turn, self.limits
        assert turn is not None
        assert limits is not None
        turn.prompt_tokens = inputs["input_ids"].shape[-1]
        if not turn.prompt_tokens:
            raise Refusal(400, "the prompt is empty")
        room = limits.context - turn.prompt_tokens
        if room < 1:
            raise limits.too_long(f"the prompt has {turn.prompt_tokens}")
        config.max_new_tokens = min(config.max_new_tokens or NEW_TOKENS, room)
        stops, config.stop_strings = config.stop_strings or [], None
        turn.begun = True
        stop = StopText(processor._tokenizer, [stops] if isinstance(stops, str) else stops)
        return _Watched(model.generate, turn, stop)

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> Any:
        """As GenerateManager. Raises Refusal where the prompt is too long."""
        watched = self._watched(model, processor, inputs, gen_config)
        return super().generate_streaming(watched, processor, inputs, gen_config, request_id, response_parser)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """As GenerateManager. Raises Refusal where the prompt is too long."""
        watched = self._watched(model, processor, inputs, gen_config)
        return await super().generate_non_streaming(watched, processor, inputs, gen_config, request_id)

    def stop(self) -> None:
        """End the thread, after what it has to do."""
        self._executor.shutdown()


class OneGeneration(GenerationState):
    """The state that transformers' handlers share: one manager, for one model."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generation:
        return self._generation
